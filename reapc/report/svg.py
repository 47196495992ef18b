"""Plots as inline SVG: plain shapes whose colours come from the page's style sheet, so that they follow light and dark.

Everything that is written into them is escaped. Sizes are in units of a drawing 360 wide; the page scales it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

WIDTH = 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 10.0, 34.0
SERIES = 6  # classes c0 .. c5 of the style sheet
_SHAPES = SERIES


def number(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def figures(value: float) -> str:
    """A value on an axis: three figures, no exponent where it is readable without."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten (powers alone where these are many), between ``low`` and ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
        if len(found) <= 7:
            return found
    return found[:: math.ceil(len(found) / 7)]


@dataclass
class Axis:
    """Values to places, in a drawing's units; ``log``: equal factors are equally far apart."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    label: str = ""
    format: Callable[[float], str] = figures
    marks: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.high > self.low:  # one value: in the middle
            spread = abs(self.low) or 1.0
            self.low, self.high = (self.low / 2, self.low * 2) if self.log else (self.low - spread, self.low + spread)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.marks is not None:
            return list(self.marks)
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


@dataclass
class Plot:
    """A drawing with two axes. ``title`` is what a screen reader says of it."""

    title: str
    x: Axis
    y: Axis
    height: float = 220.0
    parts: list[Markup] = field(default_factory=list)

    @staticmethod
    def of(
        title: str, xs: tuple[float, float], ys: tuple[float, float], *, height: float = 220.0, x_log: bool = False,
        y_log: bool = False, x_label: str = "", y_label: str = "", x_format: Callable[[float], str] = figures,
        y_format: Callable[[float], str] = figures, x_marks: Sequence[float] | None = None,
    ) -> Plot:  # fmt: skip
        """Axes from (lowest, highest) value each."""
        x = Axis(*xs, _LEFT, WIDTH - _RIGHT, x_log, x_label, x_format, x_marks)
        return Plot(title, x, Axis(*ys, height - _BOTTOM, _TOP + 12, y_log, y_label, y_format), height)

    def line(self, points: Sequence[tuple[float, float]], series: int = 0, dashed: bool = False) -> None:
        """A line through points in the axes' values."""
        if points:
            path = " ".join(f"{number(self.x.at(x))},{number(self.y.at(y))}" for x, y in points)
            name = f"line c{series % SERIES}" + (" dashed" if dashed else "")
            self.parts.append(Markup('<polyline class="{}" points="{}"/>').format(name, path))

    def area(self, points: Sequence[tuple[float, float, float]], series: int = 0) -> None:
        """What lies between the two heights of (x, low, high)."""
        if points:
            ring = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
            path = " ".join(f"{number(self.x.at(x))},{number(self.y.at(y))}" for x, y in ring)
            self.parts.append(Markup('<polygon class="area c{}" points="{}"/>').format(series % SERIES, path))

    def whisker(self, x: float, low: float, high: float, series: int = 0) -> None:
        """An interval at ``x``."""
        at = number(self.x.at(x))
        self.parts.append(
            Markup('<line class="line c{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                series % SERIES, at, at, number(self.y.at(low)), number(self.y.at(high))
            )
        )

    def mark(self, x: float, y: float, title: str, series: int = 0, big: bool = False) -> None:
        """A point; each series has a shape of its own beside its colour. ``title`` shows where a pointer rests."""
        self.parts.append(marker(self.x.at(x), self.y.at(y), series, title, 6.5 if big else 4.0, "ring" if big else ""))

    def column(self, left: float, right: float, value: float, series: int = 0, title: str = "") -> None:
        """A column from 0 to ``value`` between two places of the x axis."""
        start, end = self.x.at(left), self.x.at(right)
        top, bottom = sorted((self.y.at(value), self.y.at(max(0.0, self.y.low))))
        self.parts.append(
            Markup('<rect class="fill c{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                series % SERIES, number(start), number(top), number(max(end - start, 0.4)), number(bottom - top), title
            )
        )

    def level(self, value: float, label: str) -> None:
        """A dashed line across at ``value`` with its name."""
        y = number(self.y.at(value))
        self.parts.append(
            Markup(
                '<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="end" x="{}" y="{}">{}</text>'
            ).format(self.x.start, self.x.end, y, y, self.x.end, number(self.y.at(value) - 4), label)
        )

    def render(self) -> Markup:
        """The ``<svg>`` element."""
        bottom = self.y.start
        axes = [Markup('<text class="axis" x="2" y="11">{}</text>').format(self.y.label)]
        for value in self.y.ticks:
            at = number(self.y.at(value))
            axes.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="end" x="{}" y="{}">{}</text>'
                ).format(
                    self.x.start, self.x.end, at, at, self.x.start - 4, number(self.y.at(value) + 3.5),
                    self.y.format(value),
                )
            )  # fmt: skip
        for value in self.x.ticks:
            at = number(self.x.at(value))
            axes.append(
                Markup('<line class="tick" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    at, at, number(bottom), number(bottom + 3)
                )
            )
            axes.append(
                Markup('<text class="middle" x="{}" y="{}">{}</text>').format(
                    at, number(bottom + 14), self.x.format(value)
                )
            )
        axes.append(
            Markup('<text class="axis middle" x="{}" y="{}">{}</text>').format(
                number((self.x.start + self.x.end) / 2), number(bottom + 29), self.x.label
            )
        )
        return svg(self.title, WIDTH, self.height, [*axes, *self.parts])


