"""Intervals of a mean over tokens that come in sequences: tokens of one text are alike, so sequences are resampled."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
FEWEST = 5  # sequences: with fewer, resampling says nothing
_RESAMPLES = 2000
_CHUNK = 1 << 22  # entries of the table of resampled counts that is held at a time


class Interval(NamedTuple):
    """Its ends, in the unit of the mean."""

    low: float
    high: float


def mean_interval(sums: Any, counts: Any, seed: int = 0) -> Interval | None:
    """The 95 % percentile bootstrap interval of sum(sums) / sum(counts) over sequences.

    ``sums``: (sequences,) sum over each one's tokens; ``counts``: (sequences,) how many tokens. None with fewer than
    ``FEWEST`` sequences that have any. Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13."""
    totals, tokens = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    there = tokens > 0
    totals, tokens = totals[there], tokens[there]
    number = len(tokens)
    if number < FEWEST:
        return None
    random = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    left = _RESAMPLES
    while left:
        rows = min(left, max(1, _CHUNK // number))
        times = random.multinomial(number, np.full(number, 1 / number), size=rows)
        means.append((times @ totals) / (times @ tokens))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
