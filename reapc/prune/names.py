"""What becomes of a tensor by its name: an expert's own, one with an axis of experts, a table of experts, an MTP one.

All of it is told by the ModelSpec's groups. A quantized checkpoint holds several tensors in place of each; the ends of
their names are known by method, and what is not known is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerSpec
from reapc.errors import CannotBeDone

# Ends of the names of a linear's parts, by quant_method ("weight" also where it is left alone); a bias is beside them.
PARTS: dict[str, tuple[str, ...]] = {
    "fp8": ("weight", "weight_scale_inv", "weight_scale", "scale", "input_scale"),  # "scale": DeepSeek-V4
    "compressed-tensors": (
        "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
        "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
    ),
    "gptq": ("weight", "qweight", "qzeros", "scales", "g_idx"),
    "auto-round": ("weight", "qweight", "qzeros", "scales", "g_idx"),
    "mxfp4": ("weight",),
    "fbgemm_fp8": ("weight", "weight_scale", "input_scale"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}  # fmt: skip
# What follows the name of a tensor that holds all experts, each part with the experts on its first axis.
FUSED_PARTS = ("_blocks", "_scales", "_scale_inv", "_scale", "_packed")


class Place(NamedTuple):
    """Where a tensor's experts are. ``kind`` "one": it is one expert's, number ``expert``, its name ``before`` +
    number + ``behind``. "axis": its axis ``axis`` is the experts'. "table": its values are experts' numbers.
    ``exact``: it has the name that the ModelSpec gives."""

    kind: Literal["one", "axis", "table"]
    layer: int
    before: str = ""
    expert: int = 0
    behind: str = ""
    axis: int = 0
    exact: bool = True


def moe_layers(spec: ModelSpec, mtp: bool) -> tuple[LayerSpec, ...]:
    """The layers with experts; with ``mtp`` the MTP layers among them too."""
    return tuple(layer for layer in (*spec.layers, *(spec.mtp_layers if mtp else ())) if layer.is_moe)


class Names:
    """Places of tensors. ``mtp``: MTP layers are pruned like the others, rather than left out."""

    def __init__(self, spec: ModelSpec, mtp: bool) -> None:
        self.spec = spec
        self._experts: dict[str, int] = {}  # "model.layers.3.mlp.experts." -> 3
        self._whole: dict[str, Place] = {}
        for layer in moe_layers(spec, mtp):
            for group in layer.kind.tensors:
                name = f"{layer.prefix}.{group.name}"
                if "{e}" in group.name:
                    self._experts[name.split("{e}")[0]] = layer.index
                elif group.names_experts:
                    self._whole[name] = Place("table", layer.index)
                elif group.expert_axis is not None:
                    self._whole[name] = Place("axis", layer.index, axis=group.expert_axis)
                    if group.role == "expert":  # quantizers unfuse them
                        self._experts[f"{name.removesuffix('.weight').rpartition('.')[0]}."] = layer.index
        self._mtp: tuple[str, ...] = ()
        if not mtp:
            self._mtp = tuple(f"{layer.prefix}." for layer in spec.mtp_layers)
            self._mtp += tuple(f"{group.name.rsplit('.', 1)[0]}." for group in spec.mtp_outer)
        self.words = {prefix.rstrip(".").rpartition(".")[2] for prefix in self._experts}  # "experts"

    def is_dropped(self, name: str) -> bool:
        """Whether the tensor belongs to an MTP layer that is left out."""
        return name.startswith(self._mtp)

    def place(self, name: str) -> Place | None:
        """Where the tensor's experts are; None where it has none, and stays as it is."""
        if whole := self._whole.get(name):
            return whole
        for digits in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            before = name[: digits.start()]
            layer = self._experts.get(before)
            if layer is not None:
                return Place("one", layer, before, int(digits[0]), name[digits.end() :])
        for end in FUSED_PARTS:
            whole = self._whole.get(name.removesuffix(end)) if name.endswith(end) else None
            if whole and whole.kind == "axis":
                return whole._replace(exact=False)
        return None


def known_parts(method: str | None, where: str) -> tuple[str, ...]:
    """Ends of the names that an expert's tensors may have; CannotBeDone for a method that is not known."""
    if method is None:
        return ("weight", "bias")
    if method not in PARTS:
        raise CannotBeDone(
            f"{where}: quantization_config: quant_method = {method!r}: this version prunes {', '.join(PARTS)}",
            hint="take its 16 bit original",
        )
    return (*PARTS[method], "bias")


def is_complete(parts: Iterable[str]) -> bool:
    """Whether these ends of names are all that a linear needs: a plain weight, or a packed one with its scales."""
    found = set(parts)
    return "weight" in found or ("weight_packed" in found and "weight_scale" in found) or {"qweight", "scales"} <= found
