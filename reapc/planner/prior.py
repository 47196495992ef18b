"""What is expected before anything was measured: the loss (KL in nats per token) of quantizing and of pruning.

A prior, not a promise: fitted to a handful of published and own figures, off by a factor of several either way for a
given model. It only ranks configurations. Sources: facts/what-to-prune-and-quantize.md and reapc's small-model table.
Quantization, log-linear through KL at 4.5 bits .0043, 3.5 .0164, 2.5 .0806 and GLM-5.3-Flash EXL3 4.05 .0255,
3.0 .0505, 2.05 .122. Pruning, through prunes of 25 %: .0098, .036, .068, .357 (geometric mean .054; 1.5 * ratio**2
says .094, on the cautious side).
"""

from __future__ import annotations

from math import exp

UNQUANTIZED_BITS = 16.0


def quantization_loss(bits_per_expert_weight: float) -> float:
    """Expected KL of storing the experts in this many bits per weight; none at 16."""
    if bits_per_expert_weight >= UNQUANTIZED_BITS:
        return 0.0
    return exp(-3.47 - 1.217 * (bits_per_expert_weight - 3.27))


def pruning_loss(ratio: float) -> float:
    """Expected KL of dropping this fraction of every layer's experts."""
    return 1.5 * ratio**2


def measured_pruning_loss(ratio: float, dropped_share: float) -> float:
    """Expected KL of dropping experts that carried ``dropped_share`` of the routed saliency (sum of gate weight x
    norm). The prior's cost of that ratio, scaled by how much less than its even share (``ratio``) the dropped
    experts carried; benchmarks/prune_damage.py compares it with the KL found on the demo model."""
    return pruning_loss(ratio) * dropped_share / ratio if ratio else 0.0
