"""What each type of each group of tensors is expected to cost, in nats of KL: from the prior alone, or from measured
quantization errors that measured end-KL sensitivities scale.

A group's damage is (its sensitivity) x (relative error of its type): the share of its output's power that rounding
changes. The prior's stands where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.formats.gguf_types import TYPES, fallback
from reapc.planner import prior
from reapc.planner.allocate import Problem
from reapc.planner.search import loss_method
from reapc.planner.tensor_groups import FileParts, TensorGroup

REFERENCE = "Q4_K"  # the type whose prior gives a sensitivity where none was measured
ROUTED = ("experts_gate_up", "experts_down")


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


def _prior_shares(parts: FileParts, spec: ModelSpec) -> NDArray[np.float64]:
    """(groups,) each group's share of the prior's loss: by its weights, among the experts' or among the others."""
    weights = np.array(
        [sum(prod(t.shape) * (spec.num_experts if t.experts else 1) for t in g.tensors) for g in parts.groups],
        np.float64,
    )
    routed = np.array([group.part in ROUTED for group in parts.groups])
    other = prior.default().other_share
    shares = np.empty_like(weights)
    for mask, part in ((routed, 1 - other), (~routed, other)):
        if mask.any():
            shares[mask] = part * weights[mask] / weights[mask].sum()
    return shares


def _prior_loss(group: TensorGroup, kind: str) -> float:
    """The prior's KL of a whole model in the type that the group is stored in, mean over its tensors' weights."""
    total = elements = 0.0
    for tensor in group.tensors:
        stored = fallback(kind, tensor.columns)
        size = prod(tensor.shape)
        total += size * prior.quantization_loss(loss_method("llama.cpp", stored), TYPES[stored].bits_per_weight)
        elements += size
    return total / elements


def prior_damages(parts: FileParts, spec: ModelSpec, types: Sequence[str]) -> NDArray[np.float64]:
    """(groups, types) nats; infinite where a type is not legal. The prior knows no layers: they differ by size only."""
    shares = _prior_shares(parts, spec)
    result = np.full((len(parts.groups), len(types)), np.inf)
    losses: dict[tuple[object, ...], float] = {}
    for g, group in enumerate(parts.groups):
        for k, kind in enumerate(types):
            if kind in group.types:
                key = (kind, *(tensor.shape for tensor in group.tensors))
                if key not in losses:
                    losses[key] = _prior_loss(group, kind)
                result[g, k] = shares[g] * losses[key]
    return result


def prior_sensitivity(parts: FileParts, spec: ModelSpec, errors: Mapping[str, GroupError]) -> Sensitivity:
    """What makes the measured error of ``REFERENCE`` cost what the prior says, the same for all groups of experts and
    for all others: the errors then say how types and layers differ."""
    shares = _prior_shares(parts, spec)
    nats: dict[str, float] = {}
    for routed in (True, False):
        mine = [(g, group) for g, group in enumerate(parts.groups) if (group.part in ROUTED) is routed]
        cost = sum(shares[g] * _prior_loss(group, REFERENCE) for g, group in mine)
        error = sum(shares[g] * errors[group.name].relative(_measured_as(errors, group)) for g, group in mine)
        for g, group in mine:
            nats[group.name] = shares[g] * cost / error if error else 0.0
    return Sensitivity(nats, dict.fromkeys(nats, "prior"))


def _measured_as(errors: Mapping[str, GroupError], group: TensorGroup) -> str:
    """``REFERENCE``, or the type nearest to it that was measured of the group."""
    known = errors[group.name].errors
    return min(known, key=lambda kind: abs(TYPES[kind].bits_per_weight - TYPES[REFERENCE].bits_per_weight))


def measured_damages(
    parts: FileParts,
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
    parts: FileParts,
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
