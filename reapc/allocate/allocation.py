"""Joint allocation as it is offered: damages measured as far as there is something to measure with, the choice, and a
few end-to-end measurements that correct it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reapc.allocate.masks import Kept, by_criterion
from reapc.allocate.rounding import measure_errors
from reapc.allocate.sensitivity import Measures, Probe, Prober, measured_pruning, measured_sensitivity
from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.observe.scores import Scores
from reapc.planner import prior
from reapc.planner.allocate import Allocation, Choice, Problem, allocate
from reapc.planner.checkpoint_units import CheckpointParts
from reapc.planner.damages import (
    ROUTED,
    Group,
    Sensitivity,
    measured_damages,
    prior_damages,
    prior_sensitivity,
    problem_of,
)
from reapc.planner.tensor_groups import LADDER, FileParts, file_parts
from reapc.progress import Progress
from reapc.prune.criteria import groups_of, share_without
from reapc.quantize.imatrix import entries_of
from reapc.stream.tokens import read_tokens
from reapc.toolchain import find_llamacpp
from reapc.units import parse_bytes

_APART = 0.08  # of the experts: how far the second measurement's count is from the first one's, at least
_DAMPING = 0.1  # of the correction towards one common factor, where two measurements say little


@dataclass(frozen=True)
class Damages:
    """What the choice is made by, whatever the budget. ``rounding`` (counts, groups, types) or (groups, types), and
    ``pruning`` by count, in nats; ``source``: "measured", "errors" (rounding measured, scale from the prior) or
    "prior"."""

    parts: FileParts | CheckpointParts
    types: tuple[str, ...]
    counts: tuple[int, ...]
    rounding: NDArray[np.float64]
    pruning: tuple[float, ...]
    source: str
    kept: Callable[[int], Mapping[int, Sequence[int]]] | None = None
    probes: tuple[Probe, ...] = ()

    @property
    def groups(self) -> Sequence[Group]:
        """What gets one type each."""
        return self.parts.groups

    def problem(self, budget: int) -> Problem:
        """The problem of ``budget`` bytes of tensor data."""
        return problem_of(self.parts, self.types, self.counts, self.pruning, self.rounding, budget)

    def scaled(self, rounding: float, pruning: float) -> Damages:
        """With both kinds of damage corrected by a factor."""
        return replace(
            self, rounding=self.rounding * rounding, pruning=tuple(pruning * value for value in self.pruning)
        )


@dataclass(frozen=True)
class Measurement:
    """One chosen mix as a real file: what was predicted (before any correction), and what its KL is."""

    experts: int
    rounding: float
    pruning: float
    kl: float
    options: tuple[int, ...] = field(repr=False, default=())
    kv: str = ""
    cache: float = 0.0

    @property
    def predicted(self) -> float:
        """Without the KV cache, which no measurement here has."""
        return self.rounding + self.pruning

    def of(self, choice: Choice) -> bool:
        """Whether it is the choice's own: any cache, since a cache does not change it."""
        return self.experts == choice.experts and self.options == tuple(int(option) for option in choice.options)

    def to_json(self) -> dict[str, Any]:
        cache = {"kv_dtype": self.kv, "kv_kl": self.cache} if self.kv else {}
        return {"experts": self.experts, "predicted_kl": self.predicted, "measured_kl": self.kl, **cache}


def prior_only(spec: ModelSpec, counts: Sequence[int], types: Sequence[str] = LADDER) -> Damages:
    """Damages from the planner's prior alone: no weights, no scores."""
    parts = file_parts(spec, types)
    pruning = tuple(prior.pruning_loss(1 - count / spec.num_experts) for count in counts)
    return Damages(parts, tuple(types), tuple(counts), prior_damages(parts, spec, types), pruning, "prior")


