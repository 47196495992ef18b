"""A matrix rounded to the nearest numbers of a format, without calibration: what every writer of it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reapc.formats.weights import FP8_BLOCK, WeightFormat
from reapc.quantize.fp8 import cast_blocks, cast_channels

if TYPE_CHECKING:
    import torch

_SMALLEST = 2.0**-24  # of float16, in which scales are stored


def rounded(weight: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """(rows, columns) in float32 as they come back from ``fmt``, a plain format; rows divide into its groups.

    Integers are symmetric: the element of a group that is furthest from zero becomes -2^(bits - 1) exactly, with a
    scale of either sign (AutoRound's full range). FP8 is the very cast that ``fp8.py`` writes."""
    if fmt.method == "fp8":
        cast, scales = cast_channels(weight)
        return cast.float() * scales
    if fmt.method == "fp8-block":
        cast, scales = cast_blocks(weight)
        rows, columns = weight.shape
        spread = scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
        return cast.float() * spread
    if fmt.method in ("gptq", "auto-round", "ct"):
        return _integers(weight, fmt.bits, fmt.group_size)
    raise ValueError(f"{fmt.name}: nothing here rounds to it")


def _integers(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    import torch

    half = 1 << (bits - 1)
    grouped = weight.float().reshape(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    furthest = torch.where(-low >= high, low, high)
    scales = (furthest / -half).half().float()  # negative where the largest weight is positive
    scales = torch.where(scales.abs() < _SMALLEST, _SMALLEST, scales)
    levels = (grouped / scales).round_().clamp_(-half, half - 1)
    return levels.mul_(scales).reshape(weight.shape)
