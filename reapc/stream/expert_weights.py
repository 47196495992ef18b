"""Where the experts of a layer lie on disk, and one expert's matrices from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class ExpertReader:
    """An expert's matrices by its number: mapped from the file, fused tensors cut; or, where they are quantized
    (``read_expert`` gives one expert's share of a fused tensor), decoded whenever they are asked for. So a layer costs
    no memory beyond one expert either way. ``read`` refuses NaN, so a mapped tensor is read once and its view kept."""

    def __init__(
        self,
        places: ExpertPlaces,
        prefix: str,
        read: Callable[[str], torch.Tensor],
        read_expert: Callable[[str, int], torch.Tensor] | None = None,
    ) -> None:
        named = [*places.parts.items(), *((f"{key}.bias", stored) for key, stored in places.biases.items())]
        self._parts = [(key, f"{prefix}.{stored.name}", stored) for key, stored in named]
        self._read = read
        self._read_expert = read_expert
        self._mapped: dict[str, torch.Tensor] = {}

    @property
    def mapped(self) -> bool:
        """Whether what ``load`` gives are views of the file."""
        return self._read_expert is None

    def load(self, expert: int) -> Expert:
        """The matrices as they are stored, or decoded."""
        found = {}
        for key, name, stored in self._parts:
            if self._read_expert is None:
                whole = self._view(name.replace("{e}", str(expert)))
                tensor = whole[expert] if stored.fused else whole
            elif stored.fused:
                tensor = self._read_expert(name, expert)
            else:
                tensor = self._read(name.replace("{e}", str(expert)))
            found[key] = tensor.mT if stored.turned else tensor
        return found

    def _view(self, name: str) -> torch.Tensor:
        if name not in self._mapped:
            self._mapped[name] = self._read(name)
        return self._mapped[name]

    def shares(self, expert: int) -> Iterator[tuple[str, int | None]]:
        """The tensors on disk that ``load`` reads: whole ones, or an expert's share of a fused one."""
        for _, name, stored in self._parts:
            yield (name, expert) if stored.fused else (name.replace("{e}", str(expert)), None)
