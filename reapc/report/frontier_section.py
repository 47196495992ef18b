"""The report's section on the frontier: where a build lies among all that were measured on one panel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reapc.report import frontier as front
from reapc.report import tables
from reapc.report.data import FRONTIER, BuildData, Missing
from reapc.report.tables import Table


def frontier(data: BuildData) -> dict[str, Any]:
    """Where this build lies among all that were measured on one panel."""
    path = data.siblings / FRONTIER
    if not path.is_file():
        raise Missing("This build is no part of a sweep, so there is no frontier to draw it on.")
    try:
        points = front.read_points(path)
        plot = front.frontier(points)
    except ValueError as error:
        raise Missing(f"{path.name} in the folder above cannot be drawn: {str(error).splitlines()[0]}") from error
    return {"plot": plot, **frontier_table(points)}


def frontier_table(points: Sequence[front.Point]) -> dict[str, Any]:
    """What stands beside the plot: the series, and every point."""
    rows = [
        [
            ("this build: " if p.here else "") + p.label, p.series or tables.NONE, tables.size(p.bytes),
            tables.kl(p.kl),
            tables.ends((p.low, p.high) if p.low is not None and p.high is not None else None),
        ]
        for p in sorted(points, key=lambda p: (p.bytes, p.kl))
    ]  # fmt: skip
    head = ("configuration", "series", "bytes", "KL", "95 % interval")
    return {
        "legend": front.legend(points),
        "here": any(point.here for point in points),
        "points": Table("All points", head, rows, (0, 1)),
    }
