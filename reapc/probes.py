"""Asking the drivers: NVIDIA's through nvidia-ml-py, AMD's through amdsmi, rocm-smi or sysfs, Apple's through sysctl.

None of them is required: what is missing is said in the findings.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapc.target import FOLDER, read_toml
from reapc.units import format_bytes, parse_bytes

GIB = 2**30
# AMD's processors whose graphics share the RAM and are worth planning for (Phoenix, Strix Point, Strix Halo).
SHARED_MEMORY_ARCHS = ("gfx1103", "gfx1150", "gfx1151", "gfx1152")
# Left to the host where CPU and GPU share one memory that the driver does not divide.
SHARED_HOST_BYTES = 8 * GIB
# A display's graphics without memory of its own has less.
LEAST_CARD_BYTES = 2 * GIB


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


def _listed(bandwidths_of: str) -> float | None:
    """Bandwidth of the card that its driver calls so, from the known targets."""
    for path in sorted(FOLDER.glob("*.toml")):
        data = read_toml(path)
        if bandwidths_of in data.get("driver_names", ()):
            return float(data["bandwidth"])
    return None


# --- NVIDIA ---------------------------------------------------------------------------------------------------------


def nvidia_cards(host: Host, ram_bytes: int, findings: list[str]) -> list[Card]:
    try:
        nvml = host.load("pynvml")
    except ImportError:
        findings.append("NVIDIA: not asked, the package nvidia-ml-py is not installed")
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        findings.append(f"NVIDIA: no card, the driver's library does not answer ({error})")
        return []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        cards = [
            card
            for i, handle in enumerate(handles)
            if (card := _nvidia_card(nvml, i, handle, host, ram_bytes, findings))
        ]
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as error:
        findings.append(f"NVIDIA: the driver's library stopped answering ({error})")
        return []
    finally:
        nvml.nvmlShutdown()
    cards = _visible(cards, host, "CUDA_VISIBLE_DEVICES", findings)
    for card in cards:
        findings.append(
            f"NVIDIA card {card.index}: {card.name}, {card.free_bytes} of {card.total_bytes} bytes free, "
            f"compute capability {card.compute_capability} (nvidia-ml-py, driver {driver})"
        )
    if not cards and not handles:
        findings.append(f"NVIDIA: the driver {driver} is there, and no card")
    return cards


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _nvidia_card(nvml: Any, index: int, handle: Any, host: Host, ram_bytes: int, findings: list[str]) -> Card | None:
    def ask(function: str, *arguments: Any) -> Any:
        """The answer, or None where this card or driver has none."""
        try:
            return getattr(nvml, function)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    name = _text(nvml.nvmlDeviceGetName(handle))
    mig = ask("nvmlDeviceGetMigMode")
    if mig and mig[0]:
        findings.append(f"NVIDIA card {index}: {name} is cut in MIG slices, which are not read; write [target] for one")
        return None
    memory = _nvidia_memory(nvml, handle)
    shared = 0
    if isinstance(memory, nvml.NVMLError):
        if memory.value != nvml.NVML_ERROR_NOT_SUPPORTED:
            findings.append(f"NVIDIA card {index}: {name} does not tell its memory ({memory}): not planned for")
            return None
        # GB10: the card's memory is the RAM
        free = shared = max(0, ram_bytes - SHARED_HOST_BYTES)
        total = max(free, _meminfo(host).get("MemTotal", 0))
        findings.append(
            f"NVIDIA card {index}: {name} has no memory of its own; it is planned with the RAM that is available less "
            f"{format_bytes(SHARED_HOST_BYTES)}; CUDA may call less free until the page cache is dropped"
        )
    else:
        free, total = memory.free, memory.total - getattr(memory, "reserved", 0)
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    clock, width = ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM), ask("nvmlDeviceGetMemoryBusWidth")
    return Card(
        index=index,
        name=name,
        kind="cuda",
        free_bytes=int(free),
        total_bytes=int(total),
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        # two transfers per clock: a 3090's 9751 MHz on 384 bits are 936e9 bytes per second, as its vendor says
        bandwidth=clock * 1e6 * 2 * width / 8 if clock and width else _listed(name),
        nvlink=ask("nvmlDeviceGetNvLinkState", 0) == 1,
        shared_bytes=int(shared),
        uuid=_text(ask("nvmlDeviceGetUUID") or ""),
    )


def _nvidia_memory(nvml: Any, handle: Any) -> Any:
    """NVML's memory record, or its error. Version 2 tells apart what the driver keeps for itself; CUDA's total is
    without that."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):  # an old driver or package has version 1 alone
        try:
            return nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            return error


def _visible(cards: list[Card], host: Host, variable: str, findings: list[str]) -> list[Card]:
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


# --- AMD ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AmdReading:
    """One AMD card's numbers, by whichever road; GTT is RAM that the card may map."""

    index: int
    name: str
    arch: str
    vram_total: int
    vram_used: int
    gtt_total: int = 0
    gtt_used: int = 0


