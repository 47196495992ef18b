"""Where the experts of a layer lie on disk, and one expert's matrices from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reapc.arch.spec import LayerKind
from reapc.errors import CannotBeDone

if TYPE_CHECKING:
    import torch

# llama.cpp's names of the parts; each is a weight and may have a bias.
_PARTS = {
    "ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down", "ffn_gate_up_exps": "gate_up",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor on disk, its name after the layer's prefix: an expert's own (``{e}`` in the name), or that of all
    experts on the first axis. ``turned``: (in, out) and not (out, in)."""

    name: str
    turned: bool = False

    @property
    def fused(self) -> bool:
        return "{e}" not in self.name


@dataclass(frozen=True)
class ExpertPlaces:
    """``parts``: "gate" and "up" or "gate_up" (both, in the order of the class), "down"; a family without a gate has no
    "gate". ``biases`` by the same names. ``inputs``, ``width``: what an expert takes, and what its down takes."""

    parts: dict[str, Stored]
    biases: dict[str, Stored]
    inputs: int
    width: int

    @property
    def path(self) -> str:
        """What the names of all weights begin with ("mlp.experts.")."""
        names = [stored.name for stored in self.parts.values()]
        end = next(i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1)
        return names[0][:end].split("{e}")[0]


def expert_places(kind: LayerKind, transposed: bool = False) -> ExpertPlaces:
    """Where the experts of a layer lie; CannotBeDone where that is not understood."""
    parts: dict[str, Stored] = {}
    biases: dict[str, Stored] = {}
    inputs = width = 0
    for group in kind.tensors:
        if group.role != "expert":
            continue
        names = {_PARTS.get(part.name.rsplit(".", 1)[0], "") for part in group.gguf}
        what = "gate_up" if names == {"gate", "up"} else names.pop() if len(names) == 1 else ""
        known = what and (group.expert_axis == 0 or "{e}" in group.name)
        if not known or not group.per_expert:
            raise CannotBeDone(f"experts stored as {group.name} cannot be observed in this version")
        turned = transposed and group.expert_axis is not None and bool(group.linears)
        (parts if group.linears else biases)[what] = Stored(group.name, turned)
        if group.linears and what == "down":
            width = group.linears[0][1]
        elif group.linears:
            inputs = group.linears[0][1]
    if "down" not in parts or not ({"gate_up"} == parts.keys() - {"down"} or "up" in parts):
        raise CannotBeDone(f"experts stored as {sorted(parts)} cannot be observed in this version")
    return ExpertPlaces(parts, biases, inputs, width)


Expert = dict[str, "torch.Tensor"]  # part -> (out, in), or "part.bias" -> (out,)


def load_experts(
    places: ExpertPlaces,
    prefix: str,
    experts: int,
    read: Callable[[str], torch.Tensor],
    read_expert: Callable[[str, int], torch.Tensor] | None = None,
) -> Callable[[int], Expert]:
    """An expert's matrices by its number: mapped from the file, fused tensors read once and cut; or, where they are
    quantized (``read_expert`` gives one expert's share of a fused tensor), decoded whenever they are needed. So a layer
    costs no memory beyond one expert either way."""
    named = [*((key, stored) for key, stored in places.parts.items())]
    named += [(f"{key}.bias", stored) for key, stored in places.biases.items()]
    fused: dict[str, torch.Tensor] = {}
    if read_expert is None:
        fused = {stored.name: read(f"{prefix}.{stored.name}") for _, stored in named if stored.fused}

    def load(expert: int) -> Expert:
        found = {}
        for key, stored in named:
            if stored.fused and read_expert is not None:
                tensor = read_expert(f"{prefix}.{stored.name}", expert)
            elif stored.fused:
                tensor = fused[stored.name][expert]
            else:
                tensor = read(f"{prefix}.{stored.name.replace('{e}', str(expert))}")
            found[key] = tensor.mT if stored.turned else tensor
        return found

    if read_expert is not None:
        return load
    return [load(expert) for expert in range(experts)].__getitem__
