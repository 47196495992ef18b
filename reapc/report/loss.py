"""What was lost, by domain and by position in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from reapc.report import tables
from reapc.report.data import BuildData, Missing
from reapc.report.svg import Plot, interval_bar
from reapc.report.tables import Table


def loss(data: BuildData) -> dict[str, Any]:
    """KL by domain and by position."""
    from reapc.verify.intervals import FEWEST, mean_interval

    found = data.get("fidelity", "what was lost")
    try:
        detail, why = data.detail, ""
    except Missing as error:
        detail, why = None, str(error)
    rows = {"all": found, **found.get("domains", {})}
    intervals = {name: mean_interval(*sums_of(detail, name, "kl")) if detail else None for name in rows}
    whole = 1.02 * max([row["kl"] for row in rows.values()] + [i.high for i in intervals.values() if i] + [1e-9])
    lines = []
    for name, row in rows.items():
        interval = intervals[name]
        said = f"{name}: KL {tables.kl(row['kl'])}" + (f", interval {tables.ends(interval)}" if interval else "")
        lines.append(
            [
                name, interval_bar(said, row["kl"], interval, whole), tables.kl(row["kl"]), tables.ends(interval),
                tables.percent(row["top1"]), tables.perplexity(row["perplexity_a"]),
                tables.perplexity(row["perplexity_b"]), f"{row['tokens']:,}",
            ]
        )  # fmt: skip
    head = ("domain", "", "KL", "95 % interval", "top-1", "perplexity before", "after", "tokens")
    return {
        "domains": Table("By domain, on held-out text", head, lines, (0, 1)),
        "positions": position_plot([("", detail["positions"])]) if detail and detail["positions"] else None,
        "position_table": _positions(detail["positions"]) if detail and detail["positions"] else None,
        "missing": why,
        "exact": detail["exact"] if detail else True,
        "fewest": FEWEST,
        "sequences": detail["held_out"]["sequences"] if detail else None,
    }


def sums_of(detail: dict[str, Any], domain: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sequences,) sums of ``name`` and (sequences,) tokens; those of a domain's own sequences, or of ``all``."""
    sequences = detail["sequences"]
    sums, counts = np.array(sequences[name], np.float64), np.array(sequences["tokens"], np.float64)
    if domain == "all" and len(detail["domains"]) != 1:
        return sums, counts
    mine = np.array([detail["domains"][i] for i in sequences["domain"]]) == domain
    return (sums[mine], counts[mine]) if mine.any() else (sums, counts)


def position_plot(curves: Sequence[tuple[str, list[dict[str, Any]]]]) -> Markup:
    """KL by how many tokens the models had read, a line each."""
    ranges = [row for _, rows in curves for row in rows]
    highest = max([row["kl"] for row in ranges] + [row["interval"][1] for row in ranges if row["interval"]] + [1e-9])
    longest = max(row["to"] for row in ranges)
    plot = Plot.of(
        "KL by the number of tokens read", (1, max(2, longest)), (0, 1.05 * highest), x_log=True,
        x_label="tokens read (logarithmic)", y_label="KL in nats per token",
        x_marks=[2**i for i in range(0, int(longest).bit_length(), 1 + int(longest).bit_length() // 8)],
        x_format=lambda value: f"{value:.0f}",
    )  # fmt: skip
    for number, (name, rows) in enumerate(curves):
        places = [float(np.sqrt(row["from"] * row["to"])) for row in rows]
        bands = [(at, *row["interval"]) for at, row in zip(places, rows, strict=True) if row["interval"]]
        plot.area(bands, number)
        plot.line([(at, row["kl"]) for at, row in zip(places, rows, strict=True)], number)
        for at, row in zip(places, rows, strict=True):
            said = f"{name + ': ' if name else ''}{_range(row)} tokens read: KL {tables.kl(row['kl'])}"
            plot.mark(at, row["kl"], said, number)
    return plot.render()


def _range(row: dict[str, Any]) -> str:
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']} to {row['to']}"


def _positions(rows: list[dict[str, Any]]) -> Table:
    cells = [
        [_range(r), tables.kl(r["kl"]), tables.ends(r["interval"]), tables.percent(r["top1"]), f"{r['tokens']:,}"]
        for r in rows
    ]
    return Table("By position", ("tokens read", "KL", "95 % interval", "top-1", "positions"), cells, (0,))
