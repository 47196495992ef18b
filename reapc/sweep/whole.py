"""A whole sweep: the grid, its points, the frontier, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reapc import __version__
from reapc.checkpoint.atomic import locked, write_text
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.healing import split
from reapc.passes import Passes, llamacpp_version
from reapc.report.frontier import Point as DrawnPoint
from reapc.report.frontier import write_points
from reapc.report.frontier_page import frontier_page
from reapc.stream.tokens import Tokens
from reapc.sweep.frontier import Frontier, frontier, markdown, series_of
from reapc.sweep.grid import Budget, Mix, at_budget, at_ratios, parse_budgets
from reapc.sweep.joint import joint_mixes
from reapc.sweep.panel import halves, kl_interval
from reapc.sweep.run import Point, Settings, Sweep, expanded

Others = Sequence[tuple[str, Path]]


def sweep_budgets(
    passes: Passes, panel: Tokens, out: Path, settings: Settings, budgets: str, formats: Sequence[str],
    max_ratio: float, mixes: int, others: Others = (), joint: bool = False,
) -> Frontier:  # fmt: skip
    """The frontier at ``budgets``, as ``parse_budgets`` reads them. ``joint``: with what the allocator chooses."""
    spec = passes.checkpoint.spec
    asked = parse_budgets(budgets, spec)
    grid: list[Mix] = []
    for budget in asked:
        grid += at_budget(spec, budget, formats, max_ratio=max_ratio, mixes=mixes, dissolve=settings.dissolve_groups)
    return _swept(passes, panel, out, settings, grid, asked, others, formats, max_ratio if joint else None)


def sweep_ratios(
    passes: Passes, panel: Tokens, out: Path, settings: Settings, ratios: Sequence[float], formats: Sequence[str],
    others: Others = (),
) -> Frontier:  # fmt: skip
    """Every format at every ratio; what each needs is a budget of its own."""
    grid = at_ratios(passes.checkpoint.spec, ratios, formats, settings.dissolve_groups)
    asked = [Budget(f"{mix.format} with {mix.kept}", mix.bytes) for mix in sorted(grid, key=lambda mix: mix.bytes)]
    return _swept(passes, panel, out, settings, grid, asked, others)


def _swept(
    passes: Passes, panel: Tokens, out: Path, settings: Settings, grid: list[Mix], budgets: list[Budget],
    others: Others, formats: Sequence[str] = (), joint_ratio: float | None = None,
) -> Frontier:  # fmt: skip
    picking, reporting = halves(panel)
    if not len(picking) or not len(reporting):
        raise ReapcError("the panel has a single sequence; one half picks and the other reports", hint="give more")
    if True in settings.heal or settings.refit:
        split(passes.calibration)  # refuses too few sequences before anything is computed
    experts = passes.checkpoint.spec.num_experts
    sweep = Sweep(passes, panel, out, passes.progress, settings, str(passes.checkpoint.folder))
    with locked(out / "sweep.lock"):
        sweep.observe()
        if joint_ratio is not None:
            grid = [*grid, *joint_mixes(sweep, budgets, formats, joint_ratio)]
        points = sweep.run(expanded(grid, experts, settings), others)
    found = frontier(points, budgets, panel, experts, [name for name, _ in others])
    facts = _facts(passes, panel, settings, points)
    write_text(out / "sweep.json", json.dumps({**found.to_json(), **facts}, indent=2) + "\n")
    write_text(out / "frontier.md", markdown(found))
    _draw(out, points, experts, facts)
    return found


def _draw(out: Path, points: dict[str, Point], experts: int, facts: dict[str, Any]) -> None:
    """frontier.json, which builds beside it draw themselves on, and a page; of the whole panel, nothing picked."""
    drawn = []
    for name, point in points.items():
        everything = point.figures.tokens > 0
        low, high = kl_interval(point.figures, everything) or (None, None)
        ours = point.mix.is_gguf or weights.parse(point.mix.format) is not None
        series = series_of(point.mix, experts) if ours else name
        kl = max(0.0, point.figures.mean(everything)[0])
        drawn.append(DrawnPoint(bytes=point.mix.bytes, kl=kl, label=name, low=low, high=high, series=series))
    if not drawn:
        return
    write_points(out / "frontier.json", drawn)
    said = {
        "panel": f"{facts['panel']['tokens']:,} tokens of {facts['panel']['source']}",
        "calibration": f"{facts['calibration']['tokens']:,} tokens of {facts['calibration']['source']}",
        "llama.cpp": facts["versions"]["llama.cpp"],
    }
    write_text(out / "frontier.html", frontier_page(facts["model"]["folder"], drawn, said))


def _facts(passes: Passes, panel: Tokens, settings: Settings, points: dict[str, Point]) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "model": {"folder": str(passes.checkpoint.folder), "digest": passes.checkpoint.digest},
        "calibration": {"source": passes.calibration.source, "tokens": passes.calibration.count},
        "panel": {"source": panel.source, "tokens": panel.count, "sequences": panel.sequences},
        "settings": {"criteria": settings.criteria, "heal": settings.heal, "iters": settings.iters,
                     "refit": settings.refit},
        "versions": {"reapc": __version__, "llama.cpp": llamacpp_version()},
        "points": {
            name: {"bytes": point.mix.bytes, "file_bytes": point.file_bytes, "format": point.mix.format,
                   "kept": point.mix.kept, "criterion": point.mix.criterion, "healed": point.mix.healed,
                   "refit": point.mix.refit,
                   **dict(zip(("kl", "top1"), point.figures.mean(point.figures.tokens > 0), strict=True)),
                   "seconds": point.seconds}
            for name, point in points.items()
        },
    }  # fmt: skip
