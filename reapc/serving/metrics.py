"""Tokens per second of a running engine, from the Prometheus counters of vLLM and llama-server."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{[^}]*\})?\s+([-+.\deEinfNa]+)$", re.MULTILINE)
_NAMES = {
    "made": ("vllm:generation_tokens_total", "vllm:generation_tokens", "llamacpp:tokens_predicted_total"),
    "read": ("vllm:prompt_tokens_total", "vllm:prompt_tokens", "llamacpp:prompt_tokens_total"),
    "running": ("vllm:num_requests_running", "llamacpp:requests_processing"),
    "waiting": ("vllm:num_requests_waiting", "llamacpp:requests_deferred"),
}


@dataclass(frozen=True)
class Counters:
    """Tokens made and read since the start, and requests now; summed over vLLM's engines."""

    made: float = 0.0
    read: float = 0.0
    running: float = 0.0
    waiting: float = 0.0


def read_metrics(text: str) -> Counters:
    """Counters in a /metrics page; zero where it has none of that name."""
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        try:
            sums[name] = sums.get(name, 0.0) + float(value)
        except ValueError:
            continue
    found = {key: next((sums[name] for name in names if name in sums), 0.0) for key, names in _NAMES.items()}
    return Counters(**found)