def amd_cards(host: Host, ram_bytes: int, findings: list[str]) -> list[Card]:
    roads = (("amdsmi", _by_amdsmi), ("rocm-smi", _by_rocm_smi), ("sysfs", _by_sysfs))
    road, readings = next(((road, found) for road, ask in roads if (found := ask(host))), ("", []))
    if not readings:
        findings.append("AMD: no card (asked amdsmi, rocm-smi and /sys/class/drm)")
        return []
    cards = []
    for reading in readings:
        free = reading.vram_total - reading.vram_used
        shared, total = 0, reading.vram_total
        if reading.arch in SHARED_MEMORY_ARCHS:
            mapped = min(reading.gtt_total - reading.gtt_used, max(0, ram_bytes - SHARED_HOST_BYTES))
            if mapped > free:
                free, shared, total = mapped, mapped, reading.gtt_total
        if max(free, total) < LEAST_CARD_BYTES:
            findings.append(f"AMD card {reading.index}: {reading.name} has {format_bytes(total)}: not planned for")
            continue
        where = "of the RAM, which the card may map," if shared else "of its memory"
        findings.append(
            f"AMD card {reading.index}: {reading.name} {reading.arch}, {free} of {total} bytes {where} free ({road})"
        )
        cards.append(
            Card(
                index=reading.index,
                name=reading.name,
                kind="rocm",
                free_bytes=free,
                total_bytes=max(free, total),
                arch=reading.arch,
                bandwidth=_listed(reading.name),
                shared_bytes=shared,
            )
        )
    return _visible(cards, host, "HIP_VISIBLE_DEVICES", findings)


def _by_amdsmi(host: Host) -> list[_AmdReading]:
    try:
        smi = host.load("amdsmi")
        smi.amdsmi_init()
    except Exception:  # without the driver its import or start fails in many ways
        return []
    try:
        readings = []
        for index, handle in enumerate(smi.amdsmi_get_processor_handles()):
            asic = smi.amdsmi_get_gpu_asic_info(handle)
            kinds = smi.AmdSmiMemoryType
            numbers = [
                int(ask(handle, kind))
                for kind in (kinds.VRAM, kinds.GTT)
                for ask in (smi.amdsmi_get_gpu_memory_total, smi.amdsmi_get_gpu_memory_usage)
            ]
            arch = str(asic.get("target_graphics_version", ""))
            readings.append(
                _AmdReading(index, asic.get("market_name") or "AMD GPU", arch if arch[:3] == "gfx" else "", *numbers)
            )
        return readings
    except Exception:
        return []
    finally:
        smi.amdsmi_shut_down()


def _by_rocm_smi(host: Host) -> list[_AmdReading]:
    output = host.run(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "gtt", "--json"])
    try:
        cards = json.loads(output or "{}")
        readings = []
        for key, values in cards.items():
            if not re.fullmatch(r"card\d+", key):
                continue
            found = {name.lower(): value for name, value in values.items()}
            numbers = [
                int(found.get(f"{kind} total {what}memory (b)", 0))
                for kind in ("vram", "gtt")
                for what in ("", "used ")
            ]
            name = found.get("card series") or found.get("card model") or "AMD GPU"
            readings.append(_AmdReading(int(key[4:]), name, found.get("gfx version", ""), *numbers))
        return readings
    except (ValueError, AttributeError):
        return []


def _by_sysfs(host: Host) -> list[_AmdReading]:
    archs = {}
    for path in sorted((host.sysfs / "class/kfd/kfd/topology/nodes").glob("*/properties")):
        try:
            properties = dict(line.split(None, 1) for line in path.read_text().splitlines() if " " in line)
            version, minor = int(properties["gfx_target_version"]), int(properties["drm_render_minor"])
        except (OSError, KeyError, ValueError):
            continue
        archs[minor] = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    readings: list[_AmdReading] = []
    for folder in sorted((host.sysfs / "class/drm").glob("card*")):
        device = folder / "device"
        numbers = [
            host.number(device / f"mem_info_{kind}_{what}") for kind in ("vram", "gtt") for what in ("total", "used")
        ]
        if not re.fullmatch(r"card\d+", folder.name) or numbers[0] is None or numbers[1] is None:
            continue
        renders = [int(path.name[7:]) for path in (device / "drm").glob("renderD*")]
        try:
            name = (device / "product_name").read_text().strip()
        except OSError:
            name = ""
        arch = archs.get(renders[0], "") if renders else ""
        readings.append(_AmdReading(len(readings), name or "AMD GPU", arch, *(number or 0 for number in numbers)))
    return readings


# --- Apple ----------------------------------------------------------------------------------------------------------


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
    return [Card(0, chip, "metal", free, limit, bandwidth=_listed(chip), shared_bytes=free)], available


def _metal_limit(chip: str, memory: int, wired_limit_mib: int) -> tuple[int, str]:
    """recommendedMaxWorkingSetSize in bytes, and where it comes from."""
    if wired_limit_mib:
        return wired_limit_mib * 2**20, "sysctl iogpu.wired_limit_mb"
    for path in sorted(FOLDER.glob("*.toml")):
        data = read_toml(path)
        if chip in data.get("driver_names", ()) and data.get("marketed") == f"{memory // GIB} GB":
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


# --- RAM ------------------------------------------------------------------------------------------------------------


def _meminfo(host: Host) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        text = (host.proc / "meminfo").read_text()
    except OSError:
        return {}
    return {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.MULTILINE)}


def available_ram(host: Host, findings: list[str]) -> int:
    """RAM that a program can still get: MemAvailable, or what the container's limit leaves when that is less."""
    memory = _meminfo(host)
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
