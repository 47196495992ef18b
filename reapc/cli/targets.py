"""``reapc targets``: the hardware budgets that come with reapc."""

from __future__ import annotations

import json

import click

from reapc.target import Target, known_targets, load_target
from reapc.units import format_bytes


def _size(target: Target) -> str:
    if target.gpus:
        return f"{target.gpus} x {format_bytes(target.vram)}"
    return format_bytes(target.ram)


@click.command("targets")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """Lists the known targets, or describes the one called NAME."""
    targets = [load_target(name)] if name else [load_target(known) for known in known_targets()]
    if as_json:
        data = [target.model_dump(mode="json") for target in targets]
        click.echo(json.dumps(data[0] if name else data, indent=2))
        return
    if not name:
        width = max(len(target.name) for target in targets)
        for target in targets:
            click.echo(f"{target.name:<{width}}  {_size(target):>16}  {target.description}")
        return
    target = targets[0]
    rows = {
        "name": target.name,
        "description": target.description,
        "usable memory": f"{_size(target)} ({target.vram or target.ram} bytes{' each' if target.gpus > 1 else ''})",
        "bandwidth": f"{target.bandwidth / 1e9:.0f} GB/s" if target.bandwidth else "not known",
        "compute capability": target.compute_capability or "none",
        "source": target.source,
    }
    for key, value in rows.items():
        click.echo(f"{key:<20}{value}")
