"""The frontier: at every budget the best of each way of making a model small, and ours against the best other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reapc.stream.tokens import Tokens
from reapc.sweep.grid import Budget, Mix
from reapc.sweep.panel import halves, interval, kl_of, resampled
from reapc.sweep.run import Point, fits
from reapc.units import format_bytes

OURS = "reapc"
ALL_EXPERTS = "all experts, quantized"


@dataclass(frozen=True)
class Row:
    """What one series reaches within a budget: the point that half of the panel picked, its figures on the other half,
    ``low`` and ``high`` the 95 % interval of ``kl``."""

    series: str
    point: str
    bytes: int
    kl: float
    low: float
    high: float
    top1: float


@dataclass(frozen=True)
class Frontier:
    """``rows`` by budget. ``against``: ours over the best of the others by budget: (name, ratio of the KLs, low, high);
    worse beyond doubt where ``low`` is above 1."""

    budgets: list[Budget]
    rows: dict[str, list[Row]]
    against: dict[str, tuple[str, float, float, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "budgets": [asdict(budget) for budget in self.budgets],
            "rows": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
            "against": {
                name: dict(zip(("best_other", "ratio", "low", "high"), found, strict=True))
                for name, found in self.against.items()
            },
        }


def series_of(mix: Mix, experts: int) -> str:
    """The way in which a mix of ours was made."""
    if mix.kept == experts:
        return ALL_EXPERTS
    return f"{mix.criterion}{', healed' if mix.healed else ''}, quantized"


def frontier(
    points: Mapping[str, Point], budgets: Sequence[Budget], panel: Tokens, experts: int, others: Sequence[str] = ()
) -> Frontier:
    """``others``: names of points that are somebody else's; each is a series of its own. What anybody can have without
    reapc's own part, all experts quantized and plain REAP, is among the others too, and ours is the best of everything
    that reapc builds."""
    picking, reporting = halves(panel)
    draws = resampled(reporting, panel.domain)
    rows: dict[str, list[Row]] = {}
    against: dict[str, tuple[str, float, float, float]] = {}
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
            low, high = interval(kl_of(figures, draws))
            found.append(Row(title, name, points[name].mix.bytes, kl, low, high, top1))
        rows[budget.name] = sorted(found, key=lambda row: row.kl)
        baselines = [row for row in found if row.series in (ALL_EXPERTS, "reap, quantized", *others)]
        if OURS in picked and baselines:
            best = min(baselines, key=lambda row: points[row.point].figures.mean(picking)[0])
            mine = points[picked[OURS]].figures
            ratios = kl_of(mine, draws) / np.maximum(kl_of(points[best.point].figures, draws), 1e-12)
            ratio = mine.mean(reporting)[0] / max(best.kl, 1e-12)
            against[budget.name] = (best.series, ratio, *interval(ratios))
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
                f"| {budget.name} | {row.series} | {row.point} | {format_bytes(row.bytes)} | {row.kl:.4f} "
                f"({row.low:.4f} to {row.high:.4f}) | {100 * row.top1:.1f} % |"
            )
    lines.append("")
    for name, (other, ratio, low, high) in found.against.items():
        lines.append(f"- {name}: ours has {ratio:.2f} x the KL of the best other ({other}), {low:.2f} to {high:.2f}")
    return "\n".join(lines) + "\n"
