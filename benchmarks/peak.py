"""Anonymous memory of this process, for benchmarks. The standard library alone: it also runs in other environments."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: "RssAnon" (anonymous memory now), "VmHWM" (peak with mapped files)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise SystemExit(f"this benchmark reads {field} from /proc (Linux)")


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of anonymous memory above the baseline while ``work()`` runs, sampled every 5 ms."""
    base = peak = status_bytes("RssAnon")
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, status_bytes("RssAnon"))
            time.sleep(0.005)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    work()
    done.set()
    thread.join()
    return peak - base
