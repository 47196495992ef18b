"""An evolutionary search over how many experts each layer keeps, their sum fixed (as EvoESAP does, arXiv
2603.06003). An upper bound of what non-uniform pruning could give: **not servable by stock engines**, which read one
expert count for all layers.

Which experts stay in a layer follows from a score, and does not change. What is maximized is ESAP, the expected
acceptance of the pruned model's tokens by the full one's speculative decoding, both given the same text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Counts = tuple[int, ...]


def acceptance(reference: Tensor, found: Tensor) -> float:
    """ESAP: mean over positions of the sum over the vocabulary of min(p, q), from (..., vocabulary) log-probabilities;
    from 0 to 1, where they are equal (1 - total variation distance)."""
    return float(torch.minimum(reference, found).exp().sum(-1).mean())


def search(
    worth: Callable[[Counts], float], layers: int, experts: int, total: int, least: int, *, generations: int = 25,
    population: int = 16, survivors: int = 4, largest_move: int = 4, moves: int = 3, seed: int = 0,
) -> tuple[Counts, float]:  # fmt: skip
    """Counts by layer that sum to ``total``, each from ``least`` (the top-k) to ``experts``, of the largest ``worth``,
    and what they are worth. The uniform counts are among the first candidates, so the result is never worth less.

    In every generation the best ``survivors`` stay, and ``population`` others are made from them: up to ``moves`` times
    1 to ``largest_move`` experts go from one layer to another. ValueError where no counts sum to ``total``."""
    if not layers * least <= total <= layers * experts:
        raise ValueError(f"{layers} layers of {least} to {experts} experts cannot keep {total}")
    random = np.random.default_rng(seed)
    uniform = tuple(total // layers + (layer < total % layers) for layer in range(layers))
    known: dict[Counts, float] = {}

    def rank(counts: Counts) -> tuple[float, Counts]:
        if counts not in known:
            known[counts] = worth(counts)
        return -known[counts], counts

    def moved(counts: Counts, times: int) -> Counts:
        found = list(counts)
        for _ in range(times):
            giver, taker = random.choice(layers, 2, replace=False)
            size = min(int(random.integers(1, largest_move + 1)), found[giver] - least, experts - found[taker])
            found[giver] -= size
            found[taker] += size
        return tuple(found)

    pool = {uniform}
    if layers > 1:
        # the first ones: from the uniform counts as far away as several generations would go
        pool |= {moved(uniform, 2 * layers) for _ in range(population)}
        for _ in range(generations):
            best = sorted(pool, key=rank)[:survivors]
            pool = {*best, *(moved(best[int(random.integers(len(best)))], int(random.integers(1, moves + 1)))
                             for _ in range(population))}  # fmt: skip
    found = min(pool, key=rank)
    return found, known[found]
