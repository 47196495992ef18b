"""Which experts stay at a count: by a criterion's values, or as measuring has chosen them at a few counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

from reapc.choice.measure import Choice, masks_of
from reapc.observe.scores import Scores
from reapc.prune.criteria import CRITERIA, choose

Kept = Mapping[int, Sequence[int]]


def by_criterion(scores: Scores, criterion: str, groups: int) -> Callable[[int], Kept]:
    """What a criterion keeps."""
    return lambda count: choose(scores, criterion, count, groups)


def by_measuring(
    scores: Scores, groups: int, asked: Sequence[int], chosen: Callable[[int], Choice]
) -> Callable[[int], Kept]:
    """What the measured choice keeps at the counts ``asked``, which are measured when they are first needed. At another
    count: what the nearest lower one of them keeps, filled up by its winner's values (greedy removal has none: by
    reap's); below all of them by the lowest one's winner."""

    @cache
    def measured(count: int) -> Choice:
        return chosen(count)

    def kept(count: int) -> Kept:
        if count in asked:
            return measured(count).kept
        below = max((n for n in asked if n < count), default=None)
        base = measured(below if below is not None else min(asked))
        values = base.winner if base.winner in CRITERIA else "reap"
        protected = {layer: list(experts) for layer, experts in base.kept.items()} if below is not None else {}
        return masks_of(scores, values, count, groups, protected)

    return kept
