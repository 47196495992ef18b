"""The frontier: at every budget the best of each way of making a model small, and ours against the best other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from reapc.formats import weights
from reapc.stream.tokens import Tokens
from reapc.sweep.grid import Budget, Mix
from reapc.sweep.panel import halves, kl_interval, ratio_interval
from reapc.sweep.run import Point, fits
from reapc.units import format_bytes

OURS = "reapc"
ALL_EXPERTS = "all experts, quantized"


@dataclass(frozen=True)
class Row:
    """What one series reaches within a budget: the point that half of the panel picked, its figures on the other half,
    ``low`` and ``high`` the 95 % interval of ``kl`` (None with too few sequences)."""

    series: str
    point: str
    bytes: int
    kl: float
    low: float | None
    high: float | None
    top1: float


class Against(NamedTuple):
    """Ours against the best of the others: the ``ratio`` of the KLs with its 95 % interval. Worse beyond doubt where
    ``low`` is above 1."""

    other: str
    ratio: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Frontier:
    """``rows`` and ``against`` by budget."""

    budgets: list[Budget]
    rows: dict[str, list[Row]]
    against: dict[str, Against]

    def to_json(self) -> dict[str, Any]:
        return {
            "budgets": [asdict(budget) for budget in self.budgets],
            "rows": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
            "against": {name: found._asdict() for name, found in self.against.items()},
        }


def series_of(mix: Mix, experts: int) -> str:
    """The way in which a mix of ours was made."""
    healed = ", healed" if mix.healed else ""
    if mix.types or mix.label:
        parsed = None if mix.types else weights.parse(mix.format)
        made = "joint" if parsed is None else f"joint, {parsed.method}"
        return f"{made}{healed}{', quantized and healed' if mix.refit else ''}"
    made = ALL_EXPERTS if mix.kept == experts else f"{mix.criterion}{healed}, quantized"
    return f"{made} and healed" if mix.refit else made


def frontier(
    points: Mapping[str, Point], budgets: Sequence[Budget], panel: Tokens, experts: int, others: Sequence[str] = ()
) -> Frontier:
    """``others``: names of points that are somebody else's; each is a series of its own. What anybody can have without
    reapc's own part, all experts quantized and plain REAP, is among the others too, and ours is the best of everything
    that reapc builds."""
    picking, reporting = halves(panel)
    rows: dict[str, list[Row]] = {}
    against: dict[str, Against] = {}
    for budget in budgets:
        series: dict[str, list[str]] = {}
        for name, point in points.items():
            if not fits(point, budget):
                continue
            if name in others:
                series.setdefault(name, []).append(name)
            else:
                series.setdefault(series_of(point.mix, experts), []).append(name)
                series.setdefault(OURS, []).append(name)
        picked = {
            title: min(names, key=lambda name: points[name].figures.mean(picking)[0]) for title, names in series.items()
        }
        found = []
        for title, name in picked.items():
            figures = points[name].figures
            kl, top1 = figures.mean(reporting)
            low, high = kl_interval(figures, reporting) or (None, None)
            found.append(Row(title, name, points[name].mix.bytes, kl, low, high, top1))
        rows[budget.name] = sorted(found, key=lambda row: row.kl)
        baselines = [row for row in found if row.series in (ALL_EXPERTS, "reap, quantized", *others)]
        if OURS in picked and baselines:
            best = min(baselines, key=lambda row: points[row.point].figures.mean(picking)[0])
            mine = points[picked[OURS]].figures
            ratio = mine.mean(reporting)[0] / max(best.kl, 1e-12)
            ends = ratio_interval(mine, points[best.point].figures, reporting) or (None, None)
            against[budget.name] = Against(best.series, ratio, *ends)
    return Frontier(list(budgets), rows, against)


def markdown(found: Frontier) -> str:
    """The table for people: best first within each budget."""
    lines = [
        "| budget | way | configuration | size | KL (95 % interval) | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for budget in found.budgets:
        for row in found.rows[budget.name]:
            lines.append(
                f"| {budget.name} | {row.series} | {row.point} | {format_bytes(row.bytes)} | {row.kl:.4f}"
                f"{_ends(row.low, row.high, 4)} | {100 * row.top1:.1f} % |"
            )
    lines.append("")
    for name, against in found.against.items():
        lines.append(
            f"- {name}: ours has {against.ratio:.2f}{_ends(against.low, against.high, 2)} x the KL of the best other, "
            f"{against.other}"
        )
    return "\n".join(lines) + "\n"


def _ends(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
