"""``reapc targets``: the hardware budgets that come with reapc."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import click

import reapc.engines
from reapc.errors import CannotBeDone, ReapcError
from reapc.target import ASSUMED_CAPABILITY, ASSUMED_RAM_BANDWIDTH, Target, all_targets, load_target
from reapc.units import format_bytes

WIDTH = 100
GROUPS = (
    "GeForce cards (no peer-to-peer)",
    "NVIDIA workstation and data centre cards",
    "AMD cards",
    "CPU and GPU share the memory",
    "RAM alone",
)
_FEATURES = {
    "bf16": "bf16 weights",
    "fp16": "fp16 weights",
    "gptq": "GPTQ weights",
    "auto-round": "AutoRound weights",
    "ct": "compressed-tensors int weights",
    "fp8": "FP8 weights",
    "fp8-block": "FP8 weights in blocks",
    "int8": "int8 weights",
    "nvfp4": "NVFP4 weights",
    "mxfp4": "MXFP4 weights",
    "sparse-attention": "sparse attention (DSA: GLM-5, DeepSeek-V3.2)",
}


def _group(target: Target) -> str:
    if not target.gpus:
        return GROUPS[4]
    if target.unified:
        return GROUPS[3]
    if target.kind != "cuda":
        return GROUPS[2]
    return GROUPS[0] if target.geforce else GROUPS[1]


def _capability(target: Target) -> str:
    if not target.gpus:
        return "-"
    return target.compute_capability or target.arch or (target.kind if target.kind != "cuda" else "not stated")


def rules_out(target: Target) -> list[str]:
    """What the hardware keeps engines from doing, in words, from the engines' data and facts/hardware-targets.csv."""
    if not target.gpus:
        return [
            "vLLM: it serves a quantized MoE on a CPU with AMX alone; on AVX2 every one of them fails",
            "no card: llama.cpp reads each token's weights at the speed of the RAM",
        ]
    if target.kind != "cuda":
        marlin = "vLLM has no Marlin kernels on ROCm" if target.kind == "rocm" else "vLLM does not run on Metal"
        return [f"vLLM: it is planned for CUDA cards alone ({marlin}); llama.cpp serves here"]
    capability = target.capability or ASSUMED_CAPABILITY
    data = tomllib.loads((Path(reapc.engines.__file__).parent / "vllm.toml").read_text())
    needs = {_FEATURES[key]: value for key, value in data["capability"].items() if key in _FEATURES}
    needs |= {f"an {key} KV cache": kv["capability"] for key, kv in data["kv"].items()}
    lines = [
        f"vLLM {data['version']}: {feature} needs compute capability {least}"
        for feature, least in needs.items()
        if capability < tuple(int(part) for part in least.split("."))
    ]
    if not target.computes_fp8:
        lines.append("FP8 arithmetic needs compute capability 8.9; FP8 weights are read and computed in 16 bits")
    if capability < (10, 0):
        lines.append("FP4 arithmetic needs compute capability 10.0; NVFP4 and MXFP4 weights are computed in 16 bits")
    if target.geforce and target.gpus > 1:
        lines.append("no peer-to-peer between the cards: vLLM is started with --disable-custom-all-reduce")
    return lines


def _rows(target: Target) -> dict[str, str]:
    bandwidth = f"{target.bandwidth / 1e9:.0f} GB/s" if target.bandwidth else "not known"
    rows = {"name": target.name, "description": target.description}
    if target.gpus:
        count = f"{target.gpus} on {target.nodes} machines" if target.nodes > 1 else str(target.gpus)
        sold = f", sold as {target.marketed}" if target.marketed else ""
        rows |= {
            "cards": f"{count} x {target.card}{sold}",
            "usable memory": f"{target.gpus} x {format_bytes(target.vram)} ({target.vram} bytes each)",
        }
        if target.vram_total > target.vram:
            rows["driver's total"] = f"{format_bytes(target.vram_total)} ({target.vram_total} bytes)"
        rows |= {
            "bandwidth": f"{bandwidth} a card",
            "capability": _capability(target) if target.kind != "cuda" else f"compute capability {_capability(target)}",
            "between cards": target.interconnect or "not stated",
        }
        ram = f"{format_bytes(target.ram)} ({target.ram} bytes)" if target.ram else "not stated; say --ram 64GB"
        rows["host RAM"] = f"{ram}, {'of the same memory' if target.unified else _host_bandwidth(target)}"
    else:
        rows |= {"usable memory": f"{format_bytes(target.ram)} ({target.ram} bytes)", "bandwidth": bandwidth}
    if target.assumptions:
        rows["assumes"] = target.assumptions
    return rows | {"source": target.source}


