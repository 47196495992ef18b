"""An evolutionary search over which experts stay, the total fixed and the numbers by layer free (as EvoESAP does, arXiv
2603.06003). An upper bound of what non-uniform pruning could give: stock engines serve one expert count only.

A candidate is a number of experts for each layer; which ones stay in a layer follows from a score. It is worth the KL
of the masked model on a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Counts = tuple[int, ...]


def search(
    evaluate: Callable[[Counts], float], layers: int, experts: int, total: int, least: int, *,
    generations: int = 6, population: int = 8, seed: int = 0,
) -> tuple[Counts, float]:  # fmt: skip
    """Counts by layer that sum to ``total``, each from ``least`` (the top-k) to ``experts``, of the least ``evaluate``;
    the uniform ones are among the first candidates, so the result is never worse than they are."""
    random = np.random.default_rng(seed)
    even = [total // layers + (layer < total % layers) for layer in range(layers)]
    known: dict[Counts, float] = {}

    def worth(counts: Counts) -> float:
        if counts not in known:
            known[counts] = evaluate(counts)
        return known[counts]

    def moved(counts: Counts) -> Counts:
        """Some experts given from one layer to another."""
        found = list(counts)
        for _ in range(int(random.integers(1, 4))):
            giver, taker = random.choice(layers, 2, replace=False)
            size = min(int(random.integers(1, 3)), found[giver] - least, experts - found[taker])
            found[giver] -= max(size, 0)
            found[taker] += max(size, 0)
        return tuple(found)

    pool = [tuple(even)]
    for _ in range(generations):
        pool = sorted(set(pool), key=worth)[: max(2, population // 3)]
        pool += [moved(pool[int(random.integers(len(pool)))]) for _ in range(population)]
    best = min(set(pool), key=worth)
    return best, worth(best)
