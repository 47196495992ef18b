"""How a quantized linear lies on disk: what its config says, and the tensors that it must then consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reapc.checkpoint.safetensors_file import TensorEntry
from reapc.formats.layout import Part, parts
from reapc.formats.weights import FP8_BLOCK, Method, WeightFormat

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packing:
    """The packing of one linear. ``group_size`` weights of a row share a scale (0: the whole row); a ``zero_offset`` of
    1 means that qzeros holds the zero point less one (GPTQ's first version, and AutoRound); with ``act_order`` columns
    belong to groups in any order (g_idx); ``block`` is the (rows, columns) of a tile that shares a scale."""

    method: Method
    bits: int
    group_size: int = 0
    symmetric: bool = True
    zero_offset: int = 0
    act_order: bool = False
    block: tuple[int, int] = (0, 0)
    block_scale: str = "weight_scale_inv"

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

    def fused_parts(self, experts: int, rows: int, columns: int) -> tuple[Part, ...]:
        """What gpt-oss stores of a (rows, columns) linear of ``experts`` in MXFP4; the ends follow an underscore."""
        groups = columns // self.group_size
        return (
            Part("blocks", (experts, rows, groups, self.group_size // 2), ("U8",)),
            Part("scales", (experts, rows, groups), ("U8",)),
        )

    def parts(self, module: str, rows: int, columns: int, entries: Mapping[str, TensorEntry]) -> tuple[Part, ...]:
        """What ``entries`` must hold of ``module``, with what published checkpoints do differently from reapc's own:
        scales in any float, GPTQ without g_idx, and compressed-tensors' padded words where the shape shows them."""
        if self.method == "fp8-block":
            tiles = (-(-rows // self.block[0]), -(-columns // self.block[1]))
            return Part("weight", (rows, columns), ("F8_E4M3",)), Part(self.block_scale, tiles, _FLOATS)
        found = []
        for part in parts(self._format(), rows, columns):
            if part.suffix == "g_idx" and not self.act_order and f"{module}.g_idx" not in entries:
                continue
            if part.suffix in ("scales", "weight_scale"):
                part = part._replace(dtypes=_FLOATS)
            if part.suffix == "weight_packed":
                padded = (rows, -(-columns // (32 // self.bits)))
                entry = entries.get(f"{module}.weight_packed")
                part = part._replace(shape=padded) if entry and entry.shape == padded else part
            found.append(part)
        return tuple(found)