def measured(
    spec: ModelSpec,
    base: Path,
    scores: Scores,
    counts: Sequence[int],
    criterion: str,
    progress: Progress,
    *,
    prober: Prober | None = None,
    dissolve: bool = False,
    types: Sequence[str] = LADDER,
    segments: int = 1,
    kept: Callable[[int], Kept] | None = None,
) -> Damages:
    """Damages from the scores (observed with second moments) and the weights in ``base``, an unquantized GGUF; with a
    ``prober`` in nats that were measured, else in the prior's. ``kept``: the experts that stay at a count, by
    ``criterion`` where it is not given. ReapcError where the scores have no second moments."""
    parts = file_parts(spec, types)
    entries = entries_of(scores, spec)
    if not entries:
        raise ReapcError(
            "the scores hold no second moments, so no rounding error can be weighed",
            hint="`reapc observe` writes them; the scores inside a build's output have none",
        )
    errors = measure_errors(base, parts, scores, entries, types, progress)
    stays = kept or by_criterion(scores, criterion, groups_of(spec, dissolve))

    def share(count: int) -> float:
        return share_without(scores, stays(count))

    probes: list[Probe] = []
    if prober is None:
        sensitivity: Sensitivity = prior_sensitivity(parts, spec, errors)
        pruning = {c: prior.measured_pruning_loss(1 - c / spec.num_experts, share(c)) for c in counts}
    else:
        sensitivity, probes = measured_sensitivity(parts, errors, prober, segments)
        pruning, more = measured_pruning(spec.num_experts, counts, stays, share, prober)
        probes += more
    rounding = measured_damages(parts, types, counts, stays, errors, sensitivity)
    fixed = tuple(pruning[count] for count in counts)
    source = "measured" if prober else "errors"
    return Damages(parts, tuple(types), tuple(counts), rounding, fixed, source, stays, tuple(probes))


def prober_of(
    base: Path, tokens: Path, sequences: int, scores: Scores, spec: ModelSpec, work: Path, progress: Progress,
    threads: int,
) -> Prober:  # fmt: skip
    """What measures files made of ``base`` on at most ``sequences`` sequences of the file ``tokens``, drawn evenly."""
    taken = read_tokens(tokens, spec.vocab_size).evenly(sequences)
    folder = work / f"probes-{taken.digest[:16]}-{find_llamacpp().version.split()[0]}"
    return Prober(base, taken, entries_of(scores, spec), folder, progress, threads)


def stored_types(damages: Damages, choice: Choice) -> dict[str, str]:
    """The type of every tensor that is chosen for, by its name in the file."""
    types: dict[str, str] = {}
    for group, option in zip(damages.groups, choice.options, strict=True):
        types |= group.stored(damages.types[option])
    return types


Budget = int | Callable[[Damages], Problem]


def problem_at(damages: Damages, budget: Budget) -> Problem:
    """The problem of damages under a budget."""
    return budget(damages) if callable(budget) else damages.problem(budget)


def decide(
    damages: Damages, budget: Budget, prober: Measures | None = None, rounds: int = 3
) -> tuple[Allocation, Choice, list[Measurement]]:
    """The allocation of ``budget`` (bytes of tensor data, or what makes the problem of damages, for several devices),
    the choice that is taken, and what was measured.

    With a ``prober`` the best choice is measured, then the best one with all experts (where that is the first, or does
    not fit: with clearly fewer or more). Both correct the two kinds of damage by a factor each, and if that changes the
    choice the new one is measured too. The one with the least measured KL, the prior's of its KV cache added, is taken;
    its predicted damage stays what it was before any correction."""
    problem = problem_at(damages, budget)
    first = allocate(problem)
    if prober is None or rounds < 1:
        return first, first.best, []
    found: list[tuple[Measurement, Choice]] = []

    def try_(choice: Choice) -> None:
        options = tuple(int(option) for option in choice.options)
        if any(done.of(choice) and done.kv == choice.kv for done, _ in found):
            return
        picked = problem.damage[choice.case, np.arange(len(options)), list(options)]
        kept = damages.kept(choice.experts) if damages.kept and choice.experts != max(damages.counts) else None
        types = stored_types(damages, choice)
        name = f"mix-{choice.experts}-{abs(hash_of(types)):x}"
        kl = prober.kl(name, types, kept)
        pruning = damages.pruning[damages.counts.index(choice.experts)]
        made = Measurement(choice.experts, float(picked.sum()), pruning, kl, options, choice.kv, choice.cache)
        found.append((made, choice))
        prober.progress.log(f"allocate: {choice.experts} experts: KL {made.predicted:.4f} predicted, {kl:.4f} measured")

    try_(first.best)
    total = max(damages.counts)
    cases = problem.experts.tolist()
    other = [i for i, n in enumerate(cases) if n == total != first.best.experts]
    if not other or _best_of(problem, other) is None:
        least = max(1, round(_APART * total))
        other = [i for i, n in enumerate(cases) if abs(n - first.best.experts) >= least]
    if rounds > 1 and other and (second := _best_of(problem, other)) is not None:
        try_(second)
    if rounds > 2 and len(found) > 1:
        factors = correction([measurement for measurement, _ in found])
        try_(allocate(problem_at(damages.scaled(*factors), budget)).best)
    best = min(found, key=lambda item: (item[0].kl + item[0].cache, -item[0].experts))
    return first, best[1], [measurement for measurement, _ in found]


