"""What rounding and pruning cost at the end of a checkpoint, without writing any: the original and every variant side
by side in one streamed pass, a variant's tensors rounded to nearest as they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reapc.arch import TensorSpec
from reapc.checkpoint.atomic import make_folder, remove, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.finalists import Variant, figures_of
from reapc.choice.pruned_layer import PrunedLayers
from reapc.formats.weights import WeightFormat
from reapc.planner.checkpoint_units import KEPT, CheckpointParts, Unit, stored_as
from reapc.planner.damages import Group, nearest_to
from reapc.progress import Progress
from reapc.quantize.nearest import rounded
from reapc.stream.model import LoadedLayer, StreamedModel
from reapc.stream.tokens import Tokens

PROBE_BITS = 4.0  # what a class is rounded to: near what is chosen, so that damage grows in proportion
_AT_ONCE = 12  # variants beside the original in one pass
Mix = tuple[Mapping[str, str], Mapping[int, Sequence[int]] | None]  # options by unit, and the experts kept


class RoundedCheckpoint(Checkpoint):
    """A checkpoint that was opened, some of whose tensors are given rounded: ``formats`` by name."""

    def __init__(self, checkpoint: Checkpoint, formats: Mapping[str, WeightFormat]) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self.formats = formats

    @property
    def decodes(self) -> bool:
        """True: a tensor is made anew whenever it is asked for."""
        return True

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, rounded where it has a format."""
        weight, fmt = super().tensor(name), self.formats.get(name)
        return weight if fmt is None else rounded(weight, fmt)

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype of what ``tensor(name)`` gives."""
        return "F32" if name in self.formats else super().dtype_of(name)


class StreamedProber:
    """Measures mixes of ``parts`` on ``tokens``. Finished ones lie in ``work`` as JSON, so that an interrupted run goes
    on. ``values``: by layer what each expert is worth, for families whose routers hold tables of experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: CheckpointParts,
        tokens: Tokens,
        work: Path,
        progress: Progress,
        *,
        dissolve: bool = False,
        values: Mapping[int, NDArray[np.float64]] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.checkpoint, self.parts, self.tokens, self.progress = checkpoint, parts, tokens, progress
        self.dissolve, self.values, self.dtype, self.device = dissolve, values, dtype, device
        key = json.dumps([checkpoint.digest, tokens.digest, str(dtype), dissolve])
        self.work = work / f"streamed-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        make_folder(self.work)

    def probed(self, group: Group) -> str:
        """The option that a probe rounds a unit to."""
        kinds = [kind for kind in group.types if kind != KEPT]
        return nearest_to(group, kinds, PROBE_BITS) if kinds else KEPT

    def mix(self, groups: Sequence[Group], probed: Container[str]) -> dict[str, str]:
        """Options by unit of a model in which the units ``probed`` are rounded and the rest stays as it is."""
        return {group.name: self.probed(group) if group.name in probed else KEPT for group in groups}

    def kl(self, name: str, types: Mapping[str, str], kept: Mapping[int, Sequence[int]] | None) -> float:
        """KL in nats of such a model to the original; measured once for each mix."""
        return self.kls({name: (types, kept)})[name]

    def kls(self, mixes: Mapping[str, Mix]) -> dict[str, float]:
        """The same of several, as many as possible in one pass."""
        records = {name: self.work / f"{_digest(mix)}.json" for name, mix in mixes.items()}
        missing = [name for name, path in records.items() if not path.is_file()]
        for start in range(0, len(missing), _AT_ONCE):
            self._measure({name: mixes[name] for name in missing[start : start + _AT_ONCE]}, records)
        return {name: float(json.loads(path.read_text())["kl"]) for name, path in records.items()}

    def _measure(self, mixes: Mapping[str, Mix], records: Mapping[str, Path]) -> None:
        model = StreamedModel(self.checkpoint, self.dtype, self.device)
        variants = {name: self._variant(*mix) for name, mix in mixes.items()}
        identity = json.dumps([_digest(mix) for mix in mixes.values()])
        states = self.work / "states"
        found = figures_of(model, variants, identity, self.tokens, states, self.progress, "probe")
        self.checkpoint.check_unchanged()
        count = float(self.tokens.mask.sum())
        for name, figures in found.items():
            top1 = float(figures.agree.sum()) / count
            write_text(records[name], json.dumps({"name": name, "kl": float(figures.kl.sum()) / count, "top1": top1}))
        remove(states)

    def _variant(self, types: Mapping[str, str], kept: Mapping[int, Sequence[int]] | None) -> Variant:
        """Layer by layer what a rounded and pruned checkpoint's would be, and the model that computes it."""
        formats = {
            tensor.name: stored_as(types[unit.name])
            for unit in self.parts.groups
            if types.get(unit.name, KEPT) != KEPT
            for tensor in self._tensors(unit)
        }
        model = StreamedModel(RoundedCheckpoint(self.checkpoint, formats), self.dtype, self.device)
        if kept is None:
            return lambda whole: (model, model.load(whole.index))
        count = len(next(iter(kept.values())))
        pruner = PrunedLayers(model, count, self.dissolve, self.values)

        def pruned(whole: LoadedLayer) -> tuple[StreamedModel, LoadedLayer]:
            return model, pruner.layer(model.load(whole.index), list(kept.get(whole.index, [])))

        return pruned

    def _tensors(self, unit: Unit) -> Iterator[TensorSpec]:
        prefix = self.checkpoint.spec.layers[unit.layer].prefix
        for group in unit.groups:
            yield from group.expand(f"{prefix}.", self.checkpoint.spec.num_experts, unit.layer)


def _digest(mix: Mix) -> str:
    types, kept = mix
    rounded_ones = sorted((name, kind) for name, kind in types.items() if kind != KEPT)
    masks = None if kept is None else sorted((layer, list(experts)) for layer, experts in kept.items())
    return hashlib.sha256(json.dumps([rounded_ones, masks]).encode()).hexdigest()[:24]
