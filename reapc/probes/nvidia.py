"""NVIDIA's cards, through nvidia-ml-py."""

from __future__ import annotations

from typing import Any

from reapc.probes.host import SHARED_HOST_BYTES, Card, Host, listed_bandwidth, meminfo, visible
from reapc.units import format_bytes


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
    cards = visible(cards, host, "CUDA_VISIBLE_DEVICES", findings)
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
        total = max(free, meminfo(host).get("MemTotal", 0))
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
        bandwidth=clock * 1e6 * 2 * width / 8 if clock and width else listed_bandwidth(name),
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
