"""What every probe shares: a card as found, where to look, which cards are visible, and the RAM."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapc.target import FOLDER, read_toml

GIB = 2**30
# Left to the host where CPU and GPU share one memory that the driver does not divide.
SHARED_HOST_BYTES = 8 * GIB


@dataclass(frozen=True)
class Card:
    """One card as its driver shows it; ``total_bytes`` is what a program sees as the total."""

    index: int
    name: str
    kind: str
    free_bytes: int
    total_bytes: int
    compute_capability: str | None = None
    arch: str = ""
    bandwidth: float | None = None
    nvlink: bool = False
    shared_bytes: int = 0  # how much of free_bytes is taken from the RAM
    uuid: str = ""


def _run(command: list[str]) -> str | None:
    """A command's output; None when it is not there, fails, or takes more than 10 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Host:
    """Where to look; tests put fakes here."""

    system: str = field(default_factory=platform.system)
    sysfs: Path = Path("/sys")
    proc: Path = Path("/proc")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[list[str]], str | None] = _run
    load: Callable[[str], Any] = importlib.import_module

    def number(self, path: Path) -> int | None:
        """The one integer in a file, None when it is not there or says something else ("max")."""
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            return None


def targets_called(name: str) -> Iterator[dict[str, Any]]:
    """The known targets whose card the driver calls so."""
    for path in sorted(FOLDER.glob("*.toml")):
        data = read_toml(path)
        if name in data.get("driver_names", ()):
            yield data


def listed_bandwidth(name: str) -> float | None:
    """Bandwidth of the card that its driver calls so, from the known targets."""
    return next((float(data["bandwidth"]) for data in targets_called(name)), None)


def visible(cards: list[Card], host: Host, variable: str, findings: list[str]) -> list[Card]:
    """The cards that a program started here would see."""
    value = host.env.get(variable)
    if value is None or not cards:
        return cards
    seen: list[Card] = []
    for entry in (part.strip() for part in value.split(",")):
        match = [c for c in cards if str(c.index) == entry or (len(entry) > 4 and c.uuid.startswith(entry))]
        if len(match) != 1 or match[0] in seen:
            break  # the runtime stops at the first entry that it does not know
        seen.append(match[0])
    findings.append(f"{variable}={value!r}: {len(seen)} of {len(cards)} cards are visible")
    return sorted(seen, key=lambda card: card.index)


def meminfo(host: Host) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        text = (host.proc / "meminfo").read_text()
    except OSError:
        return {}
    return {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)}


def available_ram(host: Host, findings: list[str]) -> int:
    """RAM that a program can still get: MemAvailable, or what the container's limit leaves when that is less."""
    memory = meminfo(host)
    available = memory.get("MemAvailable", 0)
    if not available:
        findings.append(f"RAM: {host.proc / 'meminfo'} does not say what is available")
        return 0
    findings.append(f"RAM: {available} of {memory.get('MemTotal', 0)} bytes available (/proc/meminfo)")
    group = host.sysfs / "fs/cgroup"
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = host.number(group / limit_file), host.number(group / used_file)
        if limit is None or used is None:
            continue
        left = max(0, limit - used + _reclaimable(group / Path(limit_file).parent / "memory.stat"))
        if left < available:
            findings.append(f"RAM: the container's limit of {limit} bytes leaves {left} bytes")
            return left
    return available


def _reclaimable(stat: Path) -> int:
    """Page cache in a cgroup that the kernel gives back when asked."""
    try:
        found = re.search(r"^(?:total_)?inactive_file (\d+)$", stat.read_text(), flags=re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
