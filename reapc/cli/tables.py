"""Tables for a terminal: at most 100 columns, names shown as they are (no markup is read from them)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from reapc.plan import Candidate, DeviceBytes, Refusal
from reapc.planner.explain import Line
from reapc.report.devices import equal_devices, names_of
from reapc.units import format_bytes

WIDTH = 100
BAR = 40
_PARTS = (("weights", "█", "cyan"), ("kv", "▓", "green"), ("state", "▒", "blue"), ("workspace", "░", "yellow"))


def console() -> Console:
    """A console of the terminal's width, at most 100 columns; exactly 100 where there is no terminal."""
    found = Console(highlight=False)
    return Console(highlight=False, width=min(found.width, WIDTH) if found.is_terminal else WIDTH)


def table(title: str, columns: Sequence[str], right: Iterable[str] = ()) -> Table:
    """An empty table; the columns in ``right`` are aligned to the right."""
    made = Table(title=Text(title), title_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def device_table(devices: Sequence[DeviceBytes]) -> Table:
    """Bytes per device."""
    columns: tuple[str, ...] = ("device", "weights", "KV", "state", "workspace", "overhead", "capacity", "free")
    if not any(device.state_bytes for device in devices):
        columns = tuple(column for column in columns if column != "state")
    made = table("Bytes per device", columns, columns[1:])
    for d in devices:
        parts = [d.weights_bytes, d.kv_bytes, d.state_bytes, d.workspace_bytes, d.overhead_bytes]
        if "state" not in columns:
            del parts[2]
        capacity = format_bytes(d.capacity_bytes) if d.given else "not given"
        free = format_bytes(d.free_bytes) if d.given else "-"
        made.add_row(Text(d.name), *map(format_bytes, parts), capacity, free)
    return made


def device_bar(device: DeviceBytes) -> Text:
    """One device as a bar: weights, KV, state, workspace, overhead, free."""
    amounts = [
        device.weights_bytes, device.kv_bytes, device.state_bytes, device.workspace_bytes + device.overhead_bytes,
    ]  # fmt: skip
    whole = max(device.capacity_bytes, device.used_bytes, 1)
    text, drawn, total = Text(), 0, 0
    for (_, char, style), amount in zip(_PARTS, amounts, strict=True):
        total += amount
        cells = round(BAR * total / whole) - drawn
        drawn += cells
        text.append(char * cells, style)
    text.append("·" * (BAR - drawn), "dim")
    return text


def bars(devices: Sequence[DeviceBytes]) -> RenderableType:
    """A bar per device with memory that was stated; equal ones are drawn once."""
    groups = equal_devices([device for device in devices if device.given])
    lines: list[RenderableType] = []
    width = max((len(names_of(group)) for group in groups), default=0)
    for group in groups:
        line = Text(f"{names_of(group):<{width}} ")
        line.append_text(device_bar(group[0]))
        line.append(f" {format_bytes(group[0].free_bytes)} free of {format_bytes(group[0].capacity_bytes)}")
        lines.append(line)
    legend = Text(" " * (width + 1))
    for (name, char, style), label in zip(_PARTS, ("weights", "KV", "state", "workspace and overhead"), strict=True):
        if name == "state" and not any(device.state_bytes for device in devices):
            continue
        legend.append(char, style)
        legend.append(f" {label}  ")
    legend.append("· free")
    return Group(*lines, legend)


def experts(candidate: Candidate, total: int) -> str:
    """ "192 of 256"."""
    return f"{candidate.experts_kept} of {total}"


def candidates_table(title: str, candidates: Sequence[Candidate], total: int) -> Table:
    """Configurations, best first."""
    columns = ("engine", "format", "experts", "bits", "file", "free on the fullest", "predicted KL")
    made = table(title, columns, ("bits", "file", "free on the fullest", "predicted KL"))
    for item in candidates:
        made.add_row(
            item.engine,
            item.format,
            experts(item, total),
            f"{item.bits_per_expert_weight:.2f}",
            format_bytes(item.file_bytes),
            format_bytes(item.placement.fullest.free_bytes),
            f"{item.predicted_loss:.4f}",
        )
    return made


def refused_table(refused: Sequence[Refusal]) -> Table:
    """Every refusal with its reason; formats of one engine that share a reason are one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for refusal in refused:
        rows.setdefault((refusal.engine, refusal.reason), []).append(refusal.format)
    made = table("Refused", ("engine", "format", "reason"))
    for (engine, reason), formats in rows.items():
        names = list(dict.fromkeys(formats))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        made.add_row(engine, Text(shown), Text(reason))
    return made


def arithmetic_table(lines: Sequence[Line]) -> Table:
    """The arithmetic."""
    made = table("Arithmetic", ("what", "bytes", "formula"), ("bytes",))
    for name, size, formula in lines:
        made.add_row(Text(name), f"{size:,}", Text(formula))
    return made
