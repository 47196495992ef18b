"""The allocation of a vLLM checkpoint: damages of every method's units, and the method that the least damage is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reapc.allocate.allocation import Budget, Damages, Measurement, decide, problem_at
from reapc.allocate.masks import Kept
from reapc.allocate.sensitivity import Probe, measured_pruning, measured_sensitivity, probe_sets, probed_counts
from reapc.allocate.streamed import PROBE_BITS, Mix, StreamedProber
from reapc.allocate.unit_rounding import measure_unit_errors
from reapc.arch import ModelSpec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.observe.scores import Scores
from reapc.planner import prior
from reapc.planner.allocate import Allocation, Choice, Problem, allocate
from reapc.planner.cards import Cards
from reapc.planner.checkpoint_units import KEPT, CheckpointParts
from reapc.planner.damages import GroupError, measured_damages, prior_damages, prior_sensitivity
from reapc.progress import Progress
from reapc.prune.criteria import expert_values, share_without
from reapc.stream.tokens import Tokens

Decided = tuple[Damages, tuple[Allocation, Choice, list[Measurement]], dict[str, float]]


def prior_checkpoints(spec: ModelSpec, every: Sequence[CheckpointParts], counts: Sequence[int]) -> list[Damages]:
    """Damages of each method from the planner's prior alone."""
    pruning = tuple(prior.pruning_loss(1 - count / spec.num_experts) for count in counts)
    return [
        Damages(parts, types := parts.types(), tuple(counts), prior_damages(parts, spec, types), pruning, "prior")
        for parts in every
    ]


def measured_checkpoints(
    checkpoint: Checkpoint,
    every: Sequence[CheckpointParts],
    scores: Scores,
    counts: Sequence[int],
    kept: Callable[[int], Kept],
    progress: Progress,
    *,
    prober: StreamedProber | None = None,
    segments: int = 1,
) -> list[Damages]:
    """Damages of each method, of rounding to nearest, from the scores and the weights; with a ``prober`` in nats that
    were measured, else in the prior's. ``kept``: the experts that stay at a count."""
    spec = checkpoint.spec
    errors = measure_unit_errors(checkpoint, every, scores, progress)

    def share(count: int) -> float:
        return share_without(scores, kept(count))

    probes: list[Probe] = []
    if prober is None:
        pruning = {c: prior.measured_pruning_loss(1 - c / spec.num_experts, share(c)) for c in counts}
    else:
        prober.kls(_probes(prober, spec, counts, kept, segments))
        sensitivity, probes = measured_sensitivity(prober.parts, errors, prober, segments)
        pruning, more = measured_pruning(spec.num_experts, counts, kept, share, prober)
        probes += more
    fixed = tuple(pruning[count] for count in counts)
    found = []
    for parts in every:
        types = parts.types()
        if prober is None:
            own = {unit.name: _limited(errors[unit.name], unit.types) for unit in parts.groups}
            sensitivity = prior_sensitivity(parts, spec, own)
        rounding = measured_damages(parts, types, counts, kept, errors, sensitivity)
        source = "measured" if prober else "errors"
        found.append(Damages(parts, types, tuple(counts), rounding, fixed, source, kept, tuple(probes)))
    return found


def _limited(error: GroupError, types: Sequence[str]) -> GroupError:
    return GroupError({kind: error.errors[kind] for kind in types if kind != KEPT or len(types) == 1}, error.weights)


def _probes(
    prober: StreamedProber, spec: ModelSpec, counts: Sequence[int], kept: Callable[[int], Kept], segments: int
) -> dict[str, Mix]:
    """Everything that is probed, for one pass."""
    groups = prober.parts.groups
    mixes: dict[str, Mix] = {
        name: (prober.mix(groups, {unit.name for unit in own}), None)
        for name, own in probe_sets(groups, segments).items()
        if any(prober.probed(unit) != KEPT for unit in own)
    }
    return mixes | {f"kept-{count}": ({}, kept(count)) for count in probed_counts(spec.num_experts, counts)}


def probed_parts(every: Sequence[CheckpointParts]) -> CheckpointParts:
    """Of the methods the one whose options come nearest to what probes round to."""

    def distance(parts: CheckpointParts) -> float:
        bits = (unit.bits(kind) for unit in parts.groups for kind in unit.types if kind != KEPT)
        return min(abs(width - PROBE_BITS) for width in bits)

    return min(every, key=distance)


def prober_of_checkpoint(
    checkpoint: Checkpoint, every: Sequence[CheckpointParts], text: Tokens, work: Path, progress: Progress, *,
    dissolve: bool, scores: Scores,
) -> StreamedProber:  # fmt: skip
    """What measures on ``text``, rounding to the options of the method that is nearest to what probes round to."""
    return StreamedProber(
        checkpoint, probed_parts(every), text, work, progress, dissolve=dissolve,
        values=expert_values(scores, "reap"),
    )  # fmt: skip


def within(cards: Cards) -> Callable[[Damages], Problem]:
    """What the cards have left, as a budget."""

    def problem(damages: Damages) -> Problem:
        assert isinstance(damages.parts, CheckpointParts)
        return cards.budgets(damages.problem(0), damages.parts, damages.types)

    return problem


def decide_methods(
    found: Sequence[Damages], budget: Budget, prober: StreamedProber | None = None, rounds: int = 3
) -> Decided:
    """The decision in the method that holds the choice with the least predicted damage within ``budget`` (bytes of
    tensor data, or ``within`` cards), and what the best of each method is predicted to lose. CannotBeDone where nothing
    fits in any."""

    made: dict[int, Problem] = {}

    def problem_of(damages: Damages) -> Problem:
        place = next((i for i, own in enumerate(found) if own is damages), None)  # corrected ones are asked for once
        if place is None or place not in made:
            problem = problem_at(damages, budget)
            if place is None:
                return problem
            made[place] = problem
        return made[place]

    losses: dict[str, float] = {}
    best: Damages | None = None
    failed: CannotBeDone | None = None
    for damages in found:
        assert isinstance(damages.parts, CheckpointParts)
        try:
            loss = allocate(problem_of(damages)).best.damage
        except CannotBeDone as error:
            failed = failed or error
            continue
        if not losses or loss < min(losses.values()):
            best = damages
        losses[damages.parts.method] = loss
    if best is None:
        assert failed is not None
        raise failed
    return best, decide(best, problem_of, prober, rounds), losses
