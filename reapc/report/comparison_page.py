"""Two builds side by side as a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reapc.report import tables
from reapc.report.comparison import compare_builds
from reapc.report.data import BuildData, Missing
from reapc.report.loss import position_plot
from reapc.report.page import Section, render, section
from reapc.report.sections import decision_rows, memory
from reapc.report.svg import Plot, interval_bar
from reapc.report.tables import Table
from reapc.units import format_bytes

Found = dict[str, Any]


def comparison_page(a: BuildData, b: BuildData, strict: bool = False) -> str:
    """The page of ``compare_builds``."""
    found = compare_builds(a, b)
    made: tuple[tuple[str, str, Callable[[], Found]], ...] = (
        ("decision", "The decisions", lambda: _decision(a, b)),
        ("memory", "Memory", lambda: _memory(a, b)),
        ("loss", "What was lost", lambda: _loss(a, b, found)),
        ("experts", "Experts kept in common", lambda: _experts(found)),
        ("healing", "Healing", lambda: _healing(a, b)),
        ("provenance", "Provenance", lambda: _provenance(found)),
    )
    parts: list[Section] = [section(f"compare_{name}", title, values, strict, id=name) for name, title, values in made]
    about = f"A: {a.folder} ({a.model}). B: {b.folder} ({b.model})."
    return render(f"{a.name} and {b.name}: reapc compare", about, _tiles(found), parts)


def _tiles(found: Found) -> list[tuple[str, str, str]]:
    sides = found["a"], found["b"]

    def both(name: str, shown: Callable[[Any], str], values: list[Any], remark: str) -> tuple[str, str, str]:
        return name, " | ".join(shown(value).replace(" ", "\u00a0") for value in values), remark

    files = [next((row["actual_bytes"] for row in side["fit"] if row.get("name") == "file"), None) for side in sides]
    whole = found["fidelity"].get("all", {})
    kls = [(whole.get(side) or {}).get("kl") for side in "ab"]
    tops = [(whole.get(side) or {}).get("top1") for side in "ab"]
    remark = "A | B, not comparable" if found["not_comparable"] else "A | B, nats per token"
    return [
        both("Experts kept", str, [side["experts_kept"] for side in sides], "A | B, per layer"),
        both("Format", str, [side["format"] for side in sides], "A | B"),
        both("Size", lambda v: tables.NONE if v is None else format_bytes(v), files, "A | B"),
        both("KL", tables.kl, kls, remark),
        both("Top-1 agreement", tables.percent, tops, "A | B"),
    ]


def _decision(a: BuildData, b: BuildData) -> Found:
    rows = [_or_none(lambda build=build: decision_rows(build)) for build in (a, b)]  # type: ignore[misc]
    if not any(rows):
        raise Missing("Neither build's plan.json can be read.")
    names = dict.fromkeys(name for row in rows if row for name in row)
    cells = [[name, *((row or {}).get(name, tables.NONE) for row in rows)] for name in names]
    return {
        "made": Table("What was chosen", ("", "A", "B"), cells, (0, 1, 2)),
        "reasons": [
            (name, list(build.plan.reasons)) for name, build, row in zip("AB", (a, b), rows, strict=True) if row
        ],
    }  # fmt: skip


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Missing:
        return None


def _memory(a: BuildData, b: BuildData) -> Found:
    sides = [(name, _or_none(lambda build=build: memory(build))) for name, build in (("A", a), ("B", b))]  # type: ignore[misc]
    if not any(found for _, found in sides):
        raise Missing("Neither build's plan.json can be read.")
    keys = ("predicted_bytes", "actual_bytes")
    named = [{str(row["name"]): row for row in build.manifest.get("fit") or []} for build in (a, b)]
    cells = [
        [name, *(tables.size(fit.get(name, {}).get(key)) for fit in named for key in keys)]
        for name in dict.fromkeys([*named[0], *named[1]])
    ]  # fmt: skip
    legend = dict(item for _, found in sides if found for item in found["legend"])
    head = ("bytes", "A predicted", "A real", "B predicted", "B real")
    return {"sides": sides, "legend": list(legend.items()), "made": Table("Predicted and real bytes", head, cells)}


def _loss(a: BuildData, b: BuildData, found: Found) -> Found:
    rows = found["fidelity"]
    if not rows:
        raise Missing("Neither build's manifest says what was lost.")
    sides = [row[side] for row in rows.values() for side in "ab" if row.get(side)]
    whole = 1.02 * max(
        [side["kl"] for side in sides] + [side["interval"][1] for side in sides if side["interval"]] + [1e-9]
    )
    cells = []
    for name, row in rows.items():
        for number, side in enumerate("ab"):
            figures = row.get(side)
            if figures is None:
                continue
            said = f"{name}, {side.upper()}: KL {tables.kl(figures['kl'])}"
            cells.append(
                [
                    name, side.upper(), interval_bar(said, figures["kl"], figures["interval"], whole, number),
                    tables.kl(figures["kl"]), tables.ends(figures["interval"]), tables.percent(figures["top1"]),
                    tables.perplexity(figures["perplexity_a"]), tables.perplexity(figures["perplexity_b"]),
                    f"{figures['tokens']:,}",
                ]
            )  # fmt: skip
    differences = [
        [
            name, f"{row['difference']['kl']:+.4f}", tables.signed(row["difference"]["interval"]),
            f"{100 * row['difference']['top1']:+.1f}", _verdict(row["difference"]["interval"]),
        ]
        for name, row in rows.items()
        if "difference" in row
    ]  # fmt: skip
    curves = [
        (name, detail["positions"])
        for name, build in (("A", a), ("B", b))
        if (detail := _or_none(lambda build=build: build.detail)) and detail["positions"]  # type: ignore[misc]
    ]
    head = ("domain", "", "", "KL", "95 % interval", "top-1", "perplexity before", "after", "tokens")
    second = ("domain", "KL, B - A", "95 % interval", "top-1, points", "")
    return {
        "reason": found["not_comparable"],
        "made": Table("By domain, on held-out text", head, cells, (0, 1, 2)),
        "differences": Table("B against A, paired by sequence", second, differences, (0, 4)) if differences else None,
        "positions": position_plot(curves) if len(curves) == 2 else None,
    }  # fmt: skip


def _verdict(interval: list[float] | None) -> str:
    if interval is None:
        return "no interval"
    if interval[1] < 0:
        return "B loses less"
    return "A loses less" if interval[0] > 0 else "no difference beyond the interval"


def _experts(found: Found) -> Found:
    kept = found["kept"]
    layers = kept["layers"]
    if not layers:
        raise Missing(f"Experts cannot be compared: {kept['reason'] or 'the builds have no layer in common'}.")
    most = max(max(row["a"], row["b"]) for row in layers.values())
    plot = Plot.of(
        f"Experts that both builds keep, in {len(layers)} layers", (0, len(layers)), (0, most), height=200,
        x_label="layer", y_label="experts", x_marks=[],
    )  # fmt: skip
    for place, (layer, row) in enumerate(layers.items()):
        said = (
            f"layer {layer}: A keeps {row['a']}, B {row['b']}, {row['common']} the same, {row['chance']:.1f} by chance"
        )
        plot.column(place + 0.1, place + 0.9, max(row["a"], row["b"]), 4, said)
        plot.column(place + 0.1, place + 0.9, row["common"], 0, said)
        plot.line([(place + 0.1, row["chance"]), (place + 0.9, row["chance"])], 3)
    every = max(1, -(-len(layers) // 12))
    named = {place + 0.5: layer for place, layer in enumerate(layers) if place % every == 0}
    plot.x.marks, plot.x.format = list(named), named.__getitem__
    cells = [[layer, str(r["a"]), str(r["b"]), str(r["common"]), f"{r['chance']:.1f}"] for layer, r in layers.items()]
    return {
        "share": tables.percent(kept["share"]),
        "plot": plot.render(),
        "made": Table("Experts kept by layer", ("layer", "A", "B", "the same", "by chance"), cells, ()),
    }


def _healing(a: BuildData, b: BuildData) -> Found:
    steps = (("healing", "before quantization"), ("healing_quantized", "after quantization"))
    sides = [
        (f"{name}, {when}", build.manifest.get(key) or None)
        for key, when in steps
        for name, build in (("A", a), ("B", b))
    ]
    if not any(side for _, side in sides):
        raise Missing("Neither build was healed.")
    cells = []
    for name, side in sides:
        if side is None:
            cells.append([name, "no", *[tables.NONE] * 5])
            continue
        before, after = side["before"], side["after"]
        removed = [1 - layer["choice"][1] / max(layer["choice"][0], 1e-300) for layer in side["layers"]]
        cells.append(
            [
                name, "yes" if side["healed"] else "tried, not kept", tables.kl(before["kl"]), tables.kl(after["kl"]),
                tables.percent(before["top1"]), tables.percent(after["top1"]),
                tables.percent(sum(removed) / max(len(removed), 1)),
            ]
        )  # fmt: skip
    head = ("", "healed", "KL before", "after", "top-1 before", "after", "residual removed, mean over layers")
    return {"made": Table("On each build's own text for it", head, cells, (0, 1))}


def _provenance(found: Found) -> Found:
    sides = found["a"], found["b"]
    names = (
        ("folder", "Folder"), ("date", "Date"), ("reapc", "reapc"), ("model_digest", "Model digest"),
        ("held_out_digest", "Held-out digest"),
    )  # fmt: skip
    facts = [[title, *(str(side[key] or tables.NONE) for side in sides)] for key, title in names]
    stages = [[name, *map(tables.seconds, pair)] for name, pair in found["stage_seconds"].items()]
    stages.append(["all, with checks", *(tables.seconds(side["seconds"]) for side in sides)])
    return {
        "facts": Table("What they were made from", ("", "A", "B"), facts, (0, 1, 2)),
        "stages": Table("Stages", ("stage", "A", "B"), stages),
    }
