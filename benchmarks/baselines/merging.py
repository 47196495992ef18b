"""Merging of experts: M-SMoE and HC-SMoE. All experts keep their place, and those of a group share one set of weights.

M-SMoE (Li et al., arXiv 2310.01334): the most used experts stay; every other joins the one of them whose router logits
are most like its own, its hidden units are put in the order that fits (linear assignment), and the weights are averaged
by how often each expert is used. HC-SMoE (Chen et al., arXiv 2410.08589): experts whose mean outputs on the sample lie
close are clustered (average linkage) and averaged by use, their units in the order they have.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from whole import Seen, moe_layers, one_expert, seen_by


def frequency(seen: Seen, experts: int) -> Tensor:
    """(experts,) share of the routed tokens."""
    counts = torch.bincount(seen.chosen.flatten(), minlength=experts).float()
    return counts / counts.sum()


def by_router(seen: Seen, used: Tensor, groups: int) -> np.ndarray:
    """(experts,) group of each expert, M-SMoE's way."""
    dominant = torch.argsort(-used, stable=True)[:groups]
    logits = seen.logits.T / seen.logits.T.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = (logits @ logits[dominant].T).argmax(dim=1)
    found[dominant] = torch.arange(groups)
    return np.asarray(found)


def by_output(experts: Any, seen: Seen, count: int, groups: int) -> np.ndarray:
    """(experts,) group of each expert, HC-SMoE's way."""
    means = torch.stack([one_expert(experts, index, seen.inputs).mean(dim=0) for index in range(count)])
    return np.asarray(fcluster(linkage(means.double().numpy(), "average"), groups, "maxclust") - 1)


def aligned(gate_up: Tensor, down: Tensor, to_gate_up: Tensor, to_down: Tensor) -> tuple[Tensor, Tensor]:
    """An expert with its hidden units in the order in which they are most like another's."""
    units = [torch.cat([*g.chunk(2), d.T], dim=1) for g, d in ((gate_up, down), (to_gate_up, to_down))]
    _, order = linear_sum_assignment(-(units[1] @ units[0].T).double().numpy())
    return torch.cat([part[order] for part in gate_up.chunk(2)]), down[:, order]


@torch.inference_mode()
def merged(model: Any, ids: Tensor, groups: int, method: str) -> Any:
    """A copy whose experts are merged to ``groups`` in each layer; ``method``: "m-smoe" or "hc-smoe"."""
    seen, result = seen_by(model, ids), copy.deepcopy(model)
    for index, block in moe_layers(result):
        experts, count = block.experts, len(block.experts.down_proj)
        used = frequency(seen[index], count)
        by_logits = method == "m-smoe"
        group = by_router(seen[index], used, groups) if by_logits else by_output(experts, seen[index], count, groups)
        gate_up, down = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
        for number in np.unique(group):
            members = np.flatnonzero(group == number)
            weights = used[members] + 1e-9
            weights = weights / weights.sum()
            leader = int(members[int(weights.argmax())])
            parts = [(experts.gate_up_proj[int(m)], experts.down_proj[int(m)]) for m in members]
            if by_logits:
                parts = [aligned(*part, experts.gate_up_proj[leader], experts.down_proj[leader]) for part in parts]
            gate_up[members] = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
            down[members] = sum(w * part[1] for w, part in zip(weights, parts, strict=True))
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up, False), nn.Parameter(down, False)
    return result
