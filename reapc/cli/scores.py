"""``reapc scores show`` and ``reapc scores merge``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reapc.errors import ReapcError


@click.group("scores")
def command() -> None:
    """Show or merge scores files."""


@command.command("show")
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def show(scores: Path, as_json: bool) -> None:
    """Print what SCORES holds."""
    from reapc.observe.scores import load_scores

    loaded = load_scores(scores)
    if as_json:
        click.echo(json.dumps(loaded.to_json()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "routed: least", "median", "most", "REAP: lowest", "median", "highest", "never routed")
    for index in loaded.layers:
        layer = loaded.layer(index)
        count, reap = sorted(layer["routed_tokens"]), sorted(layer["reap"])
        middle = len(count) // 2
        never = sum(value == 0 for value in count)
        values = [f"{v:.0f}" for v in (count[0], count[middle], count[-1])]
        values += [f"{v:.4g}" for v in (reap[0], reap[middle], reap[-1])]
        table.add_row(str(index), *values, str(never))
    console = Console()
    console.print(f"{loaded.header['model']}: {loaded.header['tokens']} tokens of {loaded.header['calibration']}")
    console.print(table)


@command.command("merge")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The scores file to write.")
def merge_command(parts: tuple[Path, ...], out: Path) -> None:
    """Add the observations PARTS of one model into one file."""
    from reapc.observe.scores import load_scores, merge

    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    merged = merge([load_scores(part) for part in parts])
    merged.save(out)
    click.echo(f"{out}: {len(parts)} observations, {merged.header['tokens']} tokens")
