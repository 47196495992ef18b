"""``reapc serve OUT``: starts the server of a build, shows how it does, records what it takes, stops it cleanly."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reapc.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from reapc.serving.records import Record
    from reapc.serving.watch import Sample


@click.command("serve")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", help="Address to listen on; default: the recipe's (127.0.0.1). Others demand an API key.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the recipe's.")
@click.option("--timeout", type=click.FloatRange(1), default=1800, show_default=True, help="Seconds to wait for it.")
@click.option("--log", type=click.Path(path_type=Path, dir_okay=False), help="The engine's log; default: a file in "
              "$XDG_STATE_HOME/reapc/logs.")  # fmt: skip
@click.option(
    "--interval", type=click.FloatRange(0.2), help="Seconds between two looks; default: 1 on a terminal, else 30."
)
def command(
    out: Path, arguments: tuple[str, ...], host: str | None, port: int | None, timeout: float, log: Path | None,
    interval: float | None,
) -> None:  # fmt: skip
    """Start OUT/serve.sh and watch it until Ctrl-C. Arguments after -- go to the engine."""
    from reapc.serving.built import read_built
    from reapc.serving.watch import Serving, Stopped, default_log, stop_signals

    built = read_built(out)
    for warning in built.warnings:
        click.echo(f"warning: {warning}", err=True)
    settings = (built.manifest.get("recipe") or {}).get("serve") or {}
    host = host or str(settings.get("host") or "127.0.0.1")
    port = port or int(settings.get("port") or 8080)
    log = log or default_log(built)
    line = _Line()
    with stop_signals():
        try:
            with Serving(built, host, port, log, arguments) as serving:
                click.echo(f"starting {built.script}; its log: {log}", err=True)
                seconds = serving.wait(timeout, line.loading)
                line.clear()
                click.echo(
                    f"ready after {format_seconds(seconds)}: {serving.url}/v1, model {serving.client.info.model!r}"
                )
                record = serving.record()
                written = serving.keep(record)
                for text in table_of(record):
                    click.echo(text)
                if written:
                    click.echo(f"recorded in {written}; `reapc targets calibrate` compares it with the plan", err=True)
                serving.watch(interval or (1.0 if line.live else 30.0), line.running)
        except Stopped:
            line.clear()
            click.echo("stopped", err=True)


def table_of(record: Record) -> list[str]:
    """Predicted and measured bytes of every device, as lines."""
    lines = []
    for device in record.devices:
        predicted = device.predicted
        if device.total_bytes is None and not device.parts:
            lines.append(f"{predicted.name}: {format_bytes(predicted.used_bytes)} predicted, not measured here")
            continue
        total = "not measured" if device.total_bytes is None else format_bytes(device.total_bytes)
        lines.append(
            f"{predicted.name}: {format_bytes(predicted.used_bytes)} predicted, {total} taken ({device.source})"
        )
        for part, name in (("weights", "weights"), ("kv", "KV cache"), ("state", "state"), ("workspace", "workspace")):
            ours, real = getattr(predicted, f"{part}_bytes"), device.parts.get(f"{part}_bytes")
            if real is not None or ours:
                said = "not said by the engine" if real is None else format_bytes(real)
                lines.append(f"  {name}: {format_bytes(ours)} predicted, {said}")
        if (overhead := device.overhead_bytes) is not None and "available_kv_bytes" not in device.parts:
            lines.append(f"  the rest: {format_bytes(predicted.overhead_bytes)} predicted, {format_bytes(overhead)}")
        if (available := device.parts.get("available_kv_bytes")) is not None:
            lines.append(f"  left for the KV cache: {format_bytes(available)}")
    if record.kv_tokens is not None:
        lines.append(f"KV cache: room for {record.kv_tokens:,} tokens")
    return lines


class _Line:
    """One line that is written over on a terminal, and lines now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.told = time.monotonic()

    def clear(self) -> None:
        """Empties the line."""
        if self.live:
            click.echo("\r\x1b[2K", nl=False, err=True)

    def loading(self, seconds: float, last: str) -> None:
        """While it loads: how long, and the last thing it said."""
        plain = "".join(c for c in last if c.isprintable())
        if self.live:
            click.echo(f"\r\x1b[2Kloading, {format_seconds(seconds)}: {plain[:100]}", nl=False, err=True)
        elif time.monotonic() - self.told >= 10:
            self.told = time.monotonic()
            click.echo(f"loading, {format_seconds(seconds)}: {plain[:200]}", err=True)

    def running(self, sample: Sample) -> None:
        """While it runs."""
        rate = "no counters"
        if sample.made_per_second is not None and sample.read_per_second is not None:
            rate = f"{sample.made_per_second:.1f} tokens/s made, {sample.read_per_second:.1f} read"
        parts = [rate, f"{sample.running} running"]
        if sample.ram:
            parts.append(f"RAM {format_bytes(sample.ram.total_bytes)}")
        parts += [f"card {card.index} {format_bytes(card.used_bytes)}" for card in sample.cards]
        text = ", ".join(parts)
        click.echo(f"\r\x1b[2K{text}" if self.live else text, nl=not self.live, err=True)
