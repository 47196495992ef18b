"""Quantized linears back to float32, exactly: what the numbers on disk mean, before any kernel's own rounding.

(q - zero) * scale of 8 bit integers and a 16 bit scale has no more than 20 bits of mantissa: float32 holds
it exactly. An e4m3 value times a float32 scale is rounded once. MXFP4 becomes bfloat16, which holds it exactly. NVFP4's
scales are e4m3 numbers by a float32: (e4m3 / global) * value in compressed-tensors, e4m3 * global * value in ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from reapc.formats.packing import Packing

if TYPE_CHECKING:
    import torch


# E2M1 by its four bits, the highest of them the sign (OCP Microscaling Formats 1.0, table 5).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` unsigned ``bits``-bit values of every row of int32 ``words`` (rows, words), packed one after
    another from the lowest bit, across words: (rows, count) uint8. 32 values fill exactly ``bits`` words."""
    import torch

    rows, width = words.shape
    if 8 % bits == 0:  # no value crosses a byte, and the lowest byte comes first
        octets = words.contiguous().view(torch.uint8)
        shifts = range(0, 8, bits)
        values = torch.stack([(octets >> shift) & ((1 << bits) - 1) for shift in shifts], -1) if bits < 8 else octets
        return values.reshape(rows, -1)[:, :count]
    periods = -(-width // bits)
    padded = torch.nn.functional.pad(words, (0, periods * bits - width))
    words = (
        padded.reshape(rows * periods, bits).t().contiguous()
    )  # one word's place after another: long runs to work on
    values = torch.empty(32, rows * periods, dtype=torch.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        low = 32 - shift  # bits of the value that lie in its first word
        value = words[word] >> shift
        if low < bits:
            value = (value & ((1 << low) - 1)) | (words[word + 1] << low)
        values[i] = value & ((1 << bits) - 1)
    return values.t().reshape(rows, periods * 32)[:, :count]


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The same where no value crosses a word: 32 // ``bits`` of them in each, from the lowest bit."""
    import torch

    per_word = 32 // bits
    values = torch.empty(*words.shape, per_word, dtype=torch.uint8)
    for i in range(per_word):
        values[:, :, i] = (words >> (i * bits)) & ((1 << bits) - 1)
    return values.reshape(words.shape[0], -1)[:, :count]


def zero_points(parts: Mapping[str, torch.Tensor], packing: Packing) -> torch.Tensor:
    """The zero points of a GPTQ or AutoRound linear, (groups, rows) uint8."""
    groups, rows = parts["scales"].shape
    stored = unpack_stream(parts["qzeros"], packing.bits, rows)
    assert stored.shape == (groups, rows)
    return (stored + packing.zero_offset) & ((1 << packing.bits) - 1) if packing.zero_offset else stored


def _grouped(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int) -> torch.Tensor:
    """(values - zeros) * scales: values (rows, columns), scales and zeros (rows, groups) of equal size."""
    import torch

    rows, columns = values.shape
    groups = scales.shape[1]
    result = values.float().reshape(rows, groups, columns // groups)
    result -= zeros[:, :, None].float() if isinstance(zeros, torch.Tensor) else zeros
    result *= scales.float()[:, :, None]
    return result.reshape(rows, columns)


def _gptq(parts: Mapping[str, torch.Tensor], packing: Packing, rows: int, columns: int) -> torch.Tensor:
    import torch

    values = unpack_stream(parts["qweight"].t().contiguous(), packing.bits, columns)
    scales, zeros = parts["scales"].t(), zero_points(parts, packing).t()
    size = packing.group_size or columns
    order = parts.get("g_idx")
    if order is None or torch.equal(order, (torch.arange(columns) // size).to(order.dtype)):
        return _grouped(values, scales, zeros)
    order = order.long()
    return (values.float() - zeros[:, order].float()) * scales[:, order].float()


def _compressed_tensors(parts: Mapping[str, torch.Tensor], packing: Packing, rows: int, columns: int) -> torch.Tensor:
    words, bits = parts["weight_packed"], packing.bits
    dense = words.shape[1] == -(-columns * bits // 32)
    values = (unpack_stream if dense else unpack_words)(words, bits, columns)
    return _grouped(values, parts["weight_scale"], 1 << (bits - 1))


def _tiles(parts: Mapping[str, torch.Tensor], packing: Packing, rows: int, columns: int) -> torch.Tensor:
    height, width = packing.block
    result = parts["weight"].float()
    scales = parts[packing.block_scale].float().repeat_interleave(width, 1)[:, :columns]
    for i in range(scales.shape[0]):
        result[i * height : (i + 1) * height] *= scales[i]
    return result


@lru_cache(maxsize=4)
def _mxfp4_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """By a byte: the two bfloat16 that its halves mean, low one first, as the bits of one int32; and the bfloat16
    2^(byte - 127) of a scale."""
    import torch

    low = torch.tensor(_E2M1, dtype=torch.bfloat16)
    pairs = torch.stack((low.repeat(16), low.repeat_interleave(16)), dim=1).view(torch.int32)[:, 0]
    # bfloat16 has E8M0's eight bits of exponent, with the same bias of 127, above seven of mantissa
    bits = torch.arange(256, dtype=torch.int16) << 7
    bits[0] = 1 << 6  # 2^-127: the exponent 0 is that of the subnormals, which count in 2^-133
    bits[255] |= 1  # NaN; without it, infinity
    return pairs.to(device), bits.view(torch.bfloat16).to(device)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``blocks`` (..., groups, 16) uint8, two E2M1 values in each byte, and ``scales`` (..., groups) uint8 (E8M0):
    (..., groups * 32) bfloat16, exact, the values of transformers' convert_moe_packed_tensors. A scale of 255 is NaN,
    as the standard has it (OCP Microscaling Formats 1.0, 5.4.1); transformers takes it for 2^128."""
    import torch

    pairs, powers = _mxfp4_tables(blocks.device)
    # index_select: a third of the time that indexing takes
    values = pairs.index_select(0, blocks.int().flatten()).view(torch.bfloat16).view(*scales.shape, 32)
    values *= powers.index_select(0, scales.int().flatten()).view(*scales.shape, 1)
    return values.flatten(-2)


def _mxfp4(parts: Mapping[str, torch.Tensor], packing: Packing) -> torch.Tensor:
    if not packing.names:
        return mxfp4(parts["blocks"], parts["scales"])
    ends = ("weight_packed", "weight_scale") if packing.names == "ct" else ("weight", "scale")
    packed, scales = (_octets(parts[end]) for end in ends)
    return mxfp4(packed.reshape(*scales.shape, 16), scales)


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)


def _nvfp4(parts: Mapping[str, torch.Tensor], packing: Packing) -> torch.Tensor:
    """Two E2M1 values in a byte, the low one first; a scale for 16 of a row."""
    import torch

    ct = packing.names == "ct"
    packed = parts["weight_packed" if ct else "weight"]
    scales = parts["weight_scale"].float()
    whole = parts["weight_global_scale" if ct else "weight_scale_2"].float()
    scales = scales / whole if ct else scales * whole
    table = torch.tensor(_E2M1, device=packed.device)
    values = torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), -1)
    return (values.reshape(*scales.shape, packing.group_size) * scales[..., None]).flatten(-2)


def decode(parts: Mapping[str, torch.Tensor], packing: Packing, rows: int, columns: int) -> torch.Tensor:
    """The (rows, columns) weight of a linear from its ``parts`` (tensors on disk by the end of their name): bfloat16 of
    MXFP4, float32 of all others."""
    match packing.method:
        case "gptq" | "auto-round":
            return _gptq(parts, packing, rows, columns)
        case "ct":
            return _compressed_tensors(parts, packing, rows, columns)
        case "fp8-block":
            return _tiles(parts, packing, rows, columns)
        case "fp8" | "int8":
            scale = parts["column_scale"].reshape(1, -1) if "column_scale" in parts else parts["weight_scale"]
            return parts["weight"].float() * scale.float()
        case "mxfp4":
            return _mxfp4(parts, packing)
        case "nvfp4":
            return _nvfp4(parts, packing)
        case _:
            raise AssertionError(packing.method)  # quantization.py makes no other
