"""``reapc build RECIPE``: the whole compiler."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from reapc.units import format_bytes, format_seconds


@click.command("build")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: prune.ratio=0.25.")
@click.option("--out", type=click.Path(path_type=Path), help="The output folder; default: [output] path.")
@click.option("--scores", type=click.Path(path_type=Path), help="Use these scores instead of observing.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
def command(recipe: Path, overrides: tuple[str, ...], out: Path | None, scores: Path | None, as_json: bool) -> None:
    """Decide, observe, prune, quantize and verify what RECIPE asks for, and write the server's script."""
    from reapc.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from reapc.build import Build
    from reapc.cli.progress import make_progress

    typed = [str(recipe), *(part for change in overrides for part in ("--set", change))]
    typed += [part for name, path in (("--out", out), ("--scores", scores)) if path for part in (name, str(path))]
    command = shlex.join(["reapc", "build", *typed])
    result = Build(loaded, make_progress(), scores, command=command).run(out or loaded.output_path)
    manifest = result.manifest
    if as_json:
        click.echo(json.dumps(_summary(result.output, manifest)))
        return
    if not result.fresh:
        click.echo(f"nothing to do: {result.output} holds this very result already")
    _show(result.output, manifest)


def _summary(output: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    file = manifest["fit"][0]
    return {
        "output": str(output),
        "experts_kept": manifest["experts_kept"],
        "format": manifest["format"],
        "predicted_bytes": file["predicted_bytes"],
        "actual_bytes": file["actual_bytes"],
        "kl": manifest["fidelity"]["kl"],
        "top1": manifest["fidelity"]["top1"],
        "seconds": manifest["seconds"],
    }


def _show(output: Path, manifest: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plan = json.loads((output / "plan.json").read_text())["from_scores"]
    console = Console(width=None if Console().is_terminal else 110)
    decided = Table(
        "decided", "", title=Text(f"{manifest['model']['source']} for {plan['target']}"), title_justify="left"
    )
    decided.add_row("experts", f"{manifest['experts_kept']} of {plan['num_experts']} per layer ({plan['criterion']})")
    decided.add_row("format", f"{manifest['format']}, served by {manifest['engine']}")
    decided.add_row("why", "\n".join(plan["reasons"]))
    console.print(decided)
    bytes_table = Table("bytes", "predicted", "real", "measured by")
    for row in manifest["fit"]:
        real = row["actual_bytes"]
        bytes_table.add_row(
            row["name"],
            f"{row['predicted_bytes']:,} ({format_bytes(row['predicted_bytes'])})",
            "not measured" if real is None else f"{real:,} ({format_bytes(real)})",
            row["source"],
        )
    console.print(bytes_table)
    lost = Table("held-out text", "KL (nats)", "top-1", "perplexity before", "after", "tokens")
    rows = {"all": manifest["fidelity"], **manifest["fidelity"]["domains"]}
    for name, row in rows.items():
        lost.add_row(
            name,
            f"{row['kl']:.4f}",
            f"{100 * row['top1']:.1f} %",
            "-" if row["perplexity_a"] is None else f"{row['perplexity_a']:.2f}",
            "-" if row["perplexity_b"] is None else f"{row['perplexity_b']:.2f}",
            f"{row['tokens']:,}",
        )
    console.print(lost)
    click.echo(f"built in {format_seconds(manifest['seconds'])}: {output}")
    if (output / "report.html").is_file():
        click.echo(f"open the report:   {shlex.quote(str(output / 'report.html'))}")
    click.echo(f"start the server:  {shlex.quote(str(output / 'serve.sh'))}")
