"""Whether more or other calibration text would drop other experts: read off the parts of a scores file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reapc.observe.accumulate import PARTS, ROUTING
from reapc.observe.scores import Scores, with_means
from reapc.prune.criteria import CRITERIA, best_of

# Domains whose prune sets share less than this much beyond chance are named.
_DISAGREE = 0.5


@dataclass(frozen=True)
class Stability:
    """Overlaps are the share of the experts that one choice drops which the other drops too, mean over layers; chance
    would give ``chance`` (the share dropped).

    ``halves``: odd against even parts of the data. ``curve``: (sequences, tokens, overlap with the choice from all)
    for growing shares of the data. ``domains``: overlap of each pair of domains. ``unused``: experts by
    domain and layer that no token of the domain was routed to. ``dead``: their number by layer over all domains."""

    criterion: str
    kept: int
    chance: float
    halves: float | None
    curve: list[tuple[int, int, float]]
    domains: list[tuple[str, str, float]]
    unused: dict[str, dict[int, list[int]]]
    dead: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def disagreeing(self) -> list[tuple[str, str, float]]:
        """Pairs of domains that agree less than half as much as could be beyond chance."""
        line = self.chance + _DISAGREE * (1 - self.chance)
        return [pair for pair in self.domains if pair[2] < line]

    def lines(self) -> list[str]:
        """What a user has to know, in words."""
        said = []
        if self.halves is not None:
            said.append(
                f"two halves of the data drop the same experts to {100 * self.halves:.0f} % (by chance "
                f"{100 * self.chance:.0f} %)"
            )
        for a, b, overlap in self.disagreeing:
            said.append(
                f"the domains {a} and {b} drop the same experts to {100 * overlap:.0f} % only: the mix decides which "
                "of them is served"
            )
        for domain, layers in self.unused.items():
            count = sum(map(len, layers.values()))
            said.append(f"{count} experts in {len(layers)} layers were never used by the domain {domain}")
        if self.dead:
            most = max(self.dead.values())
            said.append(
                f"{sum(self.dead.values())} experts were never used at all (up to {most} in a layer): more text, or "
                "they are dead"
            )
        return said


def stability(scores: Scores, criterion: str, kept: int, groups: int = 1) -> Stability:
    """How the choice of ``kept`` experts by ``criterion`` depends on the data (``groups``: see ``groups_of``)."""
    count = int(scores.header["num_experts"])
    routing = {layer: {name: scores.routing(layer, name) for name in ROUTING} for layer in scores.layers}
    parts = scores.header.get("parts")
    tokens = np.asarray(parts, np.float64) if parts else np.zeros((len(scores.domains), 1))
    recorded = parts is not None and np.count_nonzero(tokens.sum(axis=0)) > 1

    def dropped(domains: slice | list[int], of_parts: slice | list[int]) -> dict[int, set[int]]:
        found = {}
        for layer, sums in routing.items():
            chosen = {
                name: values[domains][:, of_parts].max(axis=(0, 1))
                if name == "max_activation"
                else values[domains][:, of_parts].sum(axis=(0, 1))
                for name, values in sums.items()
            }
            values = with_means(chosen)[CRITERIA[criterion]]
            found[layer] = set(range(count)) - set(best_of(values, kept, groups))
        return found

    everything = slice(None)
    whole = dropped(everything, everything)
    names = scores.domains
    alone = {i: dropped([i], everything) for i in range(len(names))} if len(names) > 1 and kept < count else {}
    halves = curve = None
    if recorded and kept < count:
        halves = overlap(dropped(everything, slice(0, None, 2)), dropped(everything, slice(1, None, 2)))
        curve = [
            (
                round(np.asarray(scores.header["sequences"], np.float64)[:, :n].sum()),
                round(tokens[:, :n].sum()),
                overlap(dropped(everything, slice(0, n)), whole),
            )
            for n in (1, 2, 4, 6, PARTS)
        ]
    used = {layer: sums["routed_tokens"].sum(axis=1) for layer, sums in routing.items()}
    unused = {
        name: found
        for i, name in enumerate(names)
        if len(names) > 1
        and (found := {layer: n for layer, u in used.items() if (n := np.flatnonzero(u[i] == 0).tolist())})
    }
    dead = {layer: n for layer, u in used.items() if (n := int((u.sum(axis=0) == 0).sum()))}
    pairs = [(names[i], names[j], overlap(alone[i], alone[j])) for i in alone for j in alone if i < j]
    return Stability(criterion, kept, (count - kept) / count, halves, curve or [], pairs, unused, dead)


def overlap(a: dict[int, set[int]], b: dict[int, set[int]]) -> float:
    """The share of the experts dropped by ``a`` that ``b`` drops too, mean over layers; equal numbers are dropped."""
    return float(np.mean([len(a[layer] & b[layer]) / len(a[layer]) for layer in a]))
