"""``reapc inspect``: a model in numbers, from its config.json (or a GGUF's header) alone."""

from __future__ import annotations

import json
from typing import Any

import click

from reapc.errors import ReapcError


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
    from reapc.inspection import KV_BYTES, Wanted, inspect

    found = find_model(model, revision)
    note = ""
    if found.gguf is not None:
        from reapc.checkpoint.gguf_model import inspect_gguf

        if experts is not None or fmt is not None:
            raise ReapcError(
                f"{model}: --experts and --format need a checkpoint; a GGUF file is shown as it is",
                hint="name the model that it was made of",
            )
        data = inspect_gguf(found.gguf, KV_BYTES[kv_dtype], context, kv_dtype)
    else:
        from reapc.arch import model_spec

        assert found.config is not None
        spec = model_spec(found.config, found.where)
        data = inspect(found.name, spec, Wanted(experts, fmt, mtp == "keep", kv_dtype, context))
        note = str(found.config.get("_confidence", ""))
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    _show(data, note)


def _show(data: dict[str, Any], note: str) -> None:
    from rich.text import Text

    from reapc.cli import tables

    console = tables.console()
    counts, experts, weights, kv = data["parameters"], data["experts"], data["weights"], data["kv"]
    heading = f"{data['model']} ({data['family']}, {data['layers']} layers)"
    made = tables.table(heading, ("part", "parameters", "share"), ("parameters", "share"))
    for name, value in counts.items():
        if name in ("total", "active", "mtp", "vision", "on_disk") or not value:
            continue
        made.add_row(name.replace("_", " "), f"{value:,}", f"{value / counts['total']:.1%}")
    made.add_section()
    for name, label in (
        ("total", "total"), ("active", "active per token"), ("mtp", "MTP, beside it"), ("vision", "vision, beside it"),
        ("on_disk", "on disk"),
    ):  # fmt: skip
        if counts[name]:
            made.add_row(label, f"{counts[name]:,}", f"{counts[name] / counts['total']:.1%}")
    console.print(made)
    kept = f"{experts['kept']} of {experts['count']}" if experts["kept"] != experts["count"] else f"{experts['count']}"
    rows = [
        ("experts", f"{kept} in {experts['moe_layers']} layers, top-{experts['top_k']}, {experts['shared']} shared"),
        (
            "weights",
            f"{tables.format_bytes(weights['bytes'])} ({weights['bytes']:,} bytes) as {weights['format']}, "
            f"{weights['bits_per_weight']:.2f} bits per weight",
        ),
    ]
    if kv["bytes_per_token"] is None:
        rows.append(("KV cache", kv["note"]))
    else:
        rows.append(
            (
                "KV cache",
                f"{kv['kind']}, {kv['dtype']}: {kv['bytes_per_token']:,} bytes a token, "
                f"{tables.format_bytes(kv['bytes'])} at {kv['context']:,} tokens",
            )
        )
        if kv["state_bytes_per_sequence"]:
            rows.append(("state", f"{tables.format_bytes(kv['state_bytes_per_sequence'])} per sequence"))
    if note:
        rows.append(("config", f"catalogue, {note}"))
    below = tables.table("", ("", ""))
    below.show_header = False
    for name, text in rows:
        below.add_row(name, Text(text))
    console.print(below)
