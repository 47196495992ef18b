"""Which experts stay: a value per expert from the recorded sums, and the largest values win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerSpec
from reapc.errors import ReapcError
from reapc.observe.scores import Scores

if TYPE_CHECKING:
    from reapc.checkpoint.reader import Checkpoint

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


def groups_of(spec: ModelSpec, dissolve: bool = False) -> int:
    """Groups that must keep equal counts: the router's where it looks into some of them only, else 1. ``dissolve``: the
    groups are given up."""
    return spec.n_group if spec.topk_group < spec.n_group and not dissolve else 1


def check_count(spec: ModelSpec, count: int, dissolve: bool = False, where: str = "") -> None:
    """ReapcError names the nearest counts that the router's groups can hold, unless ``count`` is one."""
    if dissolve or spec.fits_groups(count):
        return
    possible = [n for n in range(1, spec.num_experts + 1) if spec.fits_groups(n)]
    near = [*(n for n in possible[::-1] if n < count), None][:1] + [*(n for n in possible if n > count), None][:1]
    raise ReapcError(
        f"{where}{count} experts do not fill the router's {spec.n_group} groups equally, {spec.topk_group} of which "
        f"have to hold the {spec.top_k} experts of a token",
        hint=f"keep {' or '.join(str(n) for n in near if n is not None)} (a multiple of {spec.n_group}, at least "
        f"{possible[0]}), or give up the groups with dissolve_groups, which changes the routing",
    )


def check_groups(spec: ModelSpec, kept: dict[int, list[int]], dissolve: bool = False) -> None:
    """ReapcError where the router's groups cannot hold what is kept.

    The router cuts the kept experts, in their order, into n_group equal parts. Where it chooses among few of them
    (topk_group < n_group), each part must be what is left of one group of the original.
    """
    if spec.n_group == 1 or dissolve:
        return
    size = spec.num_experts // spec.n_group
    for layer, experts in kept.items():
        check_count(spec, len(experts), where=f"layer {layer}: ")
        counts, each = Counter(e // size for e in experts), len(experts) // spec.n_group
        if groups_of(spec) > 1 and any(counts[group] != each for group in range(spec.n_group)):
            raise ReapcError(
                f"layer {layer}: the experts kept are {[counts[group] for group in range(spec.n_group)]} of the "
                f"router's {spec.n_group} groups of {size}; it looks into {spec.topk_group} groups for every token and "
                "takes them to be equal",
                hint=f"keep {each} of every group",
            )


def best_of(values: NDArray[Any], kept: int, groups: int = 1) -> list[int]:
    """The experts of the largest ``values``, in their original order; ties go to the lower index.

    ``groups``: so many equal runs of neighbours each keep kept / groups of their own."""
    if kept % groups:
        raise ReapcError(f"{kept} experts do not divide into {groups} groups", hint=f"a multiple of {groups} is needed")
    parts = values.reshape(groups, -1)
    order = np.argsort(-parts, axis=1, kind="stable")[:, : kept // groups]
    return sorted((order + np.arange(groups)[:, None] * parts.shape[1]).ravel().tolist())


def expert_values(scores: Scores, criterion: str) -> dict[int, NDArray[Any]]:
    """What each expert of each observed layer is worth, (experts,) by layer."""
    return {layer: scores.layer(layer)[CRITERIA[criterion]] for layer in scores.layers}


def choose(scores: Scores, criterion: str, kept: int, groups: int = 1) -> dict[int, list[int]]:
    """The experts kept in each observed layer (``groups``: see ``groups_of``)."""
    return {layer: best_of(values, kept, groups) for layer, values in expert_values(scores, criterion).items()}


def router_norms(checkpoint: Checkpoint, layer: LayerSpec) -> NDArray[Any]:
    """The L2 norm of each expert's row of the router: a guess at its value where nothing was observed."""
    (router,) = (g for g in layer.kind.tensors if g.role == "router" and g.expert_axis == 0 and len(g.shape) == 1)
    weight = checkpoint.stored_tensor(f"{layer.prefix}.{router.name}").float()
    norms: NDArray[Any] = weight.norm(dim=1).numpy()
    return norms


def dropped_share(scores: Scores, criterion: str, kept: int, groups: int = 1) -> float:
    """Mean over layers of the share of routed saliency (sum of gate weight x norm) that leaves with the dropped."""
    return share_without(scores, choose(scores, criterion, kept, groups))


def share_without(scores: Scores, kept: Mapping[int, Sequence[int]]) -> float:
    """The same of given experts that stay, by layer."""
    shares = []
    for layer in scores.layers:
        mass = scores.layer(layer)["gate_norm_sum"]
        shares.append(1 - mass[list(kept[layer])].sum() / max(mass.sum(), 1e-300))
    return float(np.mean(shares))
