"""A build's server from start to stop: waits, warms it up, records what it takes, watches it."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError, safe_open

from reapc.errors import CannotBeDone, ReapcError
from reapc.serving import records
from reapc.serving.built import HELD_OUT, Built
from reapc.serving.client import Client
from reapc.serving.engine_log import EngineMemory, read_llama_log, read_vllm_log
from reapc.serving.memory import Cards, CardUse, RamUse, ram_use
from reapc.serving.metrics import Counters, read_metrics
from reapc.serving.process import Server, require_free
from reapc.serving.records import Record

WARM_UP_TOKENS = 16
WARM_UP_BATCH = 512
WARM_UP_SECONDS = 1800.0
_GROWN = 1.01  # a second record is written when the engine took this many times the first


@dataclass(frozen=True)
class Sample:
    """One look at a running server: tokens per second since the look before (None: no counters), requests now, and
    bytes of RAM and of every card."""

    made_per_second: float | None
    read_per_second: float | None
    running: int
    ram: RamUse | None
    cards: list[CardUse]


class Stopped(Exception):
    """SIGINT, SIGTERM or SIGHUP came."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turns the signals that end a program into Stopped, in the main thread, while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for name in names:  # the way down must not be interrupted by a second one
            signal.signal(name, signal.SIG_IGN)
        raise Stopped

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def default_log(built: Built) -> Path:
    """A new log file in the state folder."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in built.folder.resolve().name) or "build"
    return records.state_folder() / "logs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"


def environment_for(built: Built, host: str, port: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The script's environment: the address, and llama-server's counters and lines about memory unless the user has
    set those."""
    extra = {"LLAMA_ARG_ENDPOINT_METRICS": "1", "LLAMA_ARG_LOG_VERBOSITY": "4"} if built.engine == "llama.cpp" else {}
    return {**extra, **given, "HOST": host, "PORT": str(port)}


class Serving:
    """A started build. Use as a context; leaving it stops the server."""

    def __init__(self, built: Built, host: str, port: int, log: Path, arguments: Sequence[str] = ()) -> None:
        self.built, self.log, self.run = built, log, uuid.uuid4().hex
        if not os.access(built.need("serve.sh"), os.R_OK):
            raise CannotBeDone(f"{built.script}: cannot be read")
        require_free(host, port)
        self.cards = Cards()
        shown = "127.0.0.1" if host in ("0.0.0.0", "") else host
        self.url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
        environment = environment_for(built, host, port)
        self.server = Server(["bash", str(built.script.resolve()), *arguments], environment, log)
        self.client = Client(self.url, built.key_variable, wait=WARM_UP_SECONDS)
        self._before: tuple[float, Counters] | None = None
        self._recorded = 0

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.stop()

    def wait(self, timeout_seconds: float, tell: Callable[[float, str], None]) -> float:
        """Seconds until it answers; then one completion, so that memory that is made on demand is there too."""
        seconds = self.server.wait_ready(self.url, timeout_seconds, tell)
        try:
            self.client.connect()
            self.client.stream(self._warm_up(), WARM_UP_TOKENS)
        except CannotBeDone as error:
            raise self.server.died() or error from error
        return seconds

    def _warm_up(self) -> Sequence[int] | str:
        """As much held-out text as one batch takes, for untouched buffers are not in RAM yet; else a few words."""
        try:
            with safe_open(self.built.need(HELD_OUT), framework="np") as file:  # read_tokens would load torch
                ids = file.get_tensor("input_ids").reshape(-1)
        except (ReapcError, SafetensorError, OSError):
            return "The quick brown fox"
        room = (self.client.info.context or self.built.plan.chosen.context) - WARM_UP_TOKENS - 1
        return [int(i) for i in ids[: max(1, min(room, WARM_UP_BATCH))]]

    def memory_log(self) -> EngineMemory:
        """What the engine's log says so far."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return EngineMemory()
        return read_vllm_log(lines) if self.built.engine == "vllm" else read_llama_log(lines)

    def record(self) -> Record:
        """What it takes now, beside what was predicted."""
        pids = self.server.pids
        version = self.client.info.version or ""
        return records.make_record(
            self.run, self.built, version, ram_use(pids), self.cards.use(pids), self.memory_log()
        )

    def keep(self, record: Record) -> Path | None:
        """Appends the record when it is the first, or larger than the last one kept."""
        total = sum(device.total_bytes or 0 for device in record.devices)
        if self._recorded and total <= self._recorded * _GROWN:
            return None
        self._recorded = max(total, 1)
        return records.append(record)

    def sample(self) -> Sample:
        """One look; CannotBeDone with its last words when the server has died."""
        if (error := self.server.died()) is not None:
            raise error
        now, text = time.monotonic(), self.client.metrics()
        made = read = None
        counters = read_metrics(text) if text else Counters()
        if text:
            if self._before:
                passed = max(now - self._before[0], 1e-6)
                made = max(0.0, counters.made - self._before[1].made) / passed
                read = max(0.0, counters.read - self._before[1].read) / passed
            self._before = (now, counters)
        pids = self.server.pids
        return Sample(made, read, int(counters.running), ram_use(pids), self.cards.use(pids))

    def watch(self, interval_seconds: float, show: Callable[[Sample], None]) -> None:
        """Looks again and again, until the server dies (CannotBeDone) or something else ends it (Stopped)."""
        largest = 0
        while True:
            sample = self.sample()
            show(sample)
            total = (sample.ram.total_bytes if sample.ram else 0) + sum(card.used_bytes for card in sample.cards)
            if total > largest * _GROWN:
                largest = total
                self.keep(self.record())
            time.sleep(interval_seconds)
