"""What a vLLM checkpoint lets one choose: for each layer the width and group size of its routed experts (vLLM's fused
kernels take one for all of them), its attention, its shared experts and its dense layers, and their exact bytes.

The tensors outside layers, routers, norms and gates stay as they are. One method (``ct``, ``gptq`` ...) per checkpoint:
that is what a ``quantization_config`` can say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerSpec, TensorGroup
from reapc.errors import CannotBeDone
from reapc.formats import weights
from reapc.formats.weights import KEPT_BITS, LAYER_PARTS, Method, Override, WeightFormat
from reapc.planner import prior

KEPT = "kept"  # the option that leaves a unit in the checkpoint's own dtype
_PLAIN = weights.plain("plain", KEPT_BITS, 0)


def stored_as(kind: str) -> WeightFormat:
    """The plain format that an option's name means; that of 16 bit for ``KEPT``."""
    found = _PLAIN if kind == KEPT else weights.parse(kind)
    assert found is not None
    return found


@dataclass(frozen=True)
class Unit:
    """The linears of one part of one layer, which are stored alike. ``name`` is what a format's override calls it
    ("layers.3.experts"), ``types`` the options: plain formats by name, and ``KEPT``."""

    name: str
    layer: int
    part: str
    groups: tuple[TensorGroup, ...]
    types: tuple[str, ...]

    def stored(self, kind: str) -> dict[str, str]:
        """The option by the unit's name."""
        return {self.name: kind}

    def data_bytes(self, kind: str, count: int) -> int:
        """Bytes in the checkpoint with ``count`` experts."""
        fmt = stored_as(kind)
        return sum(weights.group_bytes(fmt, group, count) for group in self.groups)

    def weights(self, experts: int) -> int:
        """How many weights it has."""
        return sum(group.parameters(experts) for group in self.groups)

    def bits(self, kind: str) -> float:
        """Mean bits per weight of an option."""
        return 8 * self.data_bytes(kind, 1) / self.weights(1)

    def prior_loss(self, kind: str) -> float:
        """The prior's KL of a whole model that is stored so."""
        return 0.0 if kind == KEPT else prior.quantization_loss(stored_as(kind).method, self.bits(kind))


