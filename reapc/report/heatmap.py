"""Experts of every layer as an image of one pixel each: blue stays, orange is pruned, darker is more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reapc.report import png

_STEPS = 64
_KEPT = [(214, 230, 245), (107, 161, 209), (33, 91, 156), (8, 41, 92)]
_PRUNED = [(250, 195, 130), (238, 138, 52), (190, 84, 10), (112, 40, 0)]
_NONE = (122, 122, 122)
PALETTE = np.concatenate([png.ramp(_KEPT, _STEPS), png.ramp(_PRUNED, _STEPS), np.array([_NONE], np.uint8)])
_NEVER = 2 * _STEPS


def css(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def legend() -> dict[str, str]:
    """Backgrounds of the legend's swatches."""
    kept, pruned = (", ".join(map(css, colours)) for colours in (_KEPT, _PRUNED))
    return {
        "kept": f"linear-gradient(to right, {kept})",
        "pruned": f"linear-gradient(to right, {pruned})",
        "never": css(_NONE),
    }


@dataclass(frozen=True)
class HeatMap:
    """An image as a data URI, with what the page draws around it. ``cut``: a path in percent of the image, where the
    kept end; ``ticks``: (percent from the top, layer) and (percent from the left, expert)."""

    alt: str
    source: str
    width: int
    height: int
    cut: str
    layers: list[tuple[float, str]]
    experts: list[tuple[float, str]]
    lowest: float  # the value of the palest colour, the darkest is 1


def heat_map(
    values: Mapping[int, np.ndarray], kept: Mapping[int, Sequence[int]], used: Mapping[int, np.ndarray], what: str, *,
    ranked: bool,
) -> HeatMap:  # fmt: skip
    """``values`` by layer, (experts,), each a row in proportion to its largest, on a logarithmic scale.

    ``kept``: the experts that stay, by layer (all where a layer is not named); ``used``: which were ever routed to, by
    layer, (experts,) bool; the others are grey. ``ranked``: the largest first and a line where the kept end, else by
    the expert's number."""
    layers = sorted(values)
    experts = max(len(values[layer]) for layer in layers)
    shares = {layer: values[layer] / max(float(values[layer].max()), 1e-300) for layer in layers}
    positive = np.concatenate([share[share > 0] for share in shares.values()])
    lowest = float(np.clip(np.quantile(positive, 0.05), 1e-4, 0.5)) if positive.size else 0.5
    pixels = np.full((len(layers), experts), _NEVER, np.uint8)
    ends = []
    for row, layer in enumerate(layers):
        share, stays = shares[layer], np.zeros(len(shares[layer]), bool)
        stays[list(kept.get(layer, range(len(share))))] = True
        steps = np.log(np.clip(share, lowest, 1) / lowest) / -np.log(lowest) * (_STEPS - 1)
        colours = steps.round().astype(int) + np.where(stays, 0, _STEPS)
        colours[~used[layer]] = _NEVER
        # what stays first, each part by value: where groups of the router decide, a kept one may be worth less
        order = np.lexsort((-share, ~stays)) if ranked else np.arange(len(share))
        pixels[row, : len(share)] = colours[order]
        ends.append(int(stays.sum()))
    alt = (
        f"{what} of {experts} experts in each of {len(layers)} layers, "
        + ("the largest first" if ranked else "by the expert's number")
        + f"; {sum(ends)} stay, {sum(len(v) for v in values.values()) - sum(ends)} are pruned"
    )
    return HeatMap(
        alt, png.data_uri(pixels, PALETTE), experts, len(layers),
        _cut(ends, experts) if ranked and min(ends) < experts else "",
        _spread([str(layer) for layer in layers], 9),
        _spread([str(i + 1 if ranked else i) for i in range(experts)], 7), lowest,
    )  # fmt: skip


def _spread(names: Sequence[str], most: int) -> list[tuple[float, str]]:
    """Names at the middles of equal cells in percent: at most so many, evenly apart, the first and the last."""
    chosen = sorted({round(i * (len(names) - 1) / max(1, most - 1)) for i in range(min(most, len(names)))})
    if len(names) <= most:
        chosen = list(range(len(names)))
    return [(100 * (i + 0.5) / len(names), names[i]) for i in chosen]


def _cut(ends: Sequence[int], experts: int) -> str:
    """An SVG path down the rows at the right edge of what stays, in a drawing of 100 x 100."""
    path: list[str] = []
    height = 100 / len(ends)
    for row, end in enumerate(ends):
        x = 100 * end / experts
        path.append(f"{'M' if not path else 'L'}{x:.3f} {row * height:.3f}L{x:.3f} {(row + 1) * height:.3f}")
    return "".join(path)
