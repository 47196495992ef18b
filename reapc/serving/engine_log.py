"""What an engine's log says of its memory.

llama.cpp prints a line per buffer and device (from verbosity 4 on); vLLM one per worker for weights, KV cache and CUDA
graphs. Lines were read off llama.cpp 0c1e57098 and vLLM 0.32/0.33.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MIB, GIB = 2**20, 2**30
_BUFFER = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_PART = {
    "model": "weights_bytes", "KV": "kv_bytes", "RS": "state_bytes", "compute": "workspace_bytes",
    "output": "workspace_bytes",
}  # fmt: skip
_WORKER = re.compile(r"Worker(?:_\w*?TP|_TP)?(\d+)")
_VLLM = {
    "weights_bytes": re.compile(r"Model loading took ([\d.]+) GiB"),
    "available_kv_bytes": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "graph_bytes": re.compile(r"Graph capturing finished in [\d.]+ secs?, took ([\d.]+) GiB"),
}
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_RAM_BUFFERS = ("CPU", "BLAS", "AMX", "KleidiAI")


@dataclass
class EngineMemory:
    """Bytes by device, as the engine's log says: ``RAM``, or the number of a card as text. vLLM's log has no device
    names: its workers are numbered. ``kv_tokens`` is the capacity that vLLM made of what was left."""

    devices: dict[str, dict[str, int]] = field(default_factory=dict)
    kv_tokens: int | None = None

    def add(self, device: str, part: str, amount: int) -> None:
        parts = self.devices.setdefault(device, {})
        parts[part] = parts.get(part, 0) + amount

    def to_json(self) -> dict[str, Any]:
        return {"devices": self.devices, "kv_tokens": self.kv_tokens}


def _device(buffer: str) -> str:
    """``RAM`` for host buffers (CUDA_Host is pinned RAM), else the card's number."""
    if buffer.startswith(_RAM_BUFFERS) or buffer.endswith("_Host"):
        return "RAM"
    number = re.search(r"(\d+)$", buffer)
    return number.group(1) if number else buffer


def read_llama_log(lines: Iterable[str]) -> EngineMemory:
    """Sums of all buffers by device."""
    found = EngineMemory()
    for line in lines:
        if match := _BUFFER.search(line):
            buffer, part, size = match.groups()
            found.add(_device(buffer), _PART[part], round(float(size) * MIB))
    return found


def read_vllm_log(lines: Iterable[str]) -> EngineMemory:
    """The figures of every worker, numbered as vLLM numbers them (0 where there is one)."""
    found = EngineMemory()
    for line in lines:
        worker = _WORKER.search(line)
        device = worker.group(1) if worker else "0"
        for part, pattern in _VLLM.items():
            if match := pattern.search(line):
                found.devices.setdefault(device, {})[part] = round(float(match.group(1)) * GIB)
        if match := _KV_TOKENS.search(line):
            found.kv_tokens = int(match.group(1).replace(",", ""))
    return found
