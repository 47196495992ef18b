"""Tells the kernel which bytes of a checkpoint will be read next, so that it reads them while something computes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from reapc.checkpoint.reader import Checkpoint

# Told ahead of what is computed: enough to keep a disk busy, little enough that it stays cached until it is used.
WINDOW_BYTES = 256 << 20

Share = tuple[str, int | None]  # a tensor's name; of one with the experts on its first axis, which expert's


class Readahead:
    """Does nothing where the system has no posix_fadvise (macOS)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def ranges(self, shares: Iterable[Share]) -> Iterator[tuple[Path, int, int]]:
        """File, first byte and number of bytes of everything that the tensors lie in."""
        for name, expert in shares:
            linear = self._checkpoint.packed.get(name)
            for part in (name,) if linear is None else linear.parts.values():
                entry = self._checkpoint.entries[part]
                size = entry.bytes if expert is None else entry.bytes // entry.shape[0]
                yield self._checkpoint.shard_of[part], entry.start + (expert or 0) * size, size

    def bytes_of(self, shares: Iterable[Share]) -> int:
        """How many bytes that is on disk."""
        return sum(size for _, _, size in self.ranges(shares))

    def ask(self, shares: Iterable[Share]) -> None:
        """Has the kernel begin to read them; returns at once."""
        if not hasattr(os, "posix_fadvise") or not self._checkpoint.in_files:
            return
        by_file: dict[Path, list[tuple[int, int]]] = {}
        for path, start, size in self.ranges(shares):
            by_file.setdefault(path, []).append((start, size))
        for path, parts in by_file.items():
            with path.open("rb") as file:
                for start, size in parts:
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
