"""The page of a sweep: the frontier, and what half of the panel picked at every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reapc.report import frontier as front
from reapc.report.frontier_section import frontier_table
from reapc.report.page import render, section


def frontier_page(
    model: str, points: Sequence[front.Point], facts: Mapping[str, str], tiles: Sequence[tuple[str, str, str]] = ()
) -> str:
    """A page of its own, self-contained. ``facts``: what it was measured with, shown as they are."""

    def values() -> dict[str, Any]:
        return {"plot": front.frontier(points), **frontier_table(points)}

    about = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return render(f"{model}: KL against bytes", about, tiles, [section("frontier", "Frontier", values)])
