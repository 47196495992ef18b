"""Bytes of safetensors checkpoints: plain dtypes, FP8, GPTQ/AutoRound and compressed-tensors packing.

Exact tensor data, without the JSON headers. Layouts as vLLM 0.33 and the quantizers write them
(facts/vllm-legality.md, facts/quantizers.md); what is not a decoder linear stays in bf16.
"""

from __future__ import annotations

from collections.abc import Callable

from reapc.arch import ModelSpec, TensorSpec
from reapc.errors import ReapcError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
UNQUANTIZED = "bf16"
QUANTIZED_ROLES = ("attention", "expert", "shared_expert", "dense_mlp")


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element; ReapcError for a dtype that is not known."""
    if dtype not in DTYPE_BYTES:
        raise ReapcError(f"unknown dtype {dtype!r}", hint=f"known: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def checkpoint_bytes(spec: ModelSpec, dtype: str = "bfloat16") -> int:
    """Tensor bytes of the whole checkpoint in one dtype."""
    return spec.parameters * dtype_bytes(dtype)


def _groups(columns: int, group_size: int) -> int:
    if group_size == -1:
        return 1
    if columns % group_size:
        raise ReapcError(f"a row of {columns} weights does not divide into groups of {group_size}")
    return columns // group_size


def gptq_linear_bytes(rows: int, columns: int, bits: int, group_size: int, *, g_idx: bool) -> int:
    """qweight int32 (in*bits/32, out), scales fp16 (groups, out), qzeros int32 (groups, out*bits/32), g_idx (in)."""
    if columns * bits % 32 or rows * bits % 32:
        raise ReapcError(f"a {rows} x {columns} linear does not pack into int32 at {bits} bits")
    groups = _groups(columns, group_size)
    packed = columns * bits // 32 * rows * 4
    return packed + groups * rows * 2 + groups * (rows * bits // 32) * 4 + (columns * 4 if g_idx else 0)


def compressed_tensors_linear_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """weight_packed int32 (out, ceil(in / (32 // bits))), weight_scale 16 bit (out, groups), weight_shape 2 x int64."""
    per_word = 32 // bits
    return -(-columns // per_word) * rows * 4 + rows * _groups(columns, group_size) * 2 + 16


def fp8_linear_bytes(rows: int, columns: int, block: int = 128) -> int:
    """weight e4m3 and weight_scale_inv float32 per ``block`` x ``block`` tile."""
    return rows * columns + -(-rows // block) * -(-columns // block) * 4


def _sum(spec: ModelSpec, linear: Callable[[int, int], int]) -> int:
    cache: dict[tuple[int, ...], int] = {}

    def bytes_of(tensor: TensorSpec) -> int:
        if tensor.role not in QUANTIZED_ROLES or len(tensor.shape) != 2:
            return tensor.parameters * 2
        if tensor.shape not in cache:
            cache[tensor.shape] = linear(*tensor.shape)
        return cache[tensor.shape]

    return sum(bytes_of(tensor) for tensor in spec.tensors())


def gptq_bytes(spec: ModelSpec, bits: int, group_size: int) -> int:
    """A GPTQ checkpoint; router, embeddings, norms and lm_head in 16 bits."""
    return _sum(spec, lambda rows, columns: gptq_linear_bytes(rows, columns, bits, group_size, g_idx=True))


def auto_round_bytes(spec: ModelSpec, bits: int, group_size: int) -> int:
    """An AutoRound checkpoint in its auto_gptq packing: as GPTQ, without g_idx."""
    return _sum(spec, lambda rows, columns: gptq_linear_bytes(rows, columns, bits, group_size, g_idx=False))


def compressed_tensors_bytes(spec: ModelSpec, bits: int, group_size: int) -> int:
    """A compressed-tensors checkpoint, pack-quantized, symmetric."""
    return _sum(spec, lambda rows, columns: compressed_tensors_linear_bytes(rows, columns, bits, group_size))


def fp8_bytes(spec: ModelSpec, block: int = 128) -> int:
    """A block-FP8 checkpoint (the layout of Qwen3-30B-A3B-FP8)."""
    return _sum(spec, lambda rows, columns: fp8_linear_bytes(rows, columns, block))