def _host_bandwidth(target: Target) -> str:
    if target.ram_bandwidth:
        return f"{target.ram_bandwidth / 1e9:.0f} GB/s"
    return f"{ASSUMED_RAM_BANDWIDTH / 1e9:.0f} GB/s assumed"


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return Console(highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


def _print_list(targets: list[Target]) -> None:
    from rich.table import Table

    console = _console()
    titles = ("usable per card", "GB/s per card", "capability", "RAM")
    for number, group in enumerate(GROUPS):
        table = Table(box=None, pad_edge=False, show_header=not number, header_style="bold")
        table.add_column("name", no_wrap=True, width=18)
        table.add_column("cards", no_wrap=True, width=20)
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True, width=max(10, len(title)))
        members = [target for target in targets if _group(target) == group]
        for target in sorted(members, key=lambda t: (t.vram, t.card, t.gpus, t.ram)):
            table.add_row(
                target.name,
                f"{target.gpus} x {target.card}" if target.gpus else "-",
                format_bytes(target.vram) if target.gpus else "-",
                f"{target.bandwidth / 1e9:.0f}" if target.bandwidth else "-",
                _capability(target),
                format_bytes(target.ram) if target.ram else "-",
            )
        console.print(f"{chr(10) if number else ''}[bold]{group}[/bold]")
        console.print(table)
    console.print(
        "\nA file of your own works too: gpus, vram and ram, or base = NAME and what differs (docs/targets.md)."
    )


def _print_one(target: Target) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in _rows(target).items():
        grid.add_row(key, value)
    for number, line in enumerate(rules_out(target) or ["nothing that the engines known to reapc ask for"]):
        grid.add_row("" if number else "rules out", line)
    _console().print(grid, markup=False)


@click.command("calibrate")
@click.option("--target", "name", metavar="NAME", help="Only the records of this target.")
@click.option("--apply", "file", type=click.Path(path_type=Path), metavar="FILE.toml", help="Write the corrected "
              "target here, for [target] name = \"FILE.toml\" in a recipe.")  # fmt: skip
@click.option(
    "--records", "path", type=click.Path(path_type=Path), help="Other records than those of `reapc serve` here."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def calibrate(name: str | None, file: Path | None, path: Path | None, as_json: bool) -> None:
    """Compare the memory that servers took (recorded by `reapc serve`) with the plans, and correct a target.

    The targets that come with reapc are not changed; a correction is a file of its own."""
    from reapc.serving import calibrate as work
    from reapc.serving.records import read_records, records_file

    where = path or records_file()
    if path is not None and not path.is_file():
        raise ReapcError(f"{path}: no such file")
    groups = work.group(read_records(where))
    if name is not None:
        groups = {title: records for title, records in groups.items() if name in (title, records[0].target_name)}
    if not groups:
        which = f" of the target {name!r}" if name else ""
        raise CannotBeDone(f"{where}: no record{which}", hint="reapc serve OUT writes one when the server is ready")
    found = {title: work.corrections(records) for title, records in groups.items()}
    if as_json:
        click.echo(json.dumps({title: _calibration_json(groups[title], found[title]) for title in groups}, indent=2))
    else:
        for title, records in groups.items():
            _print_calibration(title, records, found[title])
    if file is not None:
        if len(groups) > 1:
            raise ReapcError(
                f"--apply {file}: the records are of {len(groups)} targets: {', '.join(groups)}",
                hint="choose one with --target NAME",
            )
        (title,) = groups
        work.apply(groups[title], found[title], file)
        click.echo(f'written: {file}; use it with [target] name = "{file}"', err=True)


def _calibration_json(records: list[Any], found: list[Any]) -> dict[str, Any]:
    return {
        "records": [record.model_dump(mode="json") for record in records],
        "corrections": [{**vars(item), "corrected_bytes": item.corrected_bytes} for item in found],
    }


def _print_calibration(title: str, records: list[Any], found: list[Any]) -> None:
    from reapc.cli.serve import table_of

    click.echo(f"{title}: {len(records)} measured run{'s' if len(records) > 1 else ''}")
    for record in records:
        click.echo(f"  {record.date}  {record.model}, {record.format}, {record.engine} {record.engine_version}")
        for line in table_of(record):
            click.echo(f"    {line}")
    for item in found:
        runs = f"{item.records} run{'s' if item.records > 1 else ''}"
        overhead = ""
        if item.overhead_measured_bytes is not None:
            overhead = (
                f"; overhead {format_bytes(item.overhead_predicted_bytes)} predicted, at most "
                f"{format_bytes(item.overhead_measured_bytes)} measured"
            )
        if item.worst_excess_bytes > 0:
            click.echo(
                f"  {item.key}: an engine took {format_bytes(item.worst_excess_bytes)} more than planned ({runs}): "
                f"{format_bytes(item.usable_bytes)} -> {format_bytes(item.corrected_bytes)}{overhead}"
            )
        else:
            click.echo(
                f"  {item.key}: no engine took more than planned; the nearest left "
                f"{format_bytes(-item.worst_excess_bytes)} of what was counted "
                f"({runs}): {format_bytes(item.usable_bytes)} stays{overhead}"
            )
    if not found:
        click.echo("  nothing was measured that could correct it")


class _Targets(click.Command):
    """``reapc targets [NAME]``, and ``reapc targets calibrate`` with options of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["calibrate"]:
            return calibrate.make_context(f"{info_name} calibrate", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("targets", cls=_Targets)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """Lists the known targets, or describes the one called NAME (or the target file at that path).

    `reapc targets calibrate` corrects a target from the memory that servers really took."""
    if name is None:
        targets = list(all_targets())
        if as_json:
            click.echo(json.dumps([target.model_dump(mode="json") for target in targets], indent=2))
        else:
            _print_list(targets)
        return
    target = load_target(name)
    if as_json:
        click.echo(json.dumps({**target.model_dump(mode="json"), "rules_out": rules_out(target)}, indent=2))
    else:
        _print_one(target)