def hash_of(types: Mapping[str, str]) -> int:
    """A number for a choice of types, the same in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(types, sort_keys=True).encode()).digest()[:6])


def _best_of(problem: Problem, cases: Sequence[int]) -> Choice | None:
    """The best choice among some cases, numbered as in ``problem``; None where none of them fits."""
    places = np.array(cases)
    part = problem.take(places)
    try:
        found = allocate(part).best
    except ReapcError:
        return None
    return Choice(**{**found.__dict__, "case": int(places[found.case])})


def correction(measurements: Sequence[Measurement]) -> tuple[float, float]:
    """Factors of rounding and of pruning that bring the predictions near what was measured: least squares of the
    relative error, drawn towards one common factor where the measurements do not tell the two apart."""
    kl = np.array([m.kl for m in measurements])
    common = float(np.median(kl / np.array([max(m.predicted, 1e-12) for m in measurements])))
    design = np.array([[m.rounding, m.pruning] for m in measurements]) / kl[:, None]
    damped = np.vstack([design, _DAMPING / common * np.eye(2)])
    wanted = np.concatenate([np.ones(len(kl)), np.full(2, _DAMPING)])
    found = np.linalg.lstsq(damped, wanted, rcond=None)[0]
    low, high = common / 10, common * 10
    return float(np.clip(found[0], low, high)), float(np.clip(found[1], low, high))


def budget_bytes(text: str, spec: ModelSpec, parts: FileParts) -> int:
    """Bytes of tensor data that a budget means: a size ("12GB"), or "3.0bpw": the routed experts at so many bits for
    every weight that the ORIGINAL has there, and everything else at Q8_0. The bytes are one sum: what embeddings and
    attention save goes to the experts."""
    stripped = text.strip().lower()
    if stripped.endswith("bpw"):
        try:
            bits = float(stripped.removesuffix("bpw"))
        except ValueError:
            bits = 0.0
        if not 0 < bits <= 16:
            raise ReapcError(f"--budget {text!r}: bits per weight between 0 and 16 are expected, as 3.0bpw")
        others = sum(g.data_bytes("Q8_0", spec.num_experts) for g in parts.groups if g.part not in ROUTED)
        return int(bits * spec.expert_weights * spec.num_experts / 8) + others + parts.kept_bytes(spec.num_experts)
    try:
        return parse_bytes(text, zero=False)
    except ValueError as error:
        raise ReapcError(
            f"--budget: {error}", hint="a size as 12GB, or the experts' bits per weight as 3.0bpw"
        ) from error


def expert_bits(damages: Damages, spec: ModelSpec, choice: Choice) -> tuple[float, float]:
    """Mean bits per kept expert weight, and per weight of the original's experts."""
    size = sum(
        group.data_bytes(damages.types[option], choice.experts)
        for group, option in zip(damages.groups, choice.options, strict=True)
        if group.part in ROUTED
    )
    return 8 * size / (spec.expert_weights * choice.experts), 8 * size / (spec.expert_weights * spec.num_experts)


def groups_of_choice(damages: Damages, choice: Choice) -> dict[str, str]:
    """The option of every group, by its name."""
    return {g.name: damages.types[option] for g, option in zip(damages.groups, choice.options, strict=True)}
