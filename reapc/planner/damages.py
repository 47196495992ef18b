"""What each type of each group of tensors is expected to cost, in nats of KL: from the prior alone, or from measured
quantization errors that measured end-KL sensitivities scale.

A group's damage is (its sensitivity) x (relative error of its type): the share of its output's power that rounding
changes. The prior's stands where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.planner import prior
from reapc.planner.allocate import Problem

REFERENCE_BITS = 4.5  # Q4_K's: a sensitivity that was not measured is the prior's of the type nearest to it
ROUTED = ("experts_gate_up", "experts_down", "experts")


class Group(Protocol):
    """What gets one type: ``TensorGroup`` of a GGUF file, ``Unit`` of a checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def part(self) -> str: ...
    @property
    def types(self) -> tuple[str, ...]: ...

    def stored(self, kind: str) -> dict[str, str]: ...
    def data_bytes(self, kind: str, count: int) -> int: ...
    def weights(self, experts: int) -> int: ...
    def bits(self, kind: str) -> float: ...
    def prior_loss(self, kind: str) -> float: ...


class Parts(Protocol):
    """All groups of a file or checkpoint, and the bytes of what is not chosen."""

    @property
    def groups(self) -> Sequence[Group]: ...

    def kept_bytes(self, count: int) -> int: ...
    def table(self, counts: Sequence[int], types: Sequence[str]) -> NDArray[np.int64]: ...
    def bytes_of(self, types: Mapping[str, str], count: int) -> int: ...


@dataclass(frozen=True)
class GroupError:
    """Relative errors of one group by type. ``errors``: (experts,) of an experts' group, (1,) of another;
    ``weights`` (experts,) or (1,): each expert's share of its layer's output power; they sum to 1."""

    errors: Mapping[str, NDArray[np.float64]]
    weights: NDArray[np.float64]

    def relative(self, kind: str, kept: Sequence[int] | None = None) -> float:
        """The error of the layer's output, of the kept experts alone where there are some dropped."""
        values = self.errors[kind] * self.weights
        return float(values.sum() if kept is None or len(values) == 1 else values[list(kept)].sum())


@dataclass(frozen=True)
class Sensitivity:
    """Nats of KL per relative error, by group, and where each number comes from ("measured" or "prior")."""

    nats: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def _prior_shares(parts: Parts, spec: ModelSpec) -> NDArray[np.float64]:
    """(groups,) each group's share of the prior's loss: by its weights, among the experts' or among the others."""
    weights = np.array([group.weights(spec.num_experts) for group in parts.groups], np.float64)
    routed = np.array([group.part in ROUTED for group in parts.groups])
    other = prior.default().other_share
    shares = np.empty_like(weights)
    for mask, part in ((routed, 1 - other), (~routed, other)):
        if mask.any():
            shares[mask] = part * weights[mask] / weights[mask].sum()
    return shares


def prior_damages(parts: Parts, spec: ModelSpec, types: Sequence[str]) -> NDArray[np.float64]:
    """(groups, types) nats; infinite where a type is not legal. The prior knows no layers: they differ by size only."""
    shares = _prior_shares(parts, spec)
    result = np.full((len(parts.groups), len(types)), np.inf)
    losses: dict[tuple[str, str, int], float] = {}
    for g, group in enumerate(parts.groups):
        alike = group.name.rpartition(".")[2]
        for k, kind in enumerate(types):
            if kind in group.types:
                key = (kind, alike, group.weights(1))
                if key not in losses:
                    losses[key] = group.prior_loss(kind)
                result[g, k] = shares[g] * losses[key]
    return result


def prior_sensitivity(parts: Parts, spec: ModelSpec, errors: Mapping[str, GroupError]) -> Sensitivity:
    """What makes the measured error of the type nearest to ``REFERENCE_BITS`` cost what the prior says, the same for
    all groups of experts and for all others: the errors then say how types and layers differ."""
    shares = _prior_shares(parts, spec)
    nats: dict[str, float] = {}
    for routed in (True, False):
        mine = [(g, group) for g, group in enumerate(parts.groups) if (group.part in ROUTED) is routed]
        cost = error = 0.0
        for g, group in mine:
            kind = nearest_to(group, errors[group.name].errors, REFERENCE_BITS)
            cost += shares[g] * group.prior_loss(kind)
            error += shares[g] * errors[group.name].relative(kind)
        for g, group in mine:
            nats[group.name] = shares[g] * cost / error if error else 0.0
    return Sensitivity(nats, dict.fromkeys(nats, "prior"))


def nearest_to(group: Group, kinds: Iterable[str], bits: float) -> str:
    """The one of ``kinds`` whose bits per weight are nearest to ``bits``."""
    return min(kinds, key=lambda kind: abs(group.bits(kind) - bits))


def measured_damages(
    parts: Parts,
    types: Sequence[str],
    counts: Sequence[int],
    kept: Callable[[int], Mapping[int, Sequence[int]]],
    errors: Mapping[str, GroupError],
    sensitivity: Sensitivity,
) -> NDArray[np.float64]:
    """(counts, groups, types) nats. ``kept``: the experts that each layer keeps at a count."""
    result = np.full((len(counts), len(parts.groups), len(types)), np.inf)
    for c, count in enumerate(counts):
        chosen = kept(count)
        for g, group in enumerate(parts.groups):
            experts = chosen.get(group.layer) if group.part in ROUTED else None
            for k, kind in enumerate(types):
                if kind in group.types:
                    error = errors[group.name].relative(kind, experts)
                    result[c, g, k] = sensitivity.nats[group.name] * error
    return result


def problem_of(
    parts: Parts,
    types: Sequence[str],
    counts: Sequence[int],
    fixed: Sequence[float],
    damages: NDArray[np.float64],
    budget: int,
) -> Problem:
    """The problem of one budget: ``budget`` bytes for the tensor data of the file. ``damages``: (groups, types) or
    (counts, groups, types); ``fixed``: each count's own damage."""
    sizes = parts.table(counts, types)
    capacity = np.array([[budget - parts.kept_bytes(count)] for count in counts], np.int64)
    return Problem(
        np.array(counts, np.int64), np.array(fixed, np.float64), sizes,
        np.ascontiguousarray(np.broadcast_to(damages, sizes.shape)),
        np.zeros(sizes.shape[:2], np.int64), capacity,
    )  # fmt: skip
