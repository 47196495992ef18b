"""The frontier: KL against bytes, of every configuration that somebody measured on one panel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reapc.checkpoint.atomic import write_text
from reapc.report.svg import SERIES, Plot, figures, marker, svg


class Point(BaseModel):
    """One configuration. ``bytes`` of its file, ``kl`` in nats per token with the ends of its interval (over sequences;
    None where there is none); ``label`` says what it is, ``series`` which line it belongs to. ``here``: the build whose
    report shows the plot."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bytes: int = Field(gt=0)
    kl: float = Field(ge=0, allow_inf_nan=False)
    label: str
    low: float | None = Field(default=None, allow_inf_nan=False)
    high: float | None = Field(default=None, allow_inf_nan=False)
    series: str = ""
    here: bool = False


_POINTS = TypeAdapter(list[Point])


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Writes frontier.json; put beside the builds' folders, their reports show it (``reapc report`` draws it anew)."""
    write_text(path, json.dumps([point.model_dump() for point in points], indent=2) + "\n")


def read_points(path: Path) -> list[Point]:
    """The points of a frontier.json; ValueError where it is none."""
    try:
        return _POINTS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{path}: not a list of points: {error}") from error


def best_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats: by bytes, each with less KL than every smaller one."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.kl)):
        if not found or point.kl < found[-1].kl:
            found.append(point)
    return found


def frontier(points: Sequence[Point], title: str = "KL against bytes") -> Markup:
    """The plot as inline SVG, KL on a logarithmic axis: a mark per point with its interval, and a line through the best
    of every series. Styled by the page's style sheet (``page.STYLE``). ValueError without a point."""
    if not points:
        raise ValueError("a frontier needs a point")
    names = series_of(points)
    positive = [v for p in points for v in (p.kl, p.low, p.high) if v is not None and v > 0]
    floor = min(positive, default=1e-6)
    sizes = [p.bytes for p in points]
    unit, divisor = _unit(max(sizes))
    width = (max(sizes) - min(sizes)) / divisor
    margin = 0.04 * width
    plot = Plot.of(
        title, (min(sizes) / divisor - margin, max(sizes) / divisor + margin),
        (floor / 1.15, max(positive, default=1.0) * 1.15), height=280, y_log=True, x_label=f"{unit} of weights",
        y_label="KL in nats per token (logarithmic)",
    )  # fmt: skip
    for number, name in enumerate(names):
        mine = [p for p in points if p.series == name]
        plot.line([(p.bytes / divisor, max(p.kl, floor)) for p in best_of(mine)], number)
        for p in mine:
            if p.low is not None and p.high is not None:
                plot.whisker(p.bytes / divisor, max(p.low, floor), max(p.high, floor), number)
            said = f"{p.label}: KL {figures(p.kl)} at {figures(p.bytes / divisor)} {unit}"
            plot.mark(p.bytes / divisor, max(p.kl, floor), said, number, p.here)
    return plot.render()


def series_of(points: Sequence[Point]) -> list[str]:
    """The names of the series, in the order that they come."""
    return list(dict.fromkeys(point.series for point in points))


def legend(points: Sequence[Point]) -> list[tuple[Markup, str]]:
    """A mark and the name of every series."""
    return [(key(number, name), name or "measured") for number, name in enumerate(series_of(points))]


def key(series: int, name: str) -> Markup:
    """The mark of a series by itself."""
    return Markup('<span class="key">{}</span>').format(
        svg(f"mark of {name or 'the points'}", 14, 14, [marker(7, 7, series % SERIES)])
    )


def _unit(most: float) -> tuple[str, float]:
    for name, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if most >= 2**power:
            return name, float(2**power)
    return "bytes", 1.0
