"""What a model is, from its config.json alone: names and shapes of every tensor, cache and state; no weights, no torch.

A checkpoint of a few hundred thousand tensors is described by a few dozen ``TensorGroup``s: layers of one build share a
``LayerKind``, and an expert's matrices are one group whose expert axis is symbolic. So pruning is a change of one
number, and sizing a whole catalogue takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

Role = Literal["embedding", "lm_head", "attention", "norm", "router", "expert", "shared_expert", "dense_mlp", "other"]
# How vLLM shards a tensor over tensor-parallel ranks. "column" splits the out axis, "row" the in axis, "kv" the out
# axis by KV heads (a rank keeps at least one), "vocab" the padded vocabulary; "expert" the out axis of an
# expert's gate and up, "expert_row" the in axis of its down (with expert parallelism experts stay whole and are dealt
# out instead); "replicate" keeps it whole on every rank.
Parallel = Literal["replicate", "column", "row", "kv", "vocab", "expert", "expert_row"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "float8": 1, "uint8": 1}


class TensorSpec(NamedTuple):
    """One tensor on disk. ``module`` is the name without ``.weight``/``.bias``; ``expert`` its index, if any."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def module(self) -> str:
        return self.name.rsplit(".", 1)[0]


class GgufPart(NamedTuple):
    """A tensor that llama.cpp's converter writes. ``name`` is complete outside layers, and follows ``blk.N.`` inside
    ("attn_q.weight"). ``shape`` is as numpy reads it, the row last; with ``experts`` an axis of the expert count comes
    before it, and ``before`` before that (ERNIE's router bias is (1, experts))."""

    name: str
    shape: tuple[int, ...]
    experts: bool = False
    before: tuple[int, ...] = ()

    def with_axes(self, experts: int) -> tuple[int, ...]:
        """The whole shape, with ``experts`` experts where it has them."""
        return (*self.before, experts, *self.shape) if self.experts else self.shape


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """One tensor of a layer (or of the outside), or one for every expert.

    ``name`` follows the layer's prefix; with ``{e}`` in it there is one such tensor per expert. ``shape`` is one tensor
    as stored, without the expert axis; ``expert_axis`` says where a fused tensor has that axis (router rows: 0).
    ``linears`` are the (out, in) matrices inside it that a weight format may quantize, per expert where there are
    experts: ((m, h), (m, h)) for a fused gate_up. Empty: it always stays in its dtype. ``dtype`` is empty for the
    model's own. ``gguf``: what llama.cpp's converter makes of it. ``names_experts``: its values are numbers of experts.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    parallel: Parallel = "replicate"
    expert_axis: int | None = None
    linears: tuple[tuple[int, int], ...] = ()
    gguf: tuple[GgufPart, ...] = ()
    dtype: str = ""
    names_experts: bool = False

    @property
    def per_expert(self) -> bool:
        """Whether its size grows with the expert count."""
        return self.expert_axis is not None or "{e}" in self.name

    @property
    def unit_parameters(self) -> int:
        """Parameters of one expert's share, or of the whole where there are no experts."""
        return prod(self.shape)

    def parameters(self, experts: int) -> int:
        """Parameters with ``experts`` experts."""
        return prod(self.shape) * (experts if self.per_expert else 1)

    def expand(self, prefix: str, experts: int, layer: int | None) -> Iterator[TensorSpec]:
        """The tensors on disk, ``prefix`` (with its dot) before each name."""
        if "{e}" in self.name:
            for e in range(experts):
                yield TensorSpec(prefix + self.name.replace("{e}", str(e)), self.shape, self.role, layer, e)
            return
        shape = self.shape
        if self.expert_axis is not None:
            shape = (*shape[: self.expert_axis], experts, *shape[self.expert_axis :])
        yield TensorSpec(prefix + self.name, shape, self.role, layer)


@dataclass(frozen=True, slots=True)
class CacheStream:
    """What one layer keeps of past tokens.

    One entry of ``k_elements + v_elements`` for every ``stride`` tokens, of the last ``window`` tokens only where one
    is given. ``heads``: KV heads that tensor parallelism can split over ranks; 0 for a latent (MLA) or an indexer,
    which every rank keeps whole. ``kind`` "index" is the key of a sparse-attention indexer. A state of fixed size per
    sequence is no stream: see ``LayerKind``.
    """

    k_elements: int
    v_elements: int = 0
    heads: int = 0
    window: int | None = None
    stride: int = 1
    kind: Literal["kv", "latent", "index"] = "kv"

    @property
    def elements(self) -> int:
        return self.k_elements + self.v_elements

    def entries(self, context: int) -> int:
        """Entries of one sequence of ``context`` tokens."""
        tokens = context if self.window is None else min(context, self.window)
        return -(-tokens // self.stride)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of one build. ``conv_elements`` and ``recurrent_elements``: a state of fixed size per sequence (linear
    attention, Mamba); ``state_heads``: the heads that tensor parallelism splits it by. ``recurrent_dtype``: what vLLM
    keeps the recurrent state in, empty for the model's own (llama.cpp: float32 for all state)."""

    tensors: tuple[TensorGroup, ...]
    cache: tuple[CacheStream, ...] = ()
    is_moe: bool = False
    conv_elements: int = 0
    recurrent_elements: int = 0
    state_heads: int = 0
    recurrent_dtype: str = ""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: its place, its tensors' prefix on disk ("model.layers.3"), its kind."""

    index: int
    prefix: str
    kind: LayerKind

    @property
    def is_moe(self) -> bool:
        return self.kind.is_moe


