"""A weight back into the packing of the linear that it came from: FP8 with scales computed anew, integers on the grid
that the linear has (its scales, zero points and order of columns stay)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reapc.checkpoint.decode import zero_points
from reapc.errors import CannotBeDone
from reapc.formats.packing import Packing
from reapc.quantize.feedback import nearest, with_feedback
from reapc.quantize.fp8 import LARGEST, to_e4m3

Parts = dict[str, torch.Tensor]  # tensors on disk by the end of their names
INTEGERS = ("gptq", "auto-round", "ct", "int8")


def check_packing(packing: Packing, where: str) -> None:
    """CannotBeDone for a packing that is read here, and not written."""
    if packing.method not in ("fp8-block", "fp8", *INTEGERS):
        raise CannotBeDone(
            f"{where}: its experts' down projections are in {packing}, which refitted weights are not rounded to in "
            "this version",
            hint="FP8 and integer formats (GPTQ, AutoRound, compressed-tensors) can be healed, and 16 bit",
        )


def encode(
    weight: torch.Tensor, packing: Packing, own: Mapping[str, torch.Tensor], inverse: torch.Tensor | None = None
) -> Parts:
    """The parts of ``own`` (those of the linear as it is) that change, for ``weight`` (rows, columns) float32.

    ``inverse`` (columns, columns): of the damped Gram of what the linear is given (feedback.py), where integers are to
    be rounded with error feedback; without it to the nearest."""
    match packing.method:
        case "fp8-block":
            return _tiles(weight, packing, own)
        case "fp8":
            return _fp8(weight, packing, own)
        case "int8":
            levels = _levels(weight, own["weight_scale"].float(), torch.tensor(128.0), 8, inverse)
            return {"weight": (levels.to(torch.int16) - 128).to(torch.int8)}
        case "ct":
            zero = torch.tensor(float(1 << (packing.bits - 1)))
            values = _levels(weight, _by_column(own["weight_scale"].float(), weight), zero, packing.bits, inverse)
            words = own["weight_packed"]
            dense = words.shape[1] == -(-weight.shape[1] * packing.bits // 32)
            return {"weight_packed": (pack_stream if dense else pack_words)(values, packing.bits)}
        case "gptq" | "auto-round":
            return {"qweight": pack_stream(_gptq(weight, packing, own, inverse), packing.bits).t().contiguous()}
        case _:
            raise AssertionError(packing.method)  # check_packing lets no other through


def _tiles(weight: torch.Tensor, packing: Packing, own: Mapping[str, torch.Tensor]) -> Parts:
    height, width = packing.block
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scales = _scales(tiles.abs().amax(dim=(1, 3)), own[packing.block_scale])
    scaled = (tiles / scales.float()[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return {"weight": to_e4m3(scaled), packing.block_scale: scales}


def _fp8(weight: torch.Tensor, packing: Packing, own: Mapping[str, torch.Tensor]) -> Parts:
    name, axes = "weight_scale", (0, 1) if packing.per_tensor else (1,)
    if "column_scale" in own:
        name, axes = "column_scale", (0,)
    stored = own[name]
    scales = _scales(weight.abs().amax(dim=axes, keepdim=True).reshape(stored.shape), stored)
    factors = scales.float().reshape(1, -1) if name == "column_scale" else scales.float()
    return {"weight": to_e4m3(weight / factors), name: scales}


def _scales(largest: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """largest / 448 in the dtype of the scales that are there, 1 where all is 0. Where that dtype has rounded it down,
    the largest weights become 448 steps."""
    found = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    if own.dtype == torch.float8_e8m0fnu:  # powers of two: the next one that reaches
        found = torch.exp2(torch.ceil(torch.log2(found)))
    return found.to(own.dtype)


def _gptq(
    weight: torch.Tensor, packing: Packing, own: Mapping[str, torch.Tensor], inverse: torch.Tensor | None
) -> torch.Tensor:
    scales, zeros = own["scales"].t().float(), zero_points(own, packing).t().float()
    order = own.get("g_idx")
    if order is None:
        scales, zeros = _by_column(scales, weight), _by_column(zeros, weight)
    else:
        scales, zeros = scales[:, order.long()], zeros[:, order.long()]
    return _levels(weight, scales, zeros, packing.bits, inverse)


def _by_column(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(rows, groups) of equal size as (rows, columns)."""
    return groups.repeat_interleave(weight.shape[1] // groups.shape[1], 1)


def _levels(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, inverse: torch.Tensor | None
) -> torch.Tensor:
    if inverse is None:
        return nearest(weight, scales, zeros, bits)
    return with_feedback(weight, scales, zeros, bits, inverse)


def pack_stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The int32 words (rows, ceil(columns x bits / 32)) whose ``decode.unpack_stream`` are ``values`` (rows, columns)
    uint8."""
    rows, columns = values.shape
    places = torch.arange(bits, dtype=torch.uint8)
    stream = ((values[:, :, None] >> places) & 1).reshape(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, -columns * bits % 32)).reshape(rows, -1, 8)
    octets = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The same for ``decode.unpack_words``: 32 // ``bits`` values in each word, its upper bits left empty."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
    parts = padded.reshape(len(values), -1, each).to(torch.int64) << (torch.arange(each) * bits)
    return parts.sum(-1).to(torch.uint32).view(torch.int32)