def marker(x: float, y: float, series: int, title: str = "", size: float = 4.0, extra: str = "") -> Markup:
    """The mark of a series: circle, square, diamond, triangle up and down, cross."""
    s = size
    shapes = (
        f"M{-s} 0a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        f"M{-s} {-s}h{2 * s}v{2 * s}h{-2 * s}z",
        f"M0 {-1.3 * s:.2f}L{1.3 * s:.2f} 0L0 {1.3 * s:.2f}L{-1.3 * s:.2f} 0z",
        f"M0 {-1.2 * s:.2f}L{1.2 * s:.2f} {s}H{-1.2 * s:.2f}z",
        f"M0 {1.2 * s:.2f}L{1.2 * s:.2f} {-s}H{-1.2 * s:.2f}z",
        f"M{-s} {-s}L{s} {s}M{-s} {s}L{s} {-s}",
    )
    kind = "cross" if series % SERIES == 5 else "fill"
    return Markup('<path class="{} c{} {}" transform="translate({} {})" d="{}"><title>{}</title></path>').format(
        kind, series % SERIES, extra, number(x), number(y), shapes[series % SERIES], title
    )


def svg(title: str, width: float, height: float, parts: Sequence[Any]) -> Markup:
    """An ``<svg>`` that scales with its place and that a screen reader reads as one image."""
    return Markup('<svg class="plot" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        title, number(width), number(height), Markup("").join(parts)
    )


def bar(title: str, parts: Sequence[tuple[float, str]], whole: float) -> Markup:
    """One bar across its place: (amount, class) one after another, of ``whole``; what is left is the ground."""
    pieces, start = [], 0.0
    for amount, name in parts:
        if amount > 0:
            pieces.append(
                Markup('<rect class="{}" x="{}%" y="0" width="{}%" height="100%"/>').format(
                    name, number(100 * start / whole), number(100 * amount / whole)
                )
            )
        start += amount
    return Markup('<svg class="bar" role="img" aria-label="{}">{}</svg>').format(title, Markup("").join(pieces))


def interval_bar(title: str, value: float, ends: tuple[float, float] | None, whole: float, series: int = 0) -> Markup:
    """A bar from 0 to ``value`` of ``whole``, with its interval as a thin line over it."""
    pieces = [
        Markup('<rect class="fill c{}" x="0" y="3" width="{}%" height="10"/>').format(
            series % SERIES, number(100 * value / whole)
        )
    ]
    if ends is not None:
        low, high = (number(100 * end / whole) for end in ends)
        pieces.append(Markup('<line class="whisker" x1="{}%" x2="{}%" y1="8" y2="8"/>').format(low, high))
        for end in (low, high):
            pieces.append(Markup('<line class="whisker" x1="{}%" x2="{}%" y1="4" y2="12"/>').format(end, end))
    return Markup('<svg class="thin" role="img" aria-label="{}">{}</svg>').format(title, Markup("").join(pieces))
