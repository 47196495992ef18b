"""``reapc plan``: what a build of a recipe would decide, and why. Reads config.json only."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reapc.arch import model_spec
from reapc.checkpoint.source import config_of
from reapc.plan import Plan
from reapc.planner import explain
from reapc.planner.question import Question, from_recipe
from reapc.planner.search import answer
from reapc.recipe import load_recipe


@click.command("plan")
@click.argument("recipe_path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--explain", "explained", is_flag=True, help="Print each number with its formula as well.")
def command(recipe_path: Path, overrides: tuple[str, ...], as_json: bool, explained: bool) -> None:
    """Shows what a build of RECIPE would decide, and why."""
    recipe = load_recipe(recipe_path, overrides)
    model = recipe.model
    spec = model_spec(config_of(model.source, model.revision, recipe.base), where=f"{model.source}/config.json")
    question = from_recipe(recipe, spec, model.source)
    plan = answer(question, "reap" if recipe.prune.method == "auto" else recipe.prune.method)
    if as_json:
        data = explain.plan_json(plan, question)
        if explained:
            data["arithmetic"] = [
                {"name": name, "bytes": size, "formula": formula}
                for name, size, formula in explain.arithmetic(plan, question)
            ]
            data["loss"] = [
                {"part": part, "kl": kl, "source": source} for part, kl, source in explain.loss_lines(plan, question)
            ]
        click.echo(json.dumps(data, indent=2))
        return
    for line in () if overrides else _about(recipe_path):  # it speaks of the recipe as it is written
        click.echo(line)
    _show(plan, question, explained)


def _about(path: Path) -> list[str]:
    """The recipe's head comment, without the lines that give commands."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line[1:]
        if text.strip() and not text.startswith("   ") and "serve.sh" not in text:
            lines.append(text.strip())
    return lines


def _show(plan: Plan, question: Question, explained: bool) -> None:
    from rich.text import Text

    from reapc.cli import tables

    chosen, console = plan.chosen, tables.console()
    decision = tables.table("Decision", ("", ""))
    decision.show_header = False
    place = chosen.placement
    parallel = f"TP {place.tensor_parallel}, PP {place.pipeline_parallel}, EP {place.expert_parallel}"
    if chosen.engine == "llama.cpp":
        parallel = f"layers per device {', '.join(map(str, place.layers_per_device))}"
        if place.offloaded_layers:
            parallel += f"; experts of the first {place.offloaded_layers} layers in RAM"
    ceiling = chosen.decode_tokens_per_second_ceiling
    rows = {
        "model": f"{plan.model} ({plan.num_experts} experts, top-{plan.top_k})",
        "target": plan.target,
        "engine, format": f"{chosen.engine}, {chosen.format}",
        "expert weights": f"{chosen.bits_per_expert_weight:.2f} bits each",
        "experts kept": f"{tables.experts(chosen, plan.num_experts)} (prune ratio {chosen.prune_ratio:.3f})",
        "layout": parallel,
        "context": f"{chosen.context} tokens x {chosen.concurrency}, KV cache {chosen.kv_dtype}",
        "weights": tables.format_bytes(chosen.weights_bytes),
        "predicted KL": f"{chosen.predicted_loss:.4f} nats per token ({plan.loss_source})",
        "decoding": f"at most {ceiling:.0f} tokens/s by bandwidth" if ceiling else "bandwidth not known",
    }
    for key, value in rows.items():
        decision.add_row(Text(key), Text(value))
    console.print(decision)
    for reason in plan.reasons:
        console.print(Text(f"- {reason}"))
    console.print(tables.device_table(place.devices))
    console.print(tables.bars(place.devices))
    sizes = explain.size_table(question, chosen.experts_kept)
    counts = list(dict.fromkeys(row["experts"] for row in sizes))
    heads = [f"{count} experts ({1 - count / plan.num_experts:.0%} pruned)" for count in counts]
    weights = tables.table("Weights by format and experts kept", ("format", *heads), heads)
    for name in dict.fromkeys(row["format"] for row in sizes):
        weights.add_row(name, *(tables.format_bytes(row["bytes"]) for row in sizes if row["format"] == name))
    console.print(weights)
    if plan.runners_up:
        console.print(tables.candidates_table("Runners-up", plan.runners_up, plan.num_experts))
    if plan.refused:
        console.print(tables.refused_table(plan.refused))
    if explained:
        console.print(tables.arithmetic_table(explain.arithmetic(plan, question)))
        loss = tables.table("Predicted loss", ("part", "KL", "where it comes from"), ("KL",))
        for part, kl, source in explain.loss_lines(plan, question):
            loss.add_row(Text(part), f"{kl:.4f}", Text(source))
        console.print(loss)
