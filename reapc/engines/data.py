"""What each engine can do, as data with a version and a source: ``engines/vllm.toml`` and ``engines/llamacpp.toml``."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from reapc.errors import ReapcError
from reapc.schema import nearest
from reapc.units import parse_bytes


@lru_cache(maxsize=4)
def load(engine: str) -> dict[str, Any]:
    """The parsed data of ``vllm`` or ``llamacpp``; sizes under ``[memory]`` are bytes."""
    data = tomllib.loads((Path(__file__).parent / f"{engine}.toml").read_text())
    memory = data["memory"]
    for key, value in memory.items():
        if isinstance(value, str):
            memory[key] = parse_bytes(value)
    return data


def capability(text: str | None) -> tuple[int, int] | None:
    """(8, 6) of "8.6"; None where it is not known."""
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)


def check_roads(names: tuple[str, ...]) -> None:
    """Refuses an experimental road that no engine's data names."""
    known = load("vllm").get("roads", {})
    for name in names:
        if name not in known:
            listed = "; ".join(f"{road}: {entry['description']}" for road, entry in known.items())
            raise ReapcError(f"unknown experimental road {name!r}", hint=f"{nearest(name, known)}known: {listed}")
