"""How a pass tells that it moves: a task with a total, advanced as work is done. The cli shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]


class Progress(Protocol):
    """Receives tasks and remarks of a pass."""

    def task(self, name: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """A context that yields the function to call with each amount done."""

    def log(self, line: str) -> None:
        """Shows one remark."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        yield lambda amount: None

    def log(self, line: str) -> None:
        """Drops the remark."""
