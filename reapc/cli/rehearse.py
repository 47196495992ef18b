"""``reapc rehearse RECIPE``: the whole recipe on a tiny random model with the same structure."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reapc.errors import ReapcError
from reapc.units import format_seconds

if TYPE_CHECKING:
    from reapc.plan import Plan
    from reapc.rehearse.run import Report, Step


@click.command("rehearse")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Leave the tiny model, the build and the logs in this new folder.")  # fmt: skip
@click.option("--no-serve", is_flag=True, help="Do not start the server.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(recipe_path: Path, overrides: tuple[str, ...], keep: Path | None, no_serve: bool, as_json: bool) -> int:
    """Try RECIPE without its weights: a tiny random model with the same structure goes through every pass."""
    from reapc.recipe import load_recipe

    recipe = load_recipe(recipe_path, overrides)
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise ReapcError(f"--keep {keep}: this folder holds something", hint="name one that is empty or not there")
    from reapc.rehearse.run import rehearse

    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reapc-rehearse-")))
        report = rehearse(recipe, folder, serve=not no_serve, tell=_tell, begun=_begun)
        if keep is not None:
            (keep / "rehearsal.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        if as_json:
            click.echo(json.dumps(report.to_json()))
        else:
            _show(report, keep)
    return 0 if report.ok else 1


def _begun(plan: Plan) -> None:
    chosen = plan.chosen
    click.echo(
        f"{plan.model} for {plan.target}: {chosen.engine}, {chosen.format}, {chosen.experts_kept} of "
        f"{plan.num_experts} experts",
        err=True,
    )


def _tell(step: Step) -> None:
    click.echo(f"{step.name}: {step.state} after {format_seconds(step.seconds)}", err=True)


def _show(report: Report, keep: Path | None) -> None:
    from rich.text import Text

    from reapc.cli import tables

    console = tables.console()
    made = tables.table(
        f"Rehearsal of {report.plan.model} for {report.plan.target}", ("step", "", "time", "seen"), ("time",)
    )
    for step in report.steps:
        state = {"ok": "green", "failed": "bold red"}.get(step.state, "dim")
        took = format_seconds(step.seconds) if step.state in ("ok", "failed") else ""
        made.add_row(step.name, Text(step.state, style=state), took, Text(step.seen))
    console.print(made)
    for note in report.notes:
        console.print(Text(f"- {note}"))
    failed = next((step for step in report.steps if step.state == "failed"), None)
    if failed is None:
        console.print(Text("No step failed: names, surgery, conversion, format and launch line fit together."))
    else:
        console.print(Text(f"It ended at {failed.name!r}" + (", whose last words are:" if failed.words else ".")))
        for line in failed.words:
            console.print(Text(f"  {line}"), soft_wrap=True)
        console.print(Text("The real model would meet the same, unless the tokenizer is meant: it is not its own."))
    if keep is not None:
        console.print(Text(f"kept in {keep}"))