@dataclass(frozen=True)
class ModelSpec:
    """The numbers that planning needs. Parameters are counts, shapes are (out, in) as stored.

    ``layers`` is the main model; ``mtp_layers`` the multi-token-prediction layers that the checkpoint stores after it,
    ``mtp_outer`` what they keep outside a decoder layer (duplicated embeddings and heads included), with complete
    names. ``num_experts`` are the routed experts of one layer.
    """

    family: str
    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    dense_intermediate_size: int
    max_context: int
    tied_embeddings: bool
    dtype: str
    expert_count_keys: tuple[str, ...]  # dotted where nested: "text_config.num_experts"
    layers: tuple[LayerSpec, ...]
    outer: tuple[TensorGroup, ...]
    gguf_arch: str | None  # None: llama.cpp does not know it
    mtp_layers: tuple[LayerSpec, ...] = ()
    mtp_outer: tuple[TensorGroup, ...] = ()
    mtp_count_keys: tuple[str, ...] = ()  # where the config counts MTP layers; dotted where nested
    mtp_list_keys: tuple[str, ...] = ()  # its per-layer lists that go on with the MTP layers; dotted where nested
    vision_parameters: int = 0
    gguf_extra: tuple[GgufPart, ...] = ()  # what the converter adds that no tensor on disk becomes
    shared_experts: int = 0
    norm_topk: bool = True
    n_group: int = 1
    topk_group: int = 1
    latent_attention: bool = False  # MLA
    sparse_attention: bool = False  # DSA: needs an engine's sparse kernels
    quantization: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if layer.is_moe)

    def layer_tensors(self, index: int) -> Iterator[TensorSpec]:
        """Every tensor of one main layer."""
        layer = self.layers[index]
        for group in layer.kind.tensors:
            yield from group.expand(f"{layer.prefix}.", self.num_experts, index)

    @property
    def outer_tensors(self) -> tuple[TensorSpec, ...]:
        """Embeddings, final norm and head."""
        return tuple(tensor for group in self.outer for tensor in group.expand("", self.num_experts, None))

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the main model on disk, outer ones first (MTP and vision left out)."""
        yield from self.outer_tensors
        for layer in self.layers:
            yield from self.layer_tensors(layer.index)

    def groups(self, mtp: bool = False) -> tuple[tuple[TensorGroup, int], ...]:
        """Every group with the number of layers that have it; layers of one kind are counted together."""
        return self._groups_with_mtp if mtp else self._groups

    @cached_property
    def _groups(self) -> tuple[tuple[TensorGroup, int], ...]:
        return (*((group, 1) for group in self.outer), *_counted(self.layers))

    @cached_property
    def _groups_with_mtp(self) -> tuple[tuple[TensorGroup, int], ...]:
        return (
            *((group, 1) for group in self.outer),
            *_counted((*self.layers, *self.mtp_layers)),
            *((group, 1) for group in self.mtp_outer),
        )

    @cached_property
    def expert_weights(self) -> int:
        """Weights of one routed expert's linears, over all layers of the main model."""
        return sum(
            group.unit_parameters * count for group, count in self.groups() if group.role == "expert" and group.linears
        )

    @property
    def parameters(self) -> int:
        """Parameters of the main model: no MTP, no vision."""
        return sum(group.parameters(self.num_experts) * count for group, count in self.groups())

    @property
    def mtp_parameters(self) -> int:
        """Parameters of the MTP layers, duplicated embeddings included."""
        groups = [*self.mtp_outer, *(group for layer in self.mtp_layers for group in layer.kind.tensors)]
        return sum(group.parameters(self.num_experts) for group in groups)

    def parameters_by_role(self) -> dict[str, int]:
        """Parameters of the main model by role."""
        counts: dict[str, int] = {}
        for group, count in self.groups():
            counts[group.role] = counts.get(group.role, 0) + group.parameters(self.num_experts) * count
        return counts

    @property
    def active_parameters(self) -> int:
        """What one token multiplies: all but the input embedding, MTP and the experts that were not chosen."""
        roles = self.parameters_by_role()
        # A tied head multiplies the embedding's matrix.
        unused = 0 if self.tied_embeddings else roles.get("embedding", 0)
        return self.parameters - unused - roles["expert"] // self.num_experts * (self.num_experts - self.top_k)

    def fits_groups(self, count: int) -> bool:
        """Whether the router's groups can hold ``count`` experts: as many in each, at least two where there are two now
        (a group is worth its best two), and top-k in those that a token is sent to."""
        each, rest = divmod(count, self.n_group)
        least = min(self.num_experts // self.n_group, 2)
        return self.n_group == 1 or (rest == 0 and each >= least and each * self.topk_group >= self.top_k)

    def with_experts(self, kept: int) -> ModelSpec:
        """The same model with ``kept`` experts in every MoE layer (MTP layers too)."""
        return replace(self, num_experts=kept)


def _counted(layers: tuple[LayerSpec, ...]) -> list[tuple[TensorGroup, int]]:
    counts: dict[int, tuple[LayerKind, int]] = {}
    for layer in layers:
        kind, count = counts.get(id(layer.kind), (layer.kind, 0))
        counts[id(layer.kind)] = (kind, count + 1)
    return [(group, count) for kind, count in counts.values() for group in kind.tensors]
