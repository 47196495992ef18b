"""How a quantized linear lies on disk: what its config says, and the tensors that it must then consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

from reapc.formats.layout import Part, parts
from reapc.formats.weights import FP8_BLOCK, Method, WeightFormat

_FLOATS = ("F32", "F16", "BF16")
_E8M0 = "F8_E8M0"
# Scales of activations: engines read them, weights do not need them.
_OPTIONAL = {"fp8": "input_scale", "nvfp4": "input_scale", "nvfp4-ct": "input_global_scale"}


class Shaped(Protocol):
    """An entry of a safetensors header, as far as it matters here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Packing:
    """The packing of one linear. ``group_size`` weights of a row share a scale (0: the whole row, or with
    ``per_tensor`` the whole linear); a ``zero_offset`` of 1 means that qzeros holds the zero point less one (GPTQ's
    first version, and AutoRound); with ``act_order`` columns belong to groups in any order (g_idx); ``block`` is the
    (rows, columns) of a tile that shares a scale. ``names``: whose names the parts have, where one method has several
    (MXFP4: gpt-oss's unless said; NVFP4: ModelOpt's)."""

    method: Method
    bits: int
    group_size: int = 0
    symmetric: bool = True
    zero_offset: int = 0
    act_order: bool = False
    block: tuple[int, int] = (0, 0)
    block_scale: str = "weight_scale_inv"
    per_tensor: bool = False
    names: Literal["", "ct", "deepseek_v4"] = ""

    @classmethod
    def of(cls, fmt: WeightFormat) -> Packing:
        """What reapc's own writers make of a plain format."""
        if fmt.method in ("gptq", "auto-round"):
            return cls(fmt.method, fmt.bits, fmt.group_size, zero_offset=1)
        if fmt.method == "fp8-block":
            return cls(fmt.method, fmt.bits, block=(FP8_BLOCK, FP8_BLOCK))
        return cls(fmt.method, fmt.bits, fmt.group_size)

    def __str__(self) -> str:
        extras = "" if self.symmetric else ", asymmetric"
        extras += ", act-order" if self.act_order else ""
        extras += ", one scale" if self.per_tensor else ""
        if self.block != (0, 0):
            extras += f", blocks of {self.block[0]} x {self.block[1]}"
        elif self.group_size:
            extras += f", groups of {self.group_size}"
        return f"{self.method} {self.bits} bits{extras}"

    def _format(self) -> WeightFormat:
        return WeightFormat(str(self), self.method, self.bits, self.group_size)

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a (rows, columns) linear cannot be packed so, or None."""
        if self.group_size and columns % self.group_size and not self.act_order:
            return f"rows of {columns} weights do not divide into groups of {self.group_size}"
        if self.method == "ct" and 32 % self.bits and columns % 32:
            return f"rows of {columns} weights of {self.bits} bits: old and new packing cannot be told apart"
        if self.method in ("gptq", "auto-round") and (columns * self.bits % 32 or rows * self.bits % 32):
            return f"a {rows} x {columns} linear does not pack into int32 at {self.bits} bits"
        return None

    def fused_parts(
        self, name: str, stored: tuple[int, ...], entries: Mapping[str, Shaped]
    ) -> dict[str, tuple[str, Part]] | None:
        """What ``entries`` must hold of the experts of a layer, packed as one tensor ``name`` whose plain shape is
        ``stored``: the name of each part by what it is. None where this packing has no such layout, or they do not lie
        so. MXFP4 as gpt-oss: (experts, rows, groups, ...) of a plain (experts, columns, rows). FP8 as Qwen3-VL: tiles
        of the plain tensor (..._scale_inv). FP8 as Llama-4: a scale for each column of it (..._scale)."""
        experts, inner, last = stored
        if self.method == "mxfp4" and not self.names:
            shape = (experts, last, inner // self.group_size)
            blocks = Part("blocks", (*shape, self.group_size // 2), ("U8",))
            return {"blocks": (f"{name}_blocks", blocks), "scales": (f"{name}_scales", Part("scales", shape, ("U8",)))}
        weight = (name, Part("weight", stored, ("F8_E4M3",)))
        if self.method == "fp8-block" and f"{name}_scale_inv" in entries:
            tiles = (experts, -(-inner // self.block[0]), -(-last // self.block[1]))
            scale = Part(self.block_scale, tiles, (*_FLOATS, _E8M0))
            return {"weight": weight, self.block_scale: (f"{name}_scale_inv", scale)}
        found = entries.get(f"{name}_scale")
        if self.method == "fp8" and found is not None:
            scales = found.shape if prod(found.shape) == experts * last else (experts, 1, last)
            return {"weight": weight, "column_scale": (f"{name}_scale", Part("column_scale", scales, _FLOATS))}
        return None

    def parts(self, module: str, rows: int, columns: int, entries: Mapping[str, Shaped]) -> tuple[Part, ...]:
        """What ``entries`` must hold of ``module``, with what published checkpoints do differently from reapc's own:
        scales in any float, GPTQ without g_idx, compressed-tensors' padded words where the shape shows them, and scales
        of activations where there are any."""
        found = [self._published(part, entries.get(f"{module}.{part.suffix}")) for part in self._parts(rows, columns)]
        if self.method == "ct" and (entry := entries.get(f"{module}.weight_packed")) is not None:
            padded = (rows, -(-columns // (32 // self.bits)))
            if entry.shape == padded:
                found[0] = found[0]._replace(shape=padded)
        extra = _OPTIONAL.get(f"{self.method}-{self.names}" if self.names else self.method)
        if extra is not None and (entry := entries.get(f"{module}.{extra}")) is not None:
            found.append(Part(extra, entry.shape if entry.shape in ((), (1,)) else (1,), _FLOATS))
        left_out = not self.act_order and f"{module}.g_idx" not in entries
        return tuple(part for part in found if not (left_out and part.suffix == "g_idx"))

    def _parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The parts before one looks at what is there."""
        groups = columns // self.group_size if self.group_size else 1
        if self.method == "fp8-block":
            tiles = (-(-rows // self.block[0]), -(-columns // self.block[1]))
            dtypes = (*_FLOATS, _E8M0) if self.names else _FLOATS
            return Part("weight", (rows, columns), ("F8_E4M3",)), Part(self.block_scale, tiles, dtypes)
        if self.method == "fp8" and self.per_tensor:
            return Part("weight", (rows, columns), ("F8_E4M3",)), Part("weight_scale", (1,), _FLOATS)
        if self.method == "nvfp4":
            scale = Part("weight_scale", (rows, groups), ("F8_E4M3",))
            if self.names == "ct":
                packed, whole = "weight_packed", "weight_global_scale"
            else:
                packed, whole = "weight", "weight_scale_2"
            return Part(packed, (rows, columns // 2), ("U8",)), scale, Part(whole, (1,), _FLOATS)
        if self.method == "mxfp4" and self.names == "deepseek_v4":
            return Part("weight", (rows, columns // 2), ("I8", "U8")), Part("scale", (rows, groups), (_E8M0, "U8"))
        return parts(self._format(), rows, columns)

    def _published(self, part: Part, entry: Shaped | None) -> Part:
        """A part as the checkpoint has it, within what is allowed."""
        if self.method in ("gptq", "auto-round", "ct", "int8", "fp8") and part.suffix in ("scales", "weight_scale"):
            part = part._replace(dtypes=_FLOATS)
        if part.suffix == "weight_shape":  # Kimi-K2.5 has it in I32
            return part._replace(dtypes=("I64", "I32"))
        if part.shape == (1,) and entry is not None and entry.shape == ():
            return part._replace(shape=())
        return part