@dataclass(frozen=True)
class CheckpointParts:
    """The units of a checkpoint that ``method`` stores. ``mtp``: MTP layers are in the file."""

    spec: ModelSpec
    method: Method
    groups: tuple[Unit, ...]
    mtp: bool = False

    def format(self, types: Mapping[str, str]) -> WeightFormat:
        """The format in which every unit has its option of ``types``; bf16 where all stay as they are."""
        if all(kind == KEPT for kind in types.values()):
            return _PLAIN
        return self._format(types)

    def _format(self, types: Mapping[str, str]) -> WeightFormat:
        """The same, never bf16: of FP8 the cast also takes MTP layers along."""
        sizes: Counter[str] = Counter()
        for unit in self.groups:
            sizes[types[unit.name]] += unit.weights(self.spec.num_experts)
        usual = [kind for kind, _ in sizes.most_common() if kind != KEPT]
        options = (kind for unit in self.groups for kind in unit.types if kind != KEPT)
        base = stored_as(usual[0] if usual else next(options))
        overrides: list[Override] = []
        for part in LAYER_PARTS:
            own = [unit for unit in self.groups if unit.part == part]
            for kind, run in groupby(own, key=lambda unit: types[unit.name]):
                layers = [unit.layer for unit in run]
                fmt = stored_as(kind)
                if kind == KEPT:
                    overrides.append(Override(part, layers[0], layers[-1], KEPT_BITS))
                elif fmt != base:
                    group = fmt.group_size if fmt.group_size != base.group_size else 0
                    overrides.append(Override(part, layers[0], layers[-1], fmt.bits, group))
        return weights.with_overrides(base, tuple(overrides))

    @property
    def unquantized(self) -> WeightFormat:
        """The format with every unit kept."""
        return self._format({unit.name: KEPT for unit in self.groups})

    @cached_property
    def _kept(self) -> tuple[int, int]:
        """Bytes outside the units: fixed, and for each expert (router rows)."""
        found = []
        for count in (1, 2):
            whole = weights.checkpoint_bytes(self.unquantized, self.spec.with_experts(count), mtp=self.mtp)
            found.append(whole - sum(unit.data_bytes(KEPT, count) for unit in self.groups))
        return 2 * found[0] - found[1], found[1] - found[0]

    def kept_bytes(self, count: int) -> int:
        """Bytes of the tensors that no unit holds."""
        fixed, each = self._kept
        return fixed + each * count

    def table(self, counts: Sequence[int], types: Sequence[str]) -> NDArray[np.int64]:
        """Bytes (counts, units, types); 0 where a type is no option of a unit."""
        return self.tabulate(counts, types, lambda unit, kind: lambda count: unit.data_bytes(kind, count))

    def tabulate(
        self, counts: Sequence[int], types: Sequence[str], sizes: Callable[[Unit, str], Callable[[int], int]]
    ) -> NDArray[np.int64]:
        """The same of any measure of a unit and type; units of one kind are asked once."""
        result = np.zeros((len(counts), len(self.groups), len(types)), np.int64)
        known: dict[tuple[tuple[TensorGroup, ...], str], list[int]] = {}
        for u, unit in enumerate(self.groups):
            for k, kind in enumerate(types):
                if kind not in unit.types:
                    continue
                key = (unit.groups, kind)
                if key not in known:
                    known[key] = [sizes(unit, kind)(count) for count in counts]
                result[:, u, k] = known[key]
        return result

    def bytes_of(self, types: Mapping[str, str], count: int) -> int:
        """Bytes of all tensors of a checkpoint whose units have these types."""
        return self.kept_bytes(count) + sum(unit.data_bytes(types[unit.name], count) for unit in self.groups)

    def types(self) -> tuple[str, ...]:
        """Every option that some unit has, the largest first."""
        found = {kind for unit in self.groups for kind in unit.types}
        return tuple(sorted(found, key=lambda kind: (-stored_as(kind).bits_per_weight, kind)))


def checkpoint_parts(
    spec: ModelSpec,
    method: Method,
    formats: Sequence[WeightFormat],
    served: Callable[[WeightFormat, TensorGroup], str | None],
    mtp: bool = False,
) -> CheckpointParts:
    """The units of ``spec`` with those of ``formats`` (plain ones of ``method``) that can be stored and served.

    ``served`` says why a tensor's linears cannot be served in a format, None where they can. CannotBeDone where no
    unit has another option than to stay."""
    units: list[Unit] = []
    known: dict[tuple[TensorGroup, ...], tuple[str, ...]] = {}
    for layer in spec.layers:
        for part, role in LAYER_PARTS.items():
            groups = tuple(g for g in layer.kind.tensors if g.role == role and g.linears)
            if not groups:
                continue
            if groups not in known:
                known[groups] = tuple(
                    fmt.name for fmt in formats if all(_stores(fmt, g) and served(fmt, g) is None for g in groups)
                )
            units.append(Unit(_name(layer, part), layer.index, part, groups, (*known[groups], KEPT)))
    if not any(len(unit.types) > 1 for unit in units):
        raise CannotBeDone(f"no part of the model can be stored in {method} and served on this target")
    return CheckpointParts(spec, method, tuple(units), mtp)


def _name(layer: LayerSpec, part: str) -> str:
    return f"layers.{layer.index}.{part}"


def _stores(fmt: WeightFormat, group: TensorGroup) -> bool:
    """Whether the quantizers write every linear of the tensor so."""
    cast = fmt.method in ("fp8", "fp8-block")
    return all(
        fmt.misfit(*shape) is None and (cast or not any(side % weights.SIDE for side in shape))
        for shape in group.linears
    )
