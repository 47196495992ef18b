"""What one rank of a parallel layout holds of a checkpoint's tensors, in bytes, as vLLM 0.33 cuts them
(facts/vllm-legality.md)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from reapc.arch.spec import DTYPE_BYTES, TensorGroup
from reapc.formats.weights import WeightFormat, stored_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's bytes of a layer: ``fixed + per_expert * experts held``."""

    fixed: int
    per_expert: int


def _split(group: TensorGroup, shape: tuple[int, int], tp: int, expert_tp: int, kv_heads: int) -> tuple[int, int]:
    """The (rows, columns) of a linear that one rank holds."""
    rows, columns = shape
    match group.parallel:
        case "column":
            return ceil(rows / tp), columns
        case "row":
            return rows, ceil(columns / tp)
        case "kv":
            return rows // kv_heads * max(1, kv_heads // tp), columns
        case "expert":
            return ceil(rows / expert_tp), columns
        case "expert_row":
            return rows, ceil(columns / expert_tp)
    return shape


def shard(
    fmt: WeightFormat, group: TensorGroup, tp: int, ep: int, kv_heads: int, layer: int | None = None,
    vocab_pad: int = 64,
) -> Shard:  # fmt: skip
    """What one tensor-parallel rank holds of a tensor. With ``ep`` > 1 experts stay whole and are dealt out."""
    expert_tp = 1 if ep > 1 else tp
    if stored := fmt.at(group, layer):
        unit = sum(stored.shard_bytes(*_split(group, shape, tp, expert_tp, kv_heads)) for shape in group.linears)
    elif group.linears:
        element = DTYPE_BYTES[group.dtype] if group.dtype else 2
        unit = sum(prod(_split(group, shape, tp, expert_tp, kv_heads)) for shape in group.linears) * element
    elif group.parallel == "vocab":
        rows = ceil(group.shape[0] / vocab_pad) * vocab_pad
        unit = ceil(rows / tp) * prod(group.shape[1:]) * 2
    else:
        size = stored_bytes(group)
        if group.parallel == "kv":
            unit = size // kv_heads * max(1, kv_heads // tp)
        elif group.parallel in ("column", "row"):
            unit = ceil(size / tp)
        elif group.parallel in ("expert", "expert_row"):
            unit = ceil(size / expert_tp)
        else:
            unit = size
    return Shard(0, unit) if group.per_expert else Shard(unit, 0)
