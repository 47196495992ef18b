"""The experts of the first and the last MoE layer on the original's plane, and the drift by position, as one SVG file
that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from reapc.checkpoint.atomic import write_text
from reapc.report.page import STYLE
from reapc.report.svg import SERIES, WIDTH, Plot, marker

HEIGHT, MARGIN = 250.0, 24.0

Places = Sequence[Sequence[float]]  # (experts, 2)


def _cell(part: Markup, column: int, row: int) -> Markup:
    x, y = column * (WIDTH + MARGIN) + MARGIN, row * (HEIGHT + MARGIN) + 2 * MARGIN
    return Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(x, y, WIDTH, HEIGHT, part)


def _ends(places: Mapping[str, Places]) -> list[tuple[float, float]]:
    """The ends of both axes, for all plots of a row."""
    every = np.array([place for own in places.values() for place in own])
    low, high = every.min(axis=0), every.max(axis=0)
    pad = 0.06 * np.maximum(high - low, 1e-9)
    return [(float(a), float(b)) for a, b in zip(low - pad, high + pad, strict=True)]


def _experts(title: str, original: Places, own: Places, ends: list[tuple[float, float]], series: int) -> Markup:
    """The experts of one model over those of the original."""
    plot = Plot.of(title, ends[0], ends[1], height=HEIGHT, x_label="component 1", y_label=title)
    for x, y in original:
        plot.mark(x, y, "an expert of the original", 4)
    for x, y in own if series != 4 else ():
        plot.mark(x, y, title, series)
    return plot.render()


def write_plot(
    path: Path, heading: str, planes: Mapping[str, Mapping[str, Places]], drifts: Mapping[str, Sequence[float]]
) -> None:
    """Writes the SVG. ``planes``: by the name of a row and of a model, "original" first, where its experts lie;
    ``drifts``: by model, the Jensen-Shannon divergence in nats by position of the greedy continuations."""
    names = [name for name in next(iter(planes.values())) if name != "original"]
    series = {name: number % (SERIES - 2) for number, name in enumerate(names)}  # 4 is the original's grey
    cells = []
    for row, (about, places) in enumerate(planes.items()):
        ends = _ends(places)
        for column, (name, own) in enumerate(places.items()):
            title = f"{about}: {name}, {len(own)} experts"
            cells.append(_cell(_experts(title, places["original"], own, ends, series.get(name, 4)), column, row))
    longest = max(len(values) for values in drifts.values())
    top = max(float(np.max(values)) for values in drifts.values())
    plot = Plot.of(
        "Jensen-Shannon divergence by position", (1, longest), (0.0, top * 1.05), height=HEIGHT,
        x_label="token of the continuation", y_label="Jensen-Shannon divergence (nats)",
    )  # fmt: skip
    for name, values in drifts.items():
        plot.line([(i + 1, value) for i, value in enumerate(values)], series[name])
    keys = [
        Markup('{}<text x="{}" y="{}">{}</text>').format(marker(8, 20 * i + 20, series[name]), 20, 20 * i + 24, name)
        for i, name in enumerate(names)
    ]
    legend = Markup('<svg class="plot" viewBox="0 0 {} {}">{}</svg>').format(WIDTH, HEIGHT, Markup("").join(keys))
    cells += [_cell(plot.render(), 0, len(planes)), _cell(legend, 1, len(planes))]
    width = MARGIN + (len(names) + 1) * (WIDTH + MARGIN)
    height = 2 * MARGIN + (len(planes) + 1) * (HEIGHT + MARGIN)
    write_text(
        path,
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">'
            "<style>{style} svg.plot {{ max-width: none; height: 100%; }}</style>"
            '<rect width="{w}" height="{h}" style="fill: var(--ground)"/>'
            '<text x="{m}" y="28" style="font: 15px system-ui, sans-serif; fill: var(--text)">{heading}</text>{cells}'
            "</svg>\n"
        ).format(w=width, h=height, m=MARGIN, style=Markup(STYLE), heading=heading, cells=Markup("").join(cells)),
    )
