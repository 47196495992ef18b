"""Corrects a target's usable memory from what engines really took on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.checkpoint.atomic import write_text
from reapc.errors import CannotBeDone, ReapcError
from reapc.plan import HOST, RAM
from reapc.serving.records import MeasuredDevice, Record

CARD = "card"


def excess_bytes(device: MeasuredDevice) -> int | None:
    """Bytes that the engine needed beyond the plan on this device (negative: it needed less); None without a measure.

    vLLM fills its share of a card with KV cache whatever the model is, so there what it found left for the cache is
    compared with what the plan left for it. Elsewhere all that the processes hold is compared with all that the plan
    counted."""
    planned = device.predicted
    if not planned.used_bytes:
        return None
    if (available := device.parts.get("available_kv_bytes")) is not None:
        return planned.free_bytes + planned.kv_bytes - available
    return None if device.total_bytes is None else device.total_bytes - planned.used_bytes


def kind_of(device: MeasuredDevice) -> str:
    """Which of a target's memories the device is: a card, or its RAM."""
    return RAM if device.predicted.name in (RAM, HOST) else CARD


@dataclass(frozen=True)
class Correction:
    """What ``records`` runs say of one memory of a target. ``usable_bytes`` is the target's, ``corrected_bytes`` what
    it should plan with: less by what an engine took beyond the plan; never more, for a card has no more than that."""

    key: str
    usable_bytes: int
    worst_excess_bytes: int
    records: int
    overhead_predicted_bytes: int
    overhead_measured_bytes: int | None

    @property
    def corrected_bytes(self) -> int:
        return self.usable_bytes - max(0, self.worst_excess_bytes)


def group(records: list[Record]) -> dict[str, list[Record]]:
    """Records by target; two targets of one name with different memories are told apart by a number."""
    groups: dict[str, list[Record]] = {}
    seen: dict[str, list[str]] = {}
    for record in records:
        identity = json.dumps(record.target, sort_keys=True)
        known = seen.setdefault(record.target_name, [])
        if identity not in known:
            known.append(identity)
        number = known.index(identity)
        groups.setdefault(record.target_name + (f" ({number + 1})" if number else ""), []).append(record)
    return groups


def corrections(records: list[Record]) -> list[Correction]:
    """One per memory of the target (all records are of one target) that was measured."""
    found = []
    target = records[-1].target
    for key, kind in (("vram", CARD), ("ram", RAM)):
        usable = int(target.get(key) or 0)
        pairs = [
            (record.run, device, excess)
            for record in records
            for device in record.devices
            if kind_of(device) == kind and device.predicted.given and (excess := excess_bytes(device)) is not None
        ]
        if not pairs or not usable:
            continue
        _, worst, excess = max(pairs, key=lambda pair: pair[2])
        measured = [d.overhead_bytes for _, d, _ in pairs if d.overhead_bytes is not None]
        # the RAM beside cards and the RAM alone have other overheads, so the predicted one is the worst device's
        found.append(
            Correction(
                key=key,
                usable_bytes=usable,
                worst_excess_bytes=excess,
                records=len({run for run, _, _ in pairs}),
                overhead_predicted_bytes=worst.predicted.overhead_bytes,
                overhead_measured_bytes=max(measured) if measured else None,
            )
        )
    return found


def override(records: list[Record], found: list[Correction]) -> str:
    """A target file in TOML with the corrected memory. CannotBeDone when nothing is to be corrected."""
    changed = {item.key: item for item in found if item.corrected_bytes < item.usable_bytes}
    if not changed:
        raise CannotBeDone(
            "nothing to correct: no engine took more than the plan had counted",
            hint="the target's usable bytes stay as they are; a file is written only for a correction",
        )
    if any(item.corrected_bytes <= 0 for item in changed.values()):
        raise CannotBeDone("the corrected memory would be nothing: these records are not of this target's hardware")
    target = dict(records[-1].target)
    name = str(target.pop("name", "target"))
    for size in ("vram", "vram_total", "ram"):
        if target.get(size):
            target[size] = f"{changed[size].corrected_bytes if size in changed else target[size]}B"
    runs = max(item.records for item in changed.values())
    target["source"] = f"{name}, corrected by reapc targets calibrate from {runs} measured run{'s' if runs > 1 else ''}"
    lines = [f"# {target['source']}.", *(_why(item) for item in changed.values())]
    lines.append(f"name = {_toml(name + '-calibrated')}")
    lines += [f"{key} = {_toml(value)}" for key, value in target.items() if value not in (None, "", 0, False)]
    return "\n".join(lines) + "\n"


def _why(item: Correction) -> str:
    return (
        f"# {item.key}: {item.usable_bytes} bytes less {item.worst_excess_bytes}, what an engine took beyond the plan"
        f" ({item.records} run{'s' if item.records > 1 else ''})."
    )


def _toml(value: Any) -> str:
    """A TOML value; JSON's strings, numbers and booleans are TOML's."""
    return json.dumps(value)


def apply(records: list[Record], found: list[Correction], path: Path) -> None:
    """Writes the override to a new file and reads it back as a recipe would."""
    from reapc.target import make_target, read_toml

    if path.suffix != ".toml":
        raise ReapcError(f"--apply {path}: a name that ends in .toml is expected")
    if path.exists():
        raise ReapcError(f"{path}: is there already and is left untouched", hint="choose another name with --apply")
    text = override(records, found)
    write_text(path, text)
    make_target(read_toml(path), where=str(path))
