"""Memory of this process: what it holds, the most that it held, and what it may hold. All in bytes.

A bound is about anonymous memory: what no file stands behind, so that only swap could take it. Weights that are mapped
from a checkpoint and hidden states in their files are the page cache's; the system drops them when it needs the room.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from pathlib import Path
from types import TracebackType

from reapc.probes.host import Host, available_ram
from reapc.units import format_bytes

_STATUS = Path("/proc/self/status")
_FIELDS = re.compile(rb"^(?:RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)
_INTERVAL_SECONDS = 0.005
# Beside what is counted: pages of freed memory that the C library keeps, scratch inside operators, Python's objects.
SPARE_BYTES = 64 << 20
SPARE_SHARE = 0.03
# Without a bound: this share of the RAM that is free at the start. The rest is left to the page cache, where the
# checkpoint's bytes stand that every batch reads again.
OWN_SHARE = 0.5


def anonymous_bytes() -> int:
    """Anonymous memory of this process now, swapped out pages included (Linux). Elsewhere the most that was resident
    since its start, mapped files included: an upper bound."""
    try:
        return 1024 * sum(int(kib) for kib in _FIELDS.findall(_STATUS.read_bytes()))
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def available_bytes() -> int:
    """RAM that this process can still get, a container's limit counted; 0 where nothing says."""
    return available_ram(Host(), [])


_M_MMAP_THRESHOLD = -3  # malloc.h
_MMAP_BYTES = 1 << 20


def return_freed(*, always: bool) -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc); ``always``: from now on at once.

    By itself glibc keeps freed blocks of up to 32 MiB for the next ones, which differ in size here: a quarter more
    was seen, and three times as much once. Blocks that are mapped each by themselves cost page faults instead."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if always and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Memory:
    """The bound that a pass has (``bound_bytes``; None: a share of the RAM that is free, divided among the ``sharers``
    that compute on this machine), and what became of it.

    Used as a context it samples this process's memory: ``peak_bytes`` is the most that was seen. ``predicted_bytes``
    is set by the plan of the pass (budget.py), before the first layer is computed.
    """

    def __init__(self, bound_bytes: int | None = None, sharers: int = 1) -> None:
        self.bound_bytes = bound_bytes
        self._sharers = sharers
        self.predicted_bytes: int | None = None
        self._peak = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_bytes(self) -> int:
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak

    def limit_bytes(self, base: int | None = None) -> int | None:
        """The bound, or without one ``base`` (what is held now) and a sharer's part of half of the RAM that is free;
        None where nothing says how much that is."""
        if self.bound_bytes is not None:
            return self.bound_bytes
        available = available_bytes()
        base = anonymous_bytes() if base is None else base
        return int(base + OWN_SHARE * available / self._sharers) if available else None

    def room_bytes(self) -> int | None:
        """What can still be taken, a part left for what nobody counts."""
        limit = self.limit_bytes()
        return None if limit is None else max(0, int(limit / (1 + SPARE_SHARE)) - SPARE_BYTES - anonymous_bytes())

    @property
    def exceeded(self) -> bool:
        """Whether more was held than the bound that was given."""
        return self.bound_bytes is not None and self.peak_bytes > self.bound_bytes

    def to_json(self) -> dict[str, int | str | None]:
        """The figures, and what was measured."""
        return {
            "bound_bytes": self.bound_bytes,
            "predicted_bytes": self.predicted_bytes,
            "peak_bytes": self.peak_bytes,
            "measured": "anonymous" if _STATUS.exists() else "resident",
        }

    def describe(self) -> str:
        """The same in a line."""
        what = "anonymous memory" if _STATUS.exists() else "resident memory"
        predicted = "" if self.predicted_bytes is None else f", {format_bytes(self.predicted_bytes)} predicted"
        bound = "" if self.bound_bytes is None else f", {format_bytes(self.bound_bytes)} allowed"
        return f"peak of {what}: {format_bytes(self.peak_bytes)}{predicted}{bound}"

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._sample, name="reapc-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        assert self._thread is not None
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self._peak = max(self._peak, anonymous_bytes())
