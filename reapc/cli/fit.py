"""``reapc fit``: which models run on this hardware, pruned and quantized how."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from reapc.errors import ReapcError
from reapc.recipe import ServeSection
from reapc.target import Target, bare_target, cards_sold_as, load_target
from reapc.units import format_bytes, parse_bytes

KV_DTYPES = ("native", "auto", "f16", "bf16", "fp8", "q8_0", "q4_0")


class Size(click.ParamType):
    """A size with its unit: 24GB, 24GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value, zero=False)
        except ValueError as error:
            raise ReapcError(f"{param.opts[0] if param else 'size'}: {error}") from None


@click.command("fit")
@click.option("--vram", type=Size(), help="Memory of one card: 24GB, 24GiB.")
@click.option("--gpus", type=int, help="Number of cards (default 1).")
@click.option("--target", "target_name", help="A target of `reapc targets`, or a TOML file.")
@click.option("--ram", type=Size(), help="RAM: alone, or beside the cards for experts that do not fit on them.")
@click.option("--capability", help="Compute capability of the cards, as 8.6.")
@click.option("--model", "models", multiple=True, help="A model (catalogue name, folder, hub id); may be repeated.")
@click.option("--engine", type=click.Choice(["auto", "vllm", "llama.cpp"]), default="auto")
@click.option("--tp", type=click.IntRange(min=1), help="Tensor parallel degree (vLLM only); default: the best.")
@click.option("--context", type=click.IntRange(min=16), default=4096, show_default=True, help="Tokens per sequence.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), default="native", show_default=True)
@click.option("--format", "fmt", help="Only this weight format (`reapc formats` lists them).")
@click.option("--experts", type=int, help="Keep exactly this many experts per layer.")
@click.option("--max-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.25, show_default=True)
@click.option("--experimental", multiple=True, help="Admit an experimental road, by name.")
@click.option("--limit", type=click.IntRange(min=1), help="Show at most this many models.")
@click.option("--all", "everything", is_flag=True, help="Also show the models that do not fit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    vram: int | None,
    gpus: int | None,
    target_name: str | None,
    ram: int | None,
    capability: str | None,
    models: tuple[str, ...],
    engine: str,
    tp: int | None,
    context: int,
    concurrency: int,
    kv_dtype: str,
    fmt: str | None,
    experts: int | None,
    max_ratio: float,
    experimental: tuple[str, ...],
    limit: int | None,
    everything: bool,
    as_json: bool,
) -> None:
    """For each model of the catalogue (or those named): the best legal configuration on a hardware budget. Without a
    budget: on this machine."""
    from reapc.engines.data import check_roads
    from reapc.planner import fit
    from reapc.planner.question import format_pairs

    target, findings = _target(vram, gpus, target_name, ram, capability)
    check_roads(experimental)
    if fmt is not None:
        format_pairs(fmt, engine)  # refuses an unknown format, and one that the engine does not serve
    serve = ServeSection.model_validate(
        {"engine": engine, "context": context, "concurrency": concurrency, "kv_cache": kv_dtype,
         "experimental": experimental, "tensor_parallel": tp or "auto"},
    )  # fmt: skip
    wish = fit.Wish(target, serve, fmt, experts, max_ratio)
    specs = _specs(models)
    # A configuration that was asked for gets its verdict, whatever it is.
    shown = everything or bool(models and (fmt or experts is not None))
    verdicts = fit.fit(specs, wish, named=bool(models), everything=shown)
    fitting = sum(verdict.fits for verdict in verdicts)
    if limit is not None:
        verdicts = verdicts[:limit]
    if as_json:
        data = {"target": _target_json(target, findings), "results": [verdict.to_json() for verdict in verdicts]}
        click.echo(json.dumps(data, separators=(",", ":")) if not sys.stdout.isatty() else json.dumps(data, indent=2))
    else:
        _show(verdicts, target, findings, len(specs), fitting)
    if not fitting:
        raise fit.hopeless(specs, wish, named=bool(models))


def _target(
    vram: int | None, gpus: int | None, name: str | None, ram: int | None, capability: str | None
) -> tuple[Target, tuple[str, ...]]:
    """The target that the options mean, and what was found where they name none."""
    if name is not None:
        if vram is not None or gpus is not None or capability is not None:
            raise ReapcError("--target and --vram, --gpus or --capability are both given", hint="remove one of them")
        target = load_target(name)
        return (target.model_copy(update={"ram": ram}) if ram else target), ()
    if gpus is not None and vram is None:
        raise ReapcError(f"--gpus {gpus} without --vram", hint="say what one card holds: --vram 24GB")
    if vram is None and ram is None:
        from reapc.machine import detect

        machine = detect()
        return machine.target, machine.findings
    return bare_target(vram or 0, 1 if gpus is None else gpus, ram or 0, capability), ()


def _specs(models: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Names and specs of the models named, or of the whole catalogue."""
    from reapc.arch import known, model_spec

    if not models:
        return [(name, known.spec(name)) for name in known.names()]
    from reapc.checkpoint.source import find_model

    specs = []
    for text in models:
        found = find_model(text)
        if found.config is None:
            raise ReapcError(f"--model {text}: a GGUF file is what it is", hint="name the model that it was made of")
        specs.append((found.name, model_spec(found.config, found.where)))
    return specs


def _target_json(target: Target, findings: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        "gpus": target.gpus,
        "vram_bytes": target.vram,
        "ram_bytes": target.ram,
        "compute_capability": target.compute_capability,
        "assumptions": target.assumptions,
        "cards_sold_as": [{"card": card, "usable_bytes": size} for card, size in _sold_as(target)],
        "findings": list(findings),
        "source": target.source,
    }


def _sold_as(target: Target) -> list[tuple[str, int]]:
    return cards_sold_as(target.vram) if target.source == "the command line" and target.vram else []


def _show(verdicts: list[Any], target: Target, findings: tuple[str, ...], models: int, fitting: int) -> None:
    from rich.text import Text

    from reapc.cli import tables

    console = tables.console()
    for finding in findings:
        console.print(Text(finding))
    memory = f"{target.gpus} x {format_bytes(target.vram)}" if target.gpus else format_bytes(target.ram)
    beside = f" and {format_bytes(target.ram)} of RAM" if target.gpus and target.ram else ""
    console.print(Text(f"{target.name}: {memory}{beside}; {fitting} of {models} models fit"))
    if target.assumptions:
        console.print(Text(f"Read as: {target.assumptions}."))
    if sold := _sold_as(target):
        cards = ", ".join(f"{card} {size / 1e9:.1f} GB" for card, size in sold)
        console.print(Text(f"Cards sold in this size really show: {cards}; name one with --target."))
    if not verdicts:
        return
    speeds = [v.best.decode_tokens_per_second_ceiling if v.best else None for v in verdicts]
    columns = ["model", "experts", "format", "engine", "KL", "GiB", "free"]
    if any(speeds):
        columns.append("tok/s")
    made = tables.table("", columns, columns[4:])
    for column in made.columns[3:]:
        column.no_wrap = True
    for verdict, speed in zip(verdicts, speeds, strict=True):
        best, name = verdict.best, Text(verdict.model.split("/", 1)[-1] if "/" in verdict.model else verdict.model)
        if best is None:
            made.add_row(name, *("-" for _ in columns[1:]))
            continue
        cells = [
            f"{best.experts_kept}/{verdict.spec.num_experts}",
            best.format,
            best.engine,
            f"{best.predicted_loss:.4f}",
            f"{best.weights_bytes / 2**30:.1f}",
            f"{best.placement.fullest.free_bytes / 2**30:.1f}",
            "-" if speed is None else f"{speed:.0f}",
        ]
        made.add_row(name, *cells[: len(columns) - 1])
    console.print(made)
    speed_note = "; tok/s: the ceiling that the bandwidth sets" if any(speeds) else ""
    console.print(Text(f"KL: predicted loss (prior); GiB: weights; free: on the fullest device, in GiB{speed_note}"))
    first = verdicts[0]
    if first.best is not None:
        console.print(Text(f"{first.model}, {first.best.engine} {first.best.format}:"))
        console.print(tables.bars(first.best.placement.devices))
        console.print(Text(_why(first)))


def _why(verdict: Any) -> str:
    best, device = verdict.best, verdict.best.placement.fullest
    if not best.fits:
        return (
            f"It does not fit: {device.name} needs {format_bytes(device.used_bytes)} and has "
            f"{format_bytes(device.capacity_bytes)}."
        )
    pruned = "no expert is dropped" if best.prune_ratio == 0 else f"{best.prune_ratio:.0%} of the experts are dropped"
    return (
        f"It has the least predicted loss (KL {best.predicted_loss:.4f}, a prior that only ranks): {pruned}, at "
        f"{best.bits_per_expert_weight:.2f} bits per expert weight; {format_bytes(device.free_bytes)} stay free on "
        f"{device.name}."
    )
