"""Merging of experts: M-SMoE and HC-SMoE. All experts keep their place and their row of the router, and those of a
group share one set of weights: a token that is routed to several of a group gets the merged expert with the sum of
their gate weights. Neither method is retrained here, as in the comparison of the REAP paper.

M-SMoE (Li et al., arXiv 2310.01334): the experts used most, counted over the whole model, are dominant, so layers keep
different numbers (at least one each). Every other joins the dominant expert of its layer whose router logits over the
sample are most like its own (cosine); its hidden units are put in the order in which its gate, up and down weights lie
nearest to the dominant's (linear assignment); then the weights are averaged by how often each expert is used.

HC-SMoE (Chen et al., arXiv 2410.08589): each layer keeps the same number. Experts are clustered (average linkage,
Euclidean) by their mean output over all tokens of the sample, whether routed to them or not, and averaged by use, with
their hidden units in the order that they have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from whole import Seen, moe_layers

METHODS = ("m-smoe", "hc-smoe")


def frequency(seen: Seen) -> Tensor:
    """(experts,) share of the layer's routed pairs, float64."""
    counts = torch.bincount(seen.chosen.flatten(), minlength=seen.logits.shape[1]).double()
    return counts / counts.sum()


def dominant(used: Mapping[int, Tensor], groups: int) -> dict[int, list[int]]:
    """M-SMoE's dominant experts by layer: the most used of each, and the most used of all others until there are
    ``groups`` times the layers. ``used``: (experts,) share of the layer's routed pairs."""
    found = {layer: [int(shares.argmax())] for layer, shares in used.items()}
    others = [
        (-float(share), layer, expert)
        for layer, shares in used.items()
        for expert, share in enumerate(shares)
        if expert not in found[layer]
    ]
    for _, layer, expert in sorted(others)[: groups * len(used) - len(used)]:
        found[layer].append(expert)
    return {layer: sorted(experts) for layer, experts in found.items()}


def by_router(logits: Tensor, leaders: list[int]) -> np.ndarray:
    """(experts,) group of each expert, M-SMoE's way: the place in ``leaders`` of the one most like it.
    ``logits``: (tokens, experts)."""
    rows = logits.T / logits.T.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = (rows @ rows[leaders].T).argmax(dim=1)
    found[leaders] = torch.arange(len(leaders))
    return np.asarray(found)


def mean_outputs(experts: Any, inputs: Tensor) -> Tensor:
    """(experts, hidden) mean output of each expert over all ``inputs`` (tokens, hidden), float64. The down projection
    is linear, so it is taken of the mean."""
    means = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
        means.append(down.double() @ (experts.act_fn(gate) * up).double().mean(dim=0))
    return torch.stack(means)


def by_output(experts: Any, inputs: Tensor, groups: int) -> np.ndarray:
    """(experts,) group of each expert, HC-SMoE's way."""
    tree = linkage(mean_outputs(experts, inputs).numpy(), "average")
    return np.asarray(cut_tree(tree, groups)[:, 0])


def aligned(gate_up: Tensor, down: Tensor, to_gate_up: Tensor, to_down: Tensor) -> tuple[Tensor, Tensor]:
    """An expert with its hidden units in the order in which they are nearest to another's: the least sum of squared
    distances of their gate, up and down weights, which is the largest sum of products: no order changes the norms."""
    units = [torch.cat([*g.chunk(2), d.T], dim=1).double() for g, d in ((gate_up, down), (to_gate_up, to_down))]
    _, order = linear_sum_assignment((units[1] @ units[0].T).numpy(), maximize=True)
    return torch.cat([part[order] for part in gate_up.chunk(2)]), down[:, order]


def average(experts: Any, members: list[int], used: Tensor, align: bool) -> tuple[Tensor, Tensor]:
    """gate_up and down weights of the experts ``members`` averaged by ``used`` (experts,); equal shares where none was
    ever used. ``align``: to the most used of them."""
    weights = used[members] if float(used[members].sum()) > 0 else torch.ones(len(members), dtype=torch.float64)
    leader = members[int(weights.argmax())]
    base = experts.gate_up_proj[leader], experts.down_proj[leader]
    gate_up, down = (torch.zeros_like(part, dtype=torch.float64) for part in base)
    for member, weight in zip(members, (weights / weights.sum()).tolist(), strict=True):
        own = experts.gate_up_proj[member], experts.down_proj[member]
        part = aligned(*own, *base) if align and member != leader else own
        gate_up += weight * part[0]
        down += weight * part[1]
    return gate_up.to(base[0].dtype), down.to(base[1].dtype)


@torch.inference_mode()
def merged(model: Any, seen: Mapping[int, Seen], groups: int, method: str) -> Any:
    """A copy whose experts are merged to ``groups`` a layer (M-SMoE: on average). ``seen``: of the model on the
    calibration sample; ``method``: one of ``METHODS``."""
    if method not in METHODS:
        raise ValueError(f"{method!r}: one of {', '.join(METHODS)} is expected")
    result = copy.deepcopy(model)
    by_logits = method == "m-smoe"
    used = {index: frequency(layer) for index, layer in seen.items()}
    leaders = dominant(used, groups)
    for index, block in moe_layers(result):
        experts, layer = block.experts, seen[index]
        group = by_router(layer.logits, leaders[index]) if by_logits else by_output(experts, layer.inputs, groups)
        gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
        for number in np.unique(group):
            members = np.flatnonzero(group == number).tolist()
            gate_up[members], down[members] = average(experts, members, used[index], align=by_logits)
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up, False), nn.Parameter(down, False)
    return result


def distinct(experts: Any) -> Tensor:
    """(experts,) number of the set of weights that each place has: merged experts share theirs."""
    weights = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1)
    same = torch.stack([(weights == row).all(dim=1) for row in weights])
    return torch.unique(same.int().argmax(dim=1), return_inverse=True)[1]
