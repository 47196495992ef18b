"""What engines really took: one line of JSON per run, appended to a file in the user's state folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reapc import __version__
from reapc.errors import CannotBeDone, ReapcError
from reapc.plan import DeviceBytes
from reapc.serving.built import Built
from reapc.serving.engine_log import EngineMemory
from reapc.serving.memory import CardUse, RamUse

PARTS = ("weights_bytes", "kv_bytes", "state_bytes", "workspace_bytes", "overhead_bytes")


class MeasuredDevice(BaseModel):
    """One device: what was predicted, and what was measured. ``total_bytes`` is what the engine's processes held;
    ``parts`` what its log says; None and empty where nothing told."""

    model_config = ConfigDict(frozen=True)

    predicted: DeviceBytes
    total_bytes: int | None = None
    source: str = ""
    parts: dict[str, int] = Field(default_factory=dict)

    @property
    def overhead_bytes(self) -> int | None:
        """What the processes held beyond the parts that the engine's log names."""
        known = sum(size for name, size in self.parts.items() if name in PARTS)
        return self.total_bytes - known if self.total_bytes is not None and known else None


class Record(BaseModel):
    """One run of one build. ``target`` is the recipe's [target] as resolved; ``run`` tells records of one run apart:
    a later one replaces the earlier."""

    model_config = ConfigDict(frozen=True)

    run: str
    date: str
    reapc: str
    engine: str
    engine_version: str = ""
    model: str
    format: str
    context: int
    concurrency: int
    target: dict[str, Any]
    devices: tuple[MeasuredDevice, ...]
    kv_tokens: int | None = None

    @property
    def target_name(self) -> str:
        return str(self.target.get("name", ""))


def state_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_STATE_HOME/reapc`` or ``~/.local/state/reapc``."""
    return Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "reapc"


def records_file() -> Path:
    """Where the records are."""
    return state_folder() / "measured.jsonl"


def make_record(
    run: str, built: Built, version: str, ram: RamUse | None, cards: list[CardUse], log: EngineMemory
) -> Record:
    """The record of a running build: the plan's devices, in its order, beside what was measured."""
    devices, number = [], 0
    for device in built.plan.chosen.placement.devices:
        if device.name in ("RAM", "host"):
            total, source, key = (ram.total_bytes, ram.source, "RAM") if ram else (None, "", "RAM")
        else:
            card = cards[number] if number < len(cards) else None
            total, source, key = (card.used_bytes, card.source, str(number)) if card else (None, "", str(number))
            number += 1
        parts = log.devices.get(key, {})
        devices.append(MeasuredDevice(predicted=device, total_bytes=total, source=source, parts=parts))
    chosen = built.plan.chosen
    target = (built.manifest.get("recipe") or {}).get("target") or {"name": built.plan.target}
    return Record(
        run=run,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        reapc=__version__,
        engine=chosen.engine,
        engine_version=version,
        model=built.plan.model,
        format=chosen.format,
        context=chosen.context,
        concurrency=chosen.concurrency,
        target=target,
        devices=tuple(devices),
        kv_tokens=log.kv_tokens,
    )


def append(record: Record, path: Path | None = None) -> Path:
    """Adds one line, under a lock, and returns the file."""
    path = path or records_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(record.model_dump(mode="json")) + "\n")
            file.flush()
    except OSError as error:
        raise CannotBeDone(
            f"{path}: the measured memory cannot be written: {error.strerror}", hint="set XDG_STATE_HOME"
        ) from error
    return path


def read_records(path: Path | None = None) -> list[Record]:
    """The last record of every run, in the order of the runs; an empty list without a file."""
    path = path or records_file()
    if not path.exists():
        return []
    found: dict[str, Record] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            raise ReapcError(
                f"{path}:{number}: not a record of `reapc serve`: {error.errors()[0]['msg']}",
                hint="remove that line, or the whole file, to go on",
            ) from error
        found[record.run] = record
    return list(found.values())
