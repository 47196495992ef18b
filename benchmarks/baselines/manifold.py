"""Whether the experts of a layer keep their spread: the functional subspace of the REAP paper (arXiv 2510.13999), the
experts' mean activations on the first two principal components of the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from merging import distinct
from torch import Tensor
from whole import Seen, moe_layers, one_expert


class Plane(NamedTuple):
    """The first two principal components of a layer's experts: ``centre`` (hidden,), ``axes`` (2, hidden), and the
    share of the variance that they explain."""

    centre: Tensor
    axes: Tensor
    explained: float

    def place(self, points: Tensor) -> Tensor:
        """(points, 2) where points (points, hidden) lie on it."""
        return (points - self.centre) @ self.axes.T


@torch.inference_mode()
def activations(model: Any, seen: Mapping[int, Seen], layer: int) -> tuple[Tensor, Tensor]:
    """(distinct experts, hidden) mean output of each expert over the tokens routed to it, float64, and (distinct
    experts,) the number of these tokens. ``seen``: of this model, so that they are the tokens that it routes there
    itself. Experts that were merged are one, over all tokens that come to any of them; those that no token comes to
    are left out."""
    block, of = dict(moe_layers(model))[layer], seen[layer]
    numbers = distinct(block.experts)
    means, used = [], []
    for number in range(int(numbers.max()) + 1):
        members = (numbers == number).nonzero()[:, 0]
        rows = torch.isin(of.chosen, members).any(dim=1)
        if bool(rows.any()):
            means.append(one_expert(block.experts, int(members[0]), of.inputs[rows]).double().mean(dim=0))
            used.append(float(rows.sum()))
    return torch.stack(means), torch.tensor(used, dtype=torch.float64)


def shares(places: Tensor, used: Tensor | None) -> Tensor:
    """(points, 1) weight of each point: equal ones, or by ``used`` (points,)."""
    weights = torch.ones(len(places), dtype=places.dtype) if used is None else used.to(places.dtype)
    return (weights / weights.sum())[:, None]


def plane_of(points: Tensor, used: Tensor | None = None) -> Plane:
    """The plane of (points, hidden), weighted by ``used`` (points,), if given; with fewer than three points some of it
    is arbitrary."""
    weights = shares(points, used)
    centre = (weights * points).sum(dim=0)
    _, sizes, axes = torch.linalg.svd(weights.sqrt() * (points - centre), full_matrices=False)
    power = sizes.square()
    return Plane(centre, axes[:2], float(power[:2].sum() / power.sum().clamp_min(1e-300)))


def spread(places: Tensor, used: Tensor | None = None) -> float:
    """Root mean square distance of (points, dimensions) from their middle; both weighted by ``used`` (points,), if
    given."""
    weights = shares(places, used)
    return float((weights * (places - (weights * places).sum(dim=0)).square()).sum().sqrt())


def off(points: Tensor, originals: Tensor) -> float:
    """Root mean square distance of (points, dimensions) from the nearest of the originals: 0 where experts are left as
    they were."""
    return float(torch.cdist(points, originals).min(dim=1).values.square().mean().sqrt())
