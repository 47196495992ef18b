"""Apple's GPU, through sysctl and vm_stat."""

from __future__ import annotations

import re

from reapc.probes.host import GIB, SHARED_HOST_BYTES, Card, Host, listed_bandwidth, targets_called
from reapc.units import parse_bytes


def apple(host: Host, findings: list[str]) -> tuple[list[Card], int]:
    """The GPU's share of a Mac's memory, and all memory that is available."""

    def sysctl(key: str) -> str:
        return (host.run(["sysctl", "-n", key]) or "").strip()

    memory = int(sysctl("hw.memsize") or 0)
    chip = sysctl("machdep.cpu.brand_string") or "Apple GPU"
    available = _vm_stat(host.run(["vm_stat"]) or "")
    if available is None:
        available = memory
        findings.append("RAM: vm_stat does not answer; all memory is taken as available")
    else:
        findings.append(
            f"RAM: {available} of {memory} bytes available (vm_stat: free, inactive, speculative, purgeable)"
        )
    if not chip.startswith("Apple") or not memory:
        findings.append(f"Apple: no GPU to plan for on {chip}")
        return [], available
    limit, how = _metal_limit(chip, memory, int(sysctl("iogpu.wired_limit_mb") or 0))
    free = min(limit, max(0, available - min(SHARED_HOST_BYTES, available // 4)))
    findings.append(f"{chip}: its GPU may hold {limit} of {memory} bytes ({how}); planned with {free} bytes")
    return [Card(0, chip, "metal", free, limit, bandwidth=listed_bandwidth(chip), shared_bytes=free)], available


def _metal_limit(chip: str, memory: int, wired_limit_mib: int) -> tuple[int, str]:
    """recommendedMaxWorkingSetSize in bytes, and where it comes from."""
    if wired_limit_mib:
        return wired_limit_mib * 2**20, "sysctl iogpu.wired_limit_mb"
    for data in targets_called(chip):
        if data.get("marketed") == f"{memory // GIB} GB":
            return parse_bytes(data["vram"]), "macOS's default, seen in logs of this machine"
    share = (2, 3) if memory <= 36 * GIB else (3, 4)
    return memory * share[0] // share[1], (
        f"{share[0]}/{share[1]} of the memory, the default of older macOS; newer ones allow more: llama.cpp prints it "
        "as recommendedMaxWorkingSetSize"
    )


def _vm_stat(text: str) -> int | None:
    page = re.search(r"page size of (\d+) bytes", text)
    pages = dict(re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.", text, flags=re.MULTILINE))
    if not page or "free" not in pages:
        return None
    return int(page[1]) * sum(int(pages.get(key, 0)) for key in ("free", "inactive", "speculative", "purgeable"))
