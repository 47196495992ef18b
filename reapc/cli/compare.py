"""``reapc compare A B``: two builds side by side, or with ``--tokens`` what model B lost against model A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reapc.errors import ReapcError

if TYPE_CHECKING:
    from reapc.report.data import BuildData


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids: measure A and B on these.")
@click.option("--html", type=click.Path(path_type=Path), help="Of two builds: write the comparison as a page.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(a: Path, b: Path, tokens: Path | None, html: Path | None, as_json: bool) -> None:
    """Two builds (output folders) side by side, as their manifests say. Or, with --tokens, KL(A || B), top-1 agreement
    and perplexities of two models, measured anew; A, B: checkpoint folders or GGUF files."""
    if tokens is not None:
        if html is not None:
            raise click.UsageError("--html draws what two builds say of themselves; leave --tokens out")
        _measured(a, b, tokens, as_json)
        return
    others = [path for path in (a, b) if not (path / "manifest.json").is_file()]
    if others:
        raise click.UsageError(
            f"Missing option '--tokens': {' and '.join(map(str, others))} {'is' if len(others) == 1 else 'are'} no "
            "output folder of a build, so A and B have to be run on some text"
        )
    _builds(build_in(a), build_in(b), html, as_json)


def build_in(folder: Path) -> BuildData:
    """The build in ``folder``; ReapcError where there is none. Warnings go to standard error."""
    from reapc.report.data import BuildData
    from reapc.serving.built import read_built

    for warning in read_built(folder).warnings:
        click.echo(f"warning: {warning}", err=True)
    return BuildData.read(folder)


def _measured(a: Path, b: Path, tokens: Path, as_json: bool) -> None:
    from reapc.cli.progress import make_progress
    from reapc.stream.tokens import read_tokens
    from reapc.verify.fidelity import compare, vocabulary_of

    result = compare(a, b, read_tokens(tokens, vocabulary_of(a)), make_progress())
    if as_json:
        figures = result.to_json()
        if not figures["domains"]:
            del figures["domains"]
        click.echo(json.dumps(figures))
        return
    for name, row in {"all": result.to_json(), **result.domains}.items():
        change = ""
        if row["perplexity_a"] is not None:
            change = f", perplexity {row['perplexity_a']:.3f} -> {row['perplexity_b']:.3f}"
        click.echo(
            f"{name}: KL(A || B) {row['kl']:.5f} nats, top-1 {100 * row['top1']:.2f} %{change}, {row['tokens']} tokens"
        )


def _builds(a: BuildData, b: BuildData, html: Path | None, as_json: bool) -> None:
    from reapc.report.comparison import compare_builds

    try:
        found = compare_builds(a, b)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ReapcError(
            f"{a.folder} or {b.folder}: its manifest is not as this version writes it "
            f"({type(error).__name__}: {error})",
            hint="build again with this reapc, or measure both with --tokens",
        ) from error
    if html is not None:
        from reapc.checkpoint.atomic import write_text
        from reapc.report.comparison_page import comparison_page

        write_text(html, comparison_page(a, b))
    if as_json:
        click.echo(json.dumps(found))
        return
    _show(found)
    if html is not None:
        click.echo(f"written: {html}")


def _show(found: dict[str, Any]) -> None:
    from rich.text import Text

    from reapc.cli import tables
    from reapc.report import tables as words
    from reapc.units import format_bytes

    console = tables.console()
    sides = found["a"], found["b"]
    made = tables.table("Two builds", ("", "A", "B"))
    fits = [{row["name"]: row["actual_bytes"] for row in side["fit"]} for side in sides]
    plans = [side["plan"] or {} for side in sides]
    rows: list[tuple[str, list[Any]]] = [
        ("folder", [side["folder"] for side in sides]),
        ("model", [plan.get("model") for plan in plans]),
        ("target", [plan.get("target") for plan in plans]),
        ("experts", [
            f"{side['experts_kept']} of {plan.get('num_experts', '?')}" for side, plan in zip(sides, plans, strict=True)
        ]),
        ("criterion", [plan.get("criterion") for plan in plans]),
        ("format, engine", [f"{side['format']}, {side['engine']}" for side in sides]),
        ("context", [
            f"{p.get('context')} x {p.get('concurrency')}, KV {p.get('kv_dtype')}" if p else None for p in plans
        ]),
        ("healed", [_healed(side["healing"]) for side in sides]),
        ("healed after quantization", [_healed(side["healing_quantized"]) for side in sides]),
        *((name, [words.size(fit.get(name)) for fit in fits]) for name in dict.fromkeys([*fits[0], *fits[1]])),
    ]  # fmt: skip
    devices = [{d["name"]: d for d in plan.get("per_device", [])} for plan in plans]
    for name in dict.fromkeys([*devices[0], *devices[1]]):
        rows.append((f"free on {name}", [format_bytes(d[name]["free_bytes"]) if name in d else None for d in devices]))
    for name, pair in found["stage_seconds"].items():
        rows.append((f"{name}, time", [words.seconds(value) for value in pair]))
    rows.append(("all, time", [words.seconds(side["seconds"]) for side in sides]))
    for name, cells in rows:
        made.add_row(Text(name), *(Text(words.NONE if cell is None else str(cell)) for cell in cells))
    console.print(made)
    head = ("domain", "KL of A", "KL of B", "B - A", "95 % interval", "top-1 A / B", "perplexity A / B")
    lost = tables.table("Lost against the original, on held-out text", head, head[1:])
    for name, row in found["fidelity"].items():
        figures = [row[side] or {} for side in "ab"]
        change = row.get("difference")
        lost.add_row(
            Text(name), *(words.kl(f.get("kl")) for f in figures), f"{change['kl']:+.4f}" if change else words.NONE,
            words.signed(change["interval"] if change else None),
            " / ".join(words.percent(f.get("top1")).removesuffix(" %") for f in figures) + " %",
            " / ".join(words.perplexity(f.get("perplexity_b")) for f in figures),
        )  # fmt: skip
    console.print(lost)
    if found["not_comparable"]:
        console.print(Text(f"The KLs of A and B are not comparable: {found['not_comparable']}."))
    _show_kept(console, found["kept"])


def _show_kept(console: Any, kept: dict[str, Any]) -> None:
    from rich.text import Text

    from reapc.cli import tables

    if not kept["layers"]:
        console.print(Text(f"Experts kept in common: not known, {kept['reason'] or 'no layer is in both'}."))
        return
    made = tables.table(f"Experts kept in common: {100 * kept['share']:.1f} %, mean over layers",
                        ("layer", "A", "B", "the same", "by chance"), ("A", "B", "the same", "by chance"))  # fmt: skip
    for layer, row in kept["layers"].items():
        made.add_row(layer, str(row["a"]), str(row["b"]), str(row["common"]), f"{row['chance']:.1f}")
    console.print(made)


def _healed(healing: dict[str, Any] | None) -> str:
    if healing is None:
        return "no"
    change = f"KL {healing['before']['kl']:.4f} -> {healing['after']['kl']:.4f}"
    return f"yes, {change}" if healing["healed"] else f"tried and not kept, {change}"
