"""What a model is, from its config.json alone: counts and shapes of every tensor, no weights, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

Role = Literal["embedding", "lm_head", "attention", "norm", "router", "expert", "shared_expert", "dense_mlp"]


@dataclass(frozen=True)
class TensorSpec:
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


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. ``kv_elements`` is the K and V elements that one token leaves in the cache."""

    index: int
    is_moe: bool
    kv_heads: int
    head_dim: int
    tensors: tuple[TensorSpec, ...]

    @property
    def kv_elements(self) -> int:
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelSpec:
    """The numbers that planning needs. Parameters are counts, shapes are (out, in) as stored."""

    family: str
    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
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
    expert_count_keys: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    outer_tensors: tuple[TensorSpec, ...]
    gguf_arch: str
    norm_topk: bool = True
    n_group: int = 1
    topk_group: int = 1
    quantization: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers if layer.is_moe)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint, outer ones first."""
        yield from self.outer_tensors
        for layer in self.layers:
            yield from layer.tensors

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors())

    def parameters_by_role(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for tensor in self.tensors():
            counts[tensor.role] = counts.get(tensor.role, 0) + tensor.parameters
        return counts

    def with_experts(self, kept: int) -> ModelSpec:
        """The same model with ``kept`` experts in every MoE layer."""
        layers = tuple(
            replace(
                layer,
                tensors=tuple(
                    replace(t, shape=(kept, *t.shape[1:])) if t.role == "router" else t
                    for t in layer.tensors
                    if t.expert is None or t.expert < kept
                ),
            )
            for layer in self.layers
        )
        return replace(self, num_experts=kept, layers=layers)
