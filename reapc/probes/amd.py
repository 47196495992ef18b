"""AMD's cards, through amdsmi, rocm-smi or sysfs: the first that answers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from reapc.probes.host import GIB, SHARED_HOST_BYTES, Card, Host, listed_bandwidth, visible
from reapc.units import format_bytes

# AMD's processors whose graphics share the RAM and are worth planning for (Phoenix, Strix Point, Strix Halo).
SHARED_MEMORY_ARCHS = ("gfx1103", "gfx1150", "gfx1151", "gfx1152")
# A display's graphics without memory of its own has less.
LEAST_CARD_BYTES = 2 * GIB


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
                bandwidth=listed_bandwidth(reading.name),
                shared_bytes=shared,
            )
        )
    return visible(cards, host, "HIP_VISIBLE_DEVICES", findings)


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
