"""A shard of a distributed observation as a worker computes it, and what it tells the driver. Imports Ray late."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reapc import __version__
from reapc.checkpoint.atomic import locked, remove
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.source import fetch
from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Advance

if TYPE_CHECKING:
    from reapc.stream.tokens import Tokens

RETRIES = 3  # of a shard whose worker died; what a worker reports as an error is not tried again
TELL_SECONDS = 1.0
WORKERS = "reapc-workers"  # below the work folder, on every node


@dataclass(frozen=True)
class Job:
    """What every worker is told. ``folder``: the checkpoint, on every node; None: ``model`` is a hub id, which each
    node fetches. ``threads`` of torch are the CPUs that Ray gives to a task, of which ``together`` run on a node, each
    with a bound of ``memory_bytes`` or none (see ``Memory``)."""

    model: str
    revision: str | None
    folder: Path | None
    digest: str
    work: Path
    shards: int
    device: str
    dtype: str
    threads: int
    together: int
    memory_bytes: int | None
    version: str = __version__

    def name(self, shard: int) -> str:
        return f"shard-{shard}-of-{self.shards}"

    def finished(self, shard: int) -> Path:
        """The scores of a shard that is done, on the driver's machine."""
        return self.work / f"{self.name(shard)}.safetensors"


class Board:
    """An actor, to which workers tell what they do and the driver listens."""

    def __init__(self) -> None:
        self.starts: dict[int, int] = {}
        self.left: dict[int, float] = {}
        self.said: list[str] = []

    def start(self, shard: int, name: str, where: str) -> int:
        """How many times a shard was begun, this one counted."""
        number = self.starts[shard] = self.starts.get(shard, 0) + 1
        if number > 1:
            self.said.append(f"{name}: its worker died; begun again on {where} ({number} of {RETRIES + 1} times)")
        return number

    def tell(self, shard: int, left: float) -> None:
        """What is left of a shard, in tokens x layers."""
        self.left[shard] = left

    def say(self, line: str) -> None:
        self.said.append(line)

    def read(self) -> tuple[dict[int, float], list[str]]:
        """What is left, by shard, and the remarks since the last time."""
        said, self.said = self.said, []
        return self.left, said


class _Told:
    """The progress of a pass on a worker, told to the board once in a while. A board that is gone ends the worker: the
    driver has given up. (``ray.cancel`` would end it too, but at the end of a task Ray 2.60 aborts the driver then.)"""

    def __init__(self, board: Any, shard: int, name: str) -> None:
        self._board, self._shard, self._name = board, shard, name

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        import ray

        left, last = total, -TELL_SECONDS

        def advance(amount: float) -> None:
            nonlocal left, last
            left -= amount
            if time.monotonic() - last >= TELL_SECONDS:
                last = time.monotonic()
                ray.get(self._board.tell.remote(self._shard, left))

        yield advance

    def log(self, line: str) -> None:
        self._board.say.remote(f"{self._name}: {line}")


def observe_shard(job: Job, tokens: Tokens, shard: int, board: Any) -> np.ndarray:
    """The bytes of a shard's scores file, uint8. Runs on a worker."""
    import ray

    host = socket.gethostname()
    if ray.get(board.start.remote(shard, f"shard {shard}/{job.shards}", host)) > RETRIES + 1:
        # Ray retries without end where its own memory monitor ended the worker
        raise died(job, shard)
    checkpoint = _checkpoint_of(job, host)
    import torch

    from reapc.observe.observe import observe
    from reapc.stream.devices import compute_settings
    from reapc.stream.memory import Memory

    torch.set_num_threads(job.threads)
    device, dtype = compute_settings(job.device, job.dtype, checkpoint.spec.dtype)
    folder = job.work / WORKERS / host
    out = folder / f"{job.name(shard)}.safetensors"
    told = _Told(board, shard, f"shard {shard}/{job.shards}")
    # A worker that Ray has given up may not have ended yet.
    with locked(_lock(job, shard)), Memory(job.memory_bytes, job.together) as memory:
        observe(
            checkpoint, tokens, folder / job.name(shard), told, device=device, dtype=dtype, memory=memory,
            model_name=job.model, revision=job.revision, shard=(shard, job.shards), out=out,
        )  # fmt: skip
        if memory.exceeded:
            told.log(f"more than --memory was used: {memory.describe()}")
        content = np.asarray(np.memmap(out, np.uint8, "r"))
        remove(out)  # the mapping stays until Ray has copied it
    return content


def _checkpoint_of(job: Job, host: str) -> Checkpoint:
    """The checkpoint that a worker reads; ReapcError where it is not the driver's."""
    if job.version != __version__:
        raise ReapcError(
            f"{host} has reapc {__version__}, the driver {job.version}", hint="install the same version on every node"
        )
    folder = job.folder or fetch(job.model, job.revision, Path("/"))
    if not folder.is_dir():
        raise ReapcError(
            f"{folder}: no such folder on {host}",
            hint="every node reads the model: a folder of a shared file system, a copy at the same path, or a hub id",
        )
    checkpoint = Checkpoint(folder)
    if checkpoint.digest != job.digest:
        raise ReapcError(
            f"{folder} on {host} is another checkpoint than on the driver: digest {checkpoint.digest[:12]}, "
            f"{job.digest[:12]} expected",
            hint="copy the model to this node again",
        )
    return checkpoint


def _lock(job: Job, shard: int) -> Path:
    """On the machine's own disk: a shared one may know no locks."""
    return Path(tempfile.gettempdir()) / f"reapc-{os.getuid()}-{job.digest[:12]}-{job.name(shard)}.lock"


def died(job: Job, shard: int) -> CannotBeDone:
    """What is said of a shard that Ray has given up."""
    return CannotBeDone(
        f"shard {shard}/{job.shards}: its worker died {RETRIES + 1} times",
        hint="most often a machine had no memory left: Ray's logs (/tmp/ray) and `dmesg` say so; shards that are done "
        f"stay in {job.work}, and the same command goes on from there",
    )


def remove_states(job: Job) -> None:
    """Removes what the workers of a job that is done have left on a node."""
    remove(job.work / WORKERS)
    with contextlib.suppress(OSError):
        job.work.rmdir()  # where it is not the driver's
    for shard in range(1, job.shards + 1):
        remove(_lock(job, shard))
