"""``reapc inspect``: a model in numbers, from its config.json (or a GGUF's header) alone."""

from __future__ import annotations

import json
from typing import Any

import click

_BESIDE = {
    "total": "total",
    "active": "active per token",
    "mtp": "MTP, beside it",
    "vision": "vision, beside it",
    "on_disk": "on disk",
}


@click.command("inspect")
@click.argument("model")
@click.option("--experts", type=int, help="As if this many experts were kept per layer.")
@click.option("--format", "fmt", help="Weights in this format (`reapc formats`); default: as published.")
@click.option("--mtp", type=click.Choice(["keep", "drop"]), default="drop", show_default=True, help="MTP layers.")
@click.option("--kv-dtype", type=click.Choice(["f16", "bf16", "fp8", "q8_0", "q4_0"]), default="f16", show_default=True)
@click.option("--context", type=click.IntRange(min=1), help="Tokens of one sequence (default: 32768, or the maximum).")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    experts: int | None,
    fmt: str | None,
    mtp: str,
    kv_dtype: str,
    context: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Shows parameters, experts, bytes and KV cache of MODEL: a name of the catalogue, a folder, a config.json, a hub
    id or a .gguf file."""
    from reapc.checkpoint.source import find_model
    from reapc.inspection import Wanted, inspect, inspect_gguf

    found = find_model(model, revision)
    wanted = Wanted(experts, fmt, mtp == "keep", kv_dtype, context)
    if found.gguf is not None:
        data = inspect_gguf(found.gguf, wanted)
    else:
        from reapc.arch import model_spec

        config = found.config or {}
        data = inspect(found.name, model_spec(config, found.where), wanted)
        if found.catalogue:
            data["source"] = {"confidence": config.get("_confidence"), "copied_from": config.get("_source")}
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        _show(data)


def _show(data: dict[str, Any]) -> None:
    from rich.text import Text

    from reapc.cli import tables

    console = tables.console()
    counts = data["parameters"]
    console.print(Text(f"{data['model']} ({data['family']}, {data['layers']} layers)"))
    made = tables.table("", ("part", "parameters", "share"), ("parameters", "share"))
    for name, value in counts.items():
        if name not in _BESIDE and value:
            made.add_row(name.replace("_", " "), f"{value:,}", f"{value / counts['total']:.1%}")
    made.add_section()
    for name, label in _BESIDE.items():
        if counts[name]:
            made.add_row(label, f"{counts[name]:,}", f"{counts[name] / counts['total']:.1%}")
    console.print(made)
    below = tables.table("", ("", ""))
    below.show_header = False
    for name, text in _rows(data):
        below.add_row(name, Text(text))
    console.print(below)


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Experts, weights, KV cache, and where the numbers come from."""
    from reapc.units import format_bytes

    experts, weights, kv = data["experts"], data["weights"], data["kv"]
    kept = f"{experts['kept']} of {experts['count']}" if experts["kept"] != experts["count"] else f"{experts['count']}"
    groups = f", {experts['groups']} groups" if experts["groups"] > 1 else ""
    vision = f", {format_bytes(weights['vision_bytes'])} of them vision" if weights["vision_bytes"] else ""
    rows = [
        (
            "experts",
            f"{kept} in {experts['moe_layers']} layers, top-{experts['top_k']}, {experts['shared']} shared{groups}",
        ),
        (
            "weights",
            f"{format_bytes(weights['bytes'])} ({weights['bytes']:,} bytes) as {weights['format']}, "
            f"{weights['bits_per_weight']:.2f} bits per weight{vision}",
        ),
    ]
    if kv["bytes"] is not None:
        rows.append(
            (
                "KV cache",
                f"{kv['kind']}, {kv['dtype']}: {kv['bytes_per_token']:,} bytes a token, "
                f"{format_bytes(kv['bytes'])} at {kv['context']:,} tokens (of {data['max_context']:,})",
            )
        )
        if kv["state_bytes_per_sequence"]:
            rows.append(("state", f"{format_bytes(kv['state_bytes_per_sequence'])} per sequence"))
    rows += [("note", note) for note in data["notes"]]
    if source := data.get("source"):
        rows.append(("config", f"catalogue: {source['confidence']}; {source['copied_from']}"))
    return rows
