"""What a GGUF file lets one choose: groups of tensors that share a type, the types, and their exact bytes.

Rules of llama.cpp 0c1e57098: what llama-quantize never touches stays as the converter wrote it, a row that blocks do
not divide gets the fallback type, and some types need an importance matrix, which embeddings and output have none of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.arch.spec import GgufPart
from reapc.errors import ReapcError
from reapc.formats import gguf
from reapc.formats.gguf_rules import EMBEDDINGS, converted_type, quantizes
from reapc.formats.gguf_types import TYPES, fallback, padded
from reapc.planner import prior
from reapc.planner.search import loss_method
from reapc.schema import nearest

# ggml's types that llama-quantize writes at will and every backend computes with, by falling size.
LADDER = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M",
)  # fmt: skip
# tensor_requires_imatrix in src/llama-quant.cpp, and what ggml itself cannot do without weights for the columns
WEIGHTED = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
PARTS = ("experts_gate_up", "experts_down", "attention", "shared", "dense", "embedding", "output", "other")


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. ``shape`` without the experts' axis, which it has where ``experts``; row last."""

    name: str
    shape: tuple[int, ...]
    experts: bool
    before: int = 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def data_bytes(self, kind: str, count: int) -> int:
        """Bytes as ``kind`` (a type that divides the row) with ``count`` experts."""
        storage = TYPES[kind]
        elements = prod(self.shape) * (count * self.before if self.experts else 1)
        return elements // storage.block * storage.block_bytes


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one layer (-1: outside) that get the same type. ``types``: what may be asked for."""

    name: str
    layer: int
    part: str
    tensors: tuple[FileTensor, ...]
    types: tuple[str, ...]

    def stored(self, kind: str) -> dict[str, str]:
        """The type that each tensor gets where ``kind`` is asked for."""
        return {tensor.name: fallback(kind, tensor.columns) for tensor in self.tensors}

    def data_bytes(self, kind: str, count: int) -> int:
        """Bytes in the file, each tensor padded to 32 bytes."""
        return sum(padded(t.data_bytes(fallback(kind, t.columns), count)) for t in self.tensors)

    def weights(self, experts: int) -> int:
        """How many weights it has."""
        return sum(prod(t.shape) * (experts if t.experts else 1) for t in self.tensors)

    def bits(self, kind: str) -> float:
        """Bits per weight of a type, where rows admit it."""
        return TYPES[kind].bits_per_weight

    def prior_loss(self, kind: str) -> float:
        """The prior's KL of a whole model in the type that the group is stored in, mean over its tensors' weights."""
        total = elements = 0.0
        for tensor in self.tensors:
            stored = fallback(kind, tensor.columns)
            size = prod(tensor.shape)
            total += size * prior.quantization_loss(loss_method("llama.cpp", stored), TYPES[stored].bits_per_weight)
            elements += size
        return total / elements


@dataclass(frozen=True)
class FileParts:
    """``groups``: what can be chosen; ``kept``: tensors that stay as converted, with their types."""

    groups: tuple[TensorGroup, ...]
    kept: tuple[tuple[FileTensor, str], ...]

    def kept_bytes(self, count: int, layer: int | None = None) -> int:
        """Bytes of the tensors that stay as converted, of one layer (-1: outside) or of all."""
        return sum(
            padded(tensor.data_bytes(kind, count))
            for tensor, kind in self.kept
            if layer is None or gguf.part_layer(tensor.name)[0] == layer
        )

    def table(self, counts: Sequence[int], types: Sequence[str]) -> NDArray[np.int64]:
        """Bytes (counts, groups, types); 0 where a type is not legal for a group."""
        result = np.zeros((len(counts), len(self.groups), len(types)), np.int64)
        memo: dict[tuple[object, ...], list[int]] = {}
        for g, group in enumerate(self.groups):
            shapes = tuple((t.shape, t.experts, t.before) for t in group.tensors)
            for k, kind in enumerate(types):
                if kind not in group.types:
                    continue
                key = (shapes, kind)
                if key not in memo:
                    memo[key] = [group.data_bytes(kind, count) for count in counts]
                result[:, g, k] = memo[key]
        return result

    def bytes_of(self, types: Mapping[str, str], count: int) -> int:
        """Bytes of the tensor data of a file whose groups have these types."""
        return self.kept_bytes(count) + sum(group.data_bytes(types[group.name], count) for group in self.groups)


def part_of(name: str) -> str:
    """The class of a tensor by its name in the file: one of ``PARTS``."""
    short = gguf.part_layer(name)[1]
    if short in EMBEDDINGS:
        return "embedding"
    if short == "output.weight":
        return "output"
    if gguf.is_routed(f".{short}"):
        return "experts_down" if "_down_" in short else "experts_gate_up"
    if "_shexp" in short:
        return "shared"
    if short.startswith(("attn_", "ssm_", "indexer")):
        return "attention"
    return "dense" if short.startswith("ffn_") else "other"


def _group_name(layer: int, name: str, part: str) -> str:
    """Groups: experts' matrices each for itself, attention's values and output apart from the rest, the down
    projections of shared experts and dense layers apart from gate and up."""
    short = gguf.part_layer(name)[1].removesuffix(".weight")
    if part.startswith("experts") or part in ("embedding", "output", "other"):
        own = short
    elif part == "attention":
        value = short in ("attn_v", "attn_v_b", "attn_kv_b", "attn_qkv")
        own = "attn_v" if value else "attn_output" if short.startswith(("attn_output", "ssm_out")) else "attn"
    else:
        own = f"{part}_{'down' if 'down' in short else 'gate_up'}"
    return own if layer < 0 else f"blk.{layer}.{own}"


def file_parts(spec: ModelSpec, types: Sequence[str] = LADDER, has_imatrix: bool = True) -> FileParts:
    """The tensors of the GGUF of ``spec`` (MTP layers left out), whatever the expert count.

    ``types``: names of ggml types that may be asked for. ReapcError for one that is not in ``LADDER``; CannotBeDone
    where llama.cpp does not know the model."""
    for kind in types:
        if kind not in LADDER:
            raise ReapcError(f"no type {kind!r} to allocate", hint=f"{nearest(kind, LADDER)}known: {', '.join(LADDER)}")
    arch, native = gguf.architecture(spec), gguf.native_expert_type(spec)
    found: dict[str, tuple[int, str, list[FileTensor]]] = {}
    kept: list[tuple[FileTensor, str]] = []

    def add(layer: int, name: str, part: GgufPart) -> None:
        shape = part.with_axes(spec.num_experts)
        tensor = FileTensor(name, part.shape, part.experts, prod(part.before))
        routed = gguf.is_routed(name)
        if not quantizes(arch, name, shape) or (routed and native):
            plain = (native if routed else None) or "BF16"
            kept.append((tensor, converted_type(arch, name, shape, plain)))
            return
        kind = part_of(name)
        found.setdefault(_group_name(layer, name, kind), (layer, kind, []))[2].append(tensor)

    for part in gguf.outer_parts(spec):
        add(gguf.part_layer(part.name)[0], part.name, part)
    for index, kinds in enumerate(gguf.blocks(spec)):
        for part in gguf.block_parts(kinds):
            add(index, f"blk.{index}.{part.name}", part)
    groups = []
    for name, (layer, part_name, tensors) in found.items():
        weighted = has_imatrix and part_name not in ("embedding", "output")
        legal = tuple(kind for kind in types if weighted or not _needs_weights(kind, tensors))
        if not legal:
            raise ReapcError(
                f"{name}: none of {', '.join(types)} can be written without an importance matrix",
                hint="embeddings and output have none: allow Q2_K or a larger type",
            )
        groups.append(TensorGroup(name, layer, part_name, tuple(tensors), legal))
    return FileParts(tuple(groups), tuple(kept))


def _needs_weights(kind: str, tensors: list[FileTensor]) -> bool:
    return any(fallback(kind, tensor.columns) in WEIGHTED for tensor in tensors)
