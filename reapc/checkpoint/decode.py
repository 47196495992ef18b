"""Quantized linears back to float32, exactly: what the numbers on disk mean, before any kernel's own rounding.

(q - zero) * scale of 8 bit integers and a 16 bit scale has no more than 20 bits of mantissa: float32 holds
it exactly. An e4m3 value times a float32 scale is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reapc.checkpoint.packing import Packing

if TYPE_CHECKING:
    import torch


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


def decode(parts: Mapping[str, torch.Tensor], packing: Packing, rows: int, columns: int) -> torch.Tensor:
    """The (rows, columns) float32 weight of a linear from its ``parts`` (tensors on disk by the end of their name)."""
    match packing.method:
        case "gptq" | "auto-round":
            return _gptq(parts, packing, rows, columns)
        case "ct":
            return _compressed_tensors(parts, packing, rows, columns)
        case "fp8-block":
            return _tiles(parts, packing, rows, columns)
        case "fp8" | "int8":
            return parts["weight"].float() * parts["weight_scale"].float()
        case _:
            raise AssertionError(packing.method)  # quantization.py makes no other
