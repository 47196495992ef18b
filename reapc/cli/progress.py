"""Progress on a terminal (bars with rate and time left) or in a log (plain lines)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reapc.progress import Advance
from reapc.progress import Progress as ProgressProtocol
from reapc.units import format_bytes, format_seconds


def _amount(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "B" else f"{value:,.0f} {unit}"


class Bars:
    """rich progress bars."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as bars:
            task = bars.add_task(name, total=total or 1, rate="")
            start = time.monotonic()

            def advance(amount: float) -> None:
                bars.advance(task, amount)
                done = bars.tasks[0].completed
                bars.update(task, rate=f"{_amount(done / max(time.monotonic() - start, 1e-6), unit)}/s")

            yield advance

    def log(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


class Lines:
    """Plain lines: when a task starts, every ten seconds, and when it ends."""

    def __init__(self, interval_seconds: float = 10.0) -> None:
        self.interval = interval_seconds

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0.0
        self.log(f"{name}: {_amount(total, unit)} to do")

        def advance(amount: float) -> None:
            nonlocal done, last
            done += amount
            now = time.monotonic()
            if now - last >= self.interval and done:
                last = now
                rate = done / (now - start)
                left = format_seconds((total - done) / rate)
                self.log(f"{name}: {100 * done / total:.0f} %, {_amount(rate, unit)}/s, {left} left")

        yield advance
        seconds = time.monotonic() - start
        self.log(f"{name}: done in {format_seconds(seconds)} ({_amount(done / max(seconds, 1e-6), unit)}/s)")

    def log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def make_progress() -> ProgressProtocol:
    """Bars when standard error is a terminal, else lines; standard output stays for results."""
    console = Console(stderr=True)
    return Bars(console) if console.is_terminal else Lines()
