"""Figures of one configuration by sequence, and what they say with which certainty.

The panel is cut in two: one half of its sequences picks the best of several configurations, the other reports what the
picked one is worth, so that no figure is flattered by having been picked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from reapc.stream.tokens import Tokens
from reapc.verify.fidelity import measure
from reapc.verify.intervals import Interval, mean_interval


@dataclass(frozen=True)
class Sequences:
    """Per sequence of the panel, (sequences,) each: ``kl`` in nats and ``top1``, means over its ``tokens``."""

    kl: np.ndarray
    top1: np.ndarray
    tokens: np.ndarray

    def to_json(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("kl", "top1", "tokens")}

    @staticmethod
    def of(value: dict[str, list[float]]) -> Sequences:
        return Sequences(*(np.array(value[name]) for name in ("kl", "top1", "tokens")))

    def mean(self, rows: np.ndarray) -> tuple[float, float]:
        """KL and top-1 over the tokens of some sequences."""
        weight = self.tokens[rows]
        return tuple(float((part[rows] * weight).sum() / weight.sum()) for part in (self.kl, self.top1))  # type: ignore[return-value]


def by_sequence(tokens: Tokens, references: Iterable[Any], results: Iterable[np.ndarray]) -> Sequences:
    """As ``measure``, a sequence at a time."""
    found = [
        measure(tokens.take(np.array([row])), [reference], [result])
        for row, (reference, result) in enumerate(zip(references, results, strict=True))
    ]
    return Sequences(*(np.array([getattr(f, name) for f in found], float) for name in ("kl", "top1", "tokens")))


def halves(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that pick and sequences that report: every second of each domain."""
    parts: tuple[list[int], list[int]] = ([], [])
    for domain in range(len(tokens.domains)):
        rows = np.flatnonzero(tokens.domain == domain)
        for part, mine in zip(parts, (rows[::2], rows[1::2]), strict=True):
            part.extend(mine.tolist())
    return np.sort(np.array(parts[0], np.int64)), np.sort(np.array(parts[1], np.int64))


def kl_interval(figures: Sequences, rows: np.ndarray) -> Interval | None:
    """The 95 % interval of the mean KL over the tokens of some sequences; None where they are too few to say."""
    return mean_interval((figures.kl * figures.tokens)[rows], figures.tokens[rows])


def ratio_interval(figures: Sequences, other: Sequences, rows: np.ndarray) -> Interval | None:
    """The same of one KL over another, on the same sequences."""
    return mean_interval((figures.kl * figures.tokens)[rows], (other.kl * other.tokens)[rows])
