"""The memory that a running engine takes: its processes in RAM, and on every card."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.probes import Host, nvidia_cards

_FIELDS = re.compile(r"^(Pss|Pss_Anon|Pss_File|Pss_Shmem|VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class RamUse:
    """Bytes of all processes of an engine. Pages that they share count once (``pss``) where the kernel tells, else
    once per process (``rss``)."""

    total_bytes: int
    anonymous_bytes: int
    file_bytes: int
    source: str


def process_tree(leader: int, proc: Path = Path("/proc")) -> set[int]:
    """``leader``, all its descendants, and everything else in the session that it leads."""
    parents: dict[int, int] = {}
    found = {leader}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # the command's name, in brackets, may hold spaces and brackets itself
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":
                continue
            pid = int(folder.name)
            parents[pid] = int(fields[1])
            if int(fields[3]) == leader:
                found.add(pid)
        except (OSError, IndexError, ValueError):
            continue
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found & parents.keys()


def ram_use(pids: Iterable[int], proc: Path = Path("/proc")) -> RamUse | None:
    """RAM of the processes; None where /proc does not tell (no Linux, or all of them ended)."""
    total = anonymous = file = 0
    sources = set()
    for pid in pids:
        values: dict[str, int] = {}
        for name in ("smaps_rollup", "status"):
            try:
                text = (proc / str(pid) / name).read_text()
            except OSError:
                continue
            values = {key: int(number) * 1024 for key, number in _FIELDS.findall(text)}
            if values:
                break
        if "Pss" in values:
            sources.add("pss")
            total += values["Pss"]
            anonymous += values.get("Pss_Anon", 0) + values.get("Pss_Shmem", 0)
            file += values.get("Pss_File", 0)
        elif "VmRSS" in values:
            sources.add("rss")
            total += values["VmRSS"]
            anonymous += values.get("RssAnon", 0) + values.get("RssShmem", 0)
            file += values.get("RssFile", 0)
    return RamUse(total, anonymous, file, "/proc, " + "+".join(sorted(sources))) if sources else None


@dataclass(frozen=True)
class CardUse:
    """Bytes on one card: of the engine's processes, or (``source`` says so) what the card holds more than before."""

    index: int
    name: str
    used_bytes: int
    total_bytes: int
    source: str


class Cards:
    """The visible NVIDIA cards, looked at before the engine starts and after."""

    def __init__(self, host: Host | None = None) -> None:
        self.host = host or Host()
        self.before = {card.index: card.total_bytes - card.free_bytes for card in nvidia_cards(self.host, 0, [])}

    def use(self, pids: set[int]) -> list[CardUse]:
        """What the processes hold on each card, in the order of the cards; empty without NVIDIA's driver."""
        if not self.before:
            return []
        cards = nvidia_cards(self.host, 0, [])
        held = _held(self.host.load("pynvml"), pids)
        found = []
        for card in cards:
            mine = held.get(card.index)
            if mine:
                used, source = mine, "NVML, the engine's processes"
            else:  # in a container NVML's process ids are the host's
                grown = card.total_bytes - card.free_bytes - self.before.get(card.index, 0)
                used, source = max(0, grown), "NVML, the card's used memory less that before the start"
            found.append(CardUse(card.index, card.name, used, card.total_bytes, source))
        return found


def _held(nvml: Any, pids: set[int]) -> dict[int, int]:
    """Bytes per card index that these processes hold, as NVML lists them."""
    held: dict[int, int] = {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return held
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            try:
                running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except nvml.NVMLError:
                continue
            mine = [int(p.usedGpuMemory) for p in running if p.pid in pids and p.usedGpuMemory]
            if mine:
                held[index] = sum(mine)
    except nvml.NVMLError:
        pass
    finally:
        nvml.nvmlShutdown()
    return held
