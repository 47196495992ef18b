"""Super experts: the few whose outputs carry a model's massive activations, and without which it breaks down (Su et
al., "Unveiling Super Experts in Mixture-of-Experts Large Language Models", 2025).

Their rule, on the largest absolute output of every expert: above the 99.5 % quantile of all experts of all layers,
and above a tenth of the largest. A quantile always finds somebody, so here it must also be above ten times the median.
"""

from __future__ import annotations

import numpy as np

from reapc.observe.scores import Scores

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1
TIMES_MEDIAN = 10.0


def super_experts(scores: Scores) -> dict[int, dict[int, float]]:
    """Largest absolute output of each super expert, by layer and expert."""
    largest = {layer: scores.layer(layer)["max_activation"] for layer in scores.layers}
    seen = np.concatenate([values[values > 0] for values in largest.values()] or [np.zeros(0)])
    if not len(seen):
        return {}
    line = max(np.quantile(seen, QUANTILE), SHARE_OF_LARGEST * seen.max(), TIMES_MEDIAN * np.median(seen))
    found = {
        layer: {int(expert): float(values[expert]) for expert in np.flatnonzero(values > line)}
        for layer, values in largest.items()
    }
    return {layer: experts for layer, experts in found.items() if experts}
