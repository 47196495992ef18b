"""``reapc plan``: what a build of a recipe would decide, and why. Reads config.json only."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from reapc.arch import model_spec
from reapc.checkpoint.source import config_of
from reapc.planner.explain import arithmetic, render_arithmetic, render_plan
from reapc.planner.search import make_plan
from reapc.recipe import load_recipe


@click.command("plan")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--explain", is_flag=True, help="Print the arithmetic behind the bytes as well.")
def command(recipe_path: Path, overrides: tuple[str, ...], as_json: bool, explain: bool) -> None:
    """Shows what a build of RECIPE would decide, and why."""
    recipe = load_recipe(recipe_path, overrides)
    model = recipe.model
    spec = model_spec(config_of(model.source, model.revision, recipe.base), where=f"{model.source}/config.json")
    plan = make_plan(recipe, spec, model.source)
    lines = arithmetic(plan, spec, recipe) if explain else []
    if as_json:
        data = plan.to_json()
        if explain:
            data["arithmetic"] = [{"name": name, "bytes": size, "formula": formula} for name, size, formula in lines]
        click.echo(json.dumps(data, indent=2))
        return
    console = Console(highlight=False)
    console.print(render_plan(plan))
    if explain:
        console.print(render_arithmetic(lines))
