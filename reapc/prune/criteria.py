"""Which experts stay: a value per expert from the recorded sums, and the largest values win."""

from __future__ import annotations

from math import floor

import numpy as np

from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.observe.scores import Scores

CRITERIA = {
    "reap": "reap",
    "ean": "ean",
    "ean_sum": "norm_sum",
    "frequency": "routed_tokens",
    "weighted_sum": "gate_norm_sum",
}


def kept_count(num_experts: int, ratio: float) -> int:
    """Experts left of ``num_experts``: E - floor(E * ratio), as in every published REAP checkpoint."""
    return num_experts - floor(num_experts * ratio + 1e-9)


def check_kept(kept: int, num_experts: int, top_k: int) -> None:
    """ReapcError unless top_k <= kept <= num_experts."""
    if kept > num_experts:
        raise ReapcError(f"{kept} experts asked for, the model has {num_experts}")
    if kept < top_k:
        raise ReapcError(
            f"{kept} of {num_experts} experts are fewer than the top-k of {top_k} that every token is routed to",
            hint=f"keep at least {top_k}: a ratio of at most {(num_experts - top_k) / num_experts:.4g}",
        )


def groups_of(spec: ModelSpec) -> int:
    """Groups that must keep equal counts: the router's where it looks into some of them only, else 1."""
    return spec.n_group if spec.topk_group < spec.n_group else 1


def choose(scores: Scores, criterion: str, kept: int, groups: int = 1) -> dict[int, list[int]]:
    """The experts kept in each MoE layer, in their original order; ties go to the lower index.

    ``groups`` (see ``groups_of``): so many equal runs of neighbours each keep kept / groups of their own."""
    if kept % groups:
        raise ReapcError(f"{kept} experts do not divide into {groups} groups", hint=f"a multiple of {groups} is needed")
    chosen = {}
    for layer in scores.layers:
        values = scores.layer(layer)[CRITERIA[criterion]].reshape(groups, -1)
        order = np.argsort(-values, axis=1, kind="stable")[:, : kept // groups]
        chosen[layer] = sorted((order + np.arange(groups)[:, None] * values.shape[1]).ravel().tolist())
    return chosen


def dropped_share(scores: Scores, criterion: str, kept: int, groups: int = 1) -> float:
    """Mean over layers of the share of routed saliency (sum of gate weight x norm) that leaves with the dropped."""
    shares = []
    for layer, experts in choose(scores, criterion, kept, groups).items():
        mass = scores.layer(layer)["gate_norm_sum"]
        shares.append(1 - mass[experts].sum() / max(mass.sum(), 1e-300))
    return float(np.mean(shares))
