"""Experts that saw too little calibration data to be quantized by what it says."""

from __future__ import annotations

from typing import Any

import numpy as np

from reapc.observe.scores import Scores

# GPTQModel 7.6 rounds a linear to nearest when fewer than 0.5 % of the calibration tokens reach it (its
# Fallback.threshold). The same line is drawn for AutoRound, which says nothing: the weights of an expert without
# tokens get no gradient and stay rounded to nearest.
STARVED_SHARE = 0.005
NAMED = 8  # experts named in the summary


def starved(scores: Scores, share: float = STARVED_SHARE) -> dict[str, Any]:
    """Experts that fewer than ``share`` of the calibration tokens are routed to, from ``scores`` of the very model
    that is quantized.

    ``layers``: layer -> expert -> its tokens; ``count``, ``experts`` (of how many), ``threshold_tokens``, ``fewest``
    (the smallest number of tokens of any expert), and ``summary`` in words."""
    tokens = int(scores.header["tokens"])
    threshold = share * tokens
    layers: dict[str, dict[str, int]] = {}
    total, fewest = 0, tokens
    for index in scores.layers:
        routed = np.asarray(scores.layer(index)["routed_tokens"]).astype(np.int64)
        total += len(routed)
        fewest = min(fewest, int(routed.min()))
        few = np.flatnonzero(routed < threshold)
        if len(few):
            layers[str(index)] = {str(int(expert)): int(routed[expert]) for expert in few}
    count = sum(len(experts) for experts in layers.values())
    return {
        "threshold_share": share,
        "threshold_tokens": threshold,
        "calibration_tokens": tokens,
        "experts": total,
        "fewest": fewest,
        "count": count,
        "layers": layers,
        "summary": _summary(layers, count, total, threshold, share, tokens),
    }


def _summary(
    layers: dict[str, dict[str, int]], count: int, total: int, threshold: float, share: float, tokens: int
) -> str:
    if not count:
        return f"every expert saw at least {100 * share:g} % of the {tokens} calibration tokens"
    pairs = sorted((routed, int(layer), int(expert)) for layer, of in layers.items() for expert, routed in of.items())
    named = ", ".join(f"{layer}.{expert} ({routed})" for routed, layer, expert in pairs[:NAMED])
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return (
        f"{count} of {total} experts saw fewer than {threshold:.0f} of the {tokens} calibration tokens "
        f"({100 * share:g} %), too few to quantize them by; LAYER.EXPERT (tokens): {named}{more}. "
        "More calibration text, or pruning more, helps"
    )
