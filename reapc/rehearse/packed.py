"""Rounds random weights into the packings that models are published in, so that a rehearsal starts from such a one.

To the nearest number, without calibration: what is tried is the layout, not the quality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reapc.checkpoint.packed import PackedLinear
from reapc.formats.layout import Part
from reapc.formats.packing import Packing
from reapc.quantize.fp8 import cast_blocks, cast_channels

if TYPE_CHECKING:
    import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_all(weight: torch.Tensor, linear: PackedLinear) -> dict[str, torch.Tensor]:
    """The parts of a plain tensor, by the keys of ``linear.parts``; experts together or one by one."""
    import torch

    if not linear.experts:
        return encode(weight, linear.packing)
    experts = [one.t() if linear.transposed else one for one in weight]
    if not linear.unfused:
        each = [encode(one, linear.packing) for one in experts]
        return {key: torch.stack([one[key] for one in each]) for key in each[0]}
    found: dict[str, torch.Tensor] = {}
    for number, one in enumerate(experts):
        for index, piece in enumerate(one.split([rows for rows, _ in linear.linears])):
            own = encode(piece, linear.packing)
            found |= {f"{number}.{index}.{key}": value for key, value in own.items()}
    return found


def encode(weight: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    """The parts, by the end of their names, of a (rows, columns) weight; those of ``Packing.parts``."""
    match packing.method:
        case "fp8-block":
            cast, scales = cast_blocks(weight, packing.block[0])
            if packing.names:
                return _powers(weight, scales, packing)
            return {"weight": cast, packing.block_scale: scales}
        case "fp8":
            cast, scales = cast_channels(weight.reshape(1, -1) if packing.per_tensor else weight)
            return {"weight": cast.reshape(weight.shape), "weight_scale": scales}
        case "ct":
            levels, scales = _levels(weight, packing)
            rows, columns = weight.shape
            shape = _tensor([rows, columns])
            return {"weight_packed": _words(levels, packing.bits), "weight_scale": scales, "weight_shape": shape}
        case "gptq" | "auto-round":
            return _gptq(weight, packing)
        case "mxfp4":
            return _mxfp4(weight, packing)
        case "nvfp4":
            return _nvfp4(weight, packing)
        case _:
            raise AssertionError(packing.method)


def _powers(weight: torch.Tensor, scales: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    """The same with scales that are powers of two (E8M0)."""
    import torch

    rows, columns = weight.shape
    powers = torch.exp2(torch.ceil(torch.log2(scales)))
    spread = powers.repeat_interleave(packing.block[0], 0)[:rows].repeat_interleave(packing.block[1], 1)[:, :columns]
    cast = (weight.float() / spread).to(torch.float8_e4m3fn)
    return {"weight": cast, packing.block_scale: powers.to(torch.float8_e8m0fnu)}


def part_dtype(packing: Packing, part: Part) -> str:
    """The safetensors dtype that published checkpoints have a part in."""
    if packing.method == "ct" and part.suffix == "weight_scale":
        return "BF16"
    if packing.method == "fp8-block" and packing.names and part.suffix == packing.block_scale:
        return "F8_E8M0"
    return "F16" if part.suffix == "scales" and "F16" in part.dtypes else part.dtypes[0]


def _tensor(values: list[int]) -> torch.Tensor:
    import torch

    return torch.tensor(values)


def _levels(weight: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned levels (rows, columns), the middle one meaning zero, and the scale of each group (rows, groups)."""
    import torch

    rows, columns = weight.shape
    half = 1 << (packing.bits - 1)
    grouped = weight.float().reshape(rows, -1, packing.group_size or columns)
    scales = (grouped.abs().amax(-1) / (half - 1)).clamp(min=2**-24).to(torch.bfloat16)
    levels = (grouped / scales.float()[..., None]).round().clamp(-half, half - 1) + half
    return levels.reshape(rows, columns).to(torch.int64), scales


def _words(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) levels as int32 (rows, columns * bits / 32), the lowest bits first; ``bits`` divide 32."""
    import torch

    parts = levels.reshape(len(levels), -1, 32 // bits)
    shifts = torch.arange(0, 32, bits)
    words = (parts << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _gptq(weight: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    import torch

    levels, scales = _levels(weight, packing)
    zeros = torch.full(scales.t().shape, (1 << (packing.bits - 1)) - packing.zero_offset)
    found = {
        "qweight": _words(levels, packing.bits).t().contiguous(),
        "qzeros": _words(zeros, packing.bits),
        "scales": scales.t().contiguous().half(),
    }
    if packing.method == "gptq":
        found["g_idx"] = (torch.arange(weight.shape[1]) // (packing.group_size or weight.shape[1])).to(torch.int32)
    return found


def _nearest(values: torch.Tensor) -> torch.Tensor:
    """The four bits (uint8) of the E2M1 number nearest to each value."""
    import torch

    table = torch.tensor(_E2M1)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values.abs().contiguous(), middles).to(torch.uint8) | (values < 0).to(torch.uint8) << 3


def _pairs(bits: torch.Tensor) -> torch.Tensor:
    """Two values to a byte, the first one low."""
    return bits[..., ::2] | bits[..., 1::2] << 4


def _mxfp4(weight: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    """A scale for 32 of a row: gpt-oss's blocks (rows, groups, 16) and scales, or as others name them."""
    import torch

    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, columns // 32, 32)
    exponents = torch.floor(torch.log2(grouped.abs().amax(-1).clamp(min=2**-100))) - 2
    blocks = _pairs(_nearest(grouped / torch.exp2(exponents)[..., None]))
    scales = (exponents + 127).to(torch.uint8)
    if not packing.names:
        return {"blocks": blocks, "scales": scales}
    if packing.names == "ct":
        return {"weight_packed": blocks.flatten(1), "weight_scale": scales}
    return {"weight": blocks.flatten(1).view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}


def _nvfp4(weight: torch.Tensor, packing: Packing) -> dict[str, torch.Tensor]:
    """A scale in e4m3 for 16 of a row, and one for the whole; the activations' is 1."""
    import torch

    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, columns // 16, 16)
    whole = grouped.abs().amax().clamp(min=2**-20) / (6 * 448)
    scales = (grouped.abs().amax(-1) / 6 / whole).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    packed = _pairs(_nearest(grouped / (scales.float() * whole)[..., None])).flatten(1)
    if packing.names == "ct":
        return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (1 / whole).reshape(1)}
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole.reshape(1)}
