"""``reapc formats``: the weight formats that the planner knows."""

from __future__ import annotations

import json
from typing import Any

import click

from reapc.engines import data
from reapc.formats import weights
from reapc.formats.gguf_types import DEFAULT_TYPES, NEEDS_IMATRIX, TYPES
from reapc.planner.question import writable


def rows() -> list[dict[str, Any]]:
    """One row per format. ``bits_per_weight`` counts scales and zero points; for a GGUF file type it is that of the
    type most tensors get (single tensors get more). ``min_capability`` is null where a CPU serves it."""
    vllm = data.load("vllm")
    found: list[dict[str, Any]] = []
    for name in weights.names():
        fmt = weights.parse(name)
        assert fmt is not None
        allowed = vllm["bits"].get(fmt.method)
        key = name if fmt.method == "plain" else fmt.method
        found.append(
            {
                "name": name,
                "bits_per_weight": fmt.bits_per_weight,
                "group_size": fmt.group_size or None,
                "engines": ["vllm"] if allowed is None or fmt.bits in allowed else [],
                "min_capability": vllm["capability"][key],
                "experts_only": fmt.quantized,
                "needs_imatrix": False,
                "buildable": writable(name),
            }
        )
    for name, kind in DEFAULT_TYPES.items():
        found.append(
            {
                "name": name,
                "bits_per_weight": TYPES[kind].bits_per_weight,
                "group_size": TYPES[kind].block if TYPES[kind].block > 1 else None,
                "engines": ["llama.cpp"],
                "min_capability": None,
                "experts_only": False,
                "needs_imatrix": name in NEEDS_IMATRIX,
                "buildable": writable(name),
            }
        )
    return found


@click.command("formats")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Lists the weight formats with bits per weight, engines and the minimum compute capability."""
    found = rows()
    if as_json:
        click.echo(json.dumps({"formats": found}, indent=2))
        return
    from reapc.cli import tables

    made = tables.table(
        "Weight formats", ("format", "bits per weight", "engine", "capability", "notes"), ("bits per weight",)
    )
    for row in found:
        notes = []
        if row["experts_only"]:
            notes.append(":experts limits it to the routed experts")
        if row["needs_imatrix"]:
            notes.append("needs an importance matrix")
        if not row["buildable"]:
            notes.append("planned, not yet built")
        made.add_row(
            row["name"], f"{row['bits_per_weight']:.3f}", ", ".join(row["engines"]) or "none",
            row["min_capability"] or "any", "; ".join(notes),
        )  # fmt: skip
    tables.console().print(made)
