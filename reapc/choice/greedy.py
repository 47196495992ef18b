"""Greedy removal: the expert goes whose absence changes the layer's output least, given what went before and what the
router then sends in its place. What reap and the sums cannot see, that another expert can stand in, counts here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reapc.errors import CannotBeDone

# (rows (n,), gone (experts,)) -> indices (n, top_k), gate weights (n, top_k)
Route = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_ROWS = 4096


def greedy_kept(
    outputs: torch.Tensor, route: Route, kept: int, groups: int = 1, protected: tuple[int, ...] = ()
) -> list[int]:
    """The ``kept`` experts that are left, in their order.

    ``outputs`` (tokens, experts, d): every expert's output on every token of the sample, or a random projection of it.
    Each of ``groups`` equal runs of neighbours keeps the same number; ``protected`` experts stay.

    Loss of a set S: sum over tokens of |out(S) - out(all)|^2 / (|out(all)|^2 + its mean over tokens), where out(S) is
    what the router makes of the experts in S: a relative error, in which neither outliers nor tokens with hardly any
    output weigh more than others. What an expert's removal adds is counted on the tokens that are sent to it; what it
    does to others (gate weights that are not normalized, groups) is counted once it is gone."""
    tokens, experts, _ = outputs.shape
    device = outputs.device
    everything = torch.arange(tokens, device=device)
    gone = torch.zeros(experts, dtype=torch.bool, device=device)
    target = _mixed(outputs, everything, *route(everything, gone))
    norms = target.square().sum(dim=1)
    weight = 1 / (norms + norms.mean()).clamp(min=1e-30)
    guarded = set(protected)
    size = experts // groups
    left = [size] * groups
    for _ in range(experts - kept):
        index, weights = route(everything, gone)
        now = (_mixed(outputs, everything, index, weights) - target).square().sum(dim=1) * weight
        best, lowest = -1, float("inf")
        for expert in range(experts):
            if gone[expert] or expert in guarded or left[expert // size] == kept // groups:
                continue
            rows = (index == expert).any(dim=1).nonzero()[:, 0]
            rise = 0.0
            if len(rows):
                gone[expert] = True
                without = _mixed(outputs, rows, *route(rows, gone))
                gone[expert] = False
                rise = float(((without - target[rows]).square().sum(dim=1) * weight[rows] - now[rows]).sum())
            if rise <= lowest:  # of equals the one with the highest number
                best, lowest = expert, rise
        if best < 0:
            raise CannotBeDone("no expert may go any more: too many are protected")
        gone[best] = True
        left[best // size] -= 1
    return torch.nonzero(~gone)[:, 0].tolist()


def _mixed(outputs: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(rows, d): sum over the experts chosen of gate weight x output."""
    index = index.long()
    parts = [
        torch.einsum(
            "nk,nkd->nd", weights[at : at + _ROWS], outputs[rows[at : at + _ROWS, None], index[at : at + _ROWS]]
        )
        for at in range(0, len(rows), _ROWS)
    ]
    return torch.cat(parts)
