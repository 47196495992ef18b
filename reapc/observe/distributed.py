"""An observation on a Ray cluster: one task for each shard, Ray's retries, and the sum of what the shards found.

A task does what ``reapc observe --shard K/N`` does, on a node that reads the same checkpoint. The tokens travel to the
workers and the scores back through Ray's object store, so that the work folder need not be shared: on every node it
holds the hidden states of that node's own shards, and on the driver's the shards that are done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.checkpoint.atomic import atomic_path, claim_folder, remove
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.distributed_worker import (
    RETRIES,
    TELL_SECONDS,
    WORKERS,
    Board,
    Job,
    died,
    observe_shard,
    remove_states,
)
from reapc.progress import Progress

if TYPE_CHECKING:
    from reapc.observe.scores import Scores
    from reapc.stream.tokens import Tokens

_OWN_FILE = re.compile(rf"^(identity|shard-\d+-of-\d+\.safetensors)(\.partial)?$|^{WORKERS}$")
_ADDRESS = re.compile(r"^(?:ray://)?\[?(?P<host>[^\[\]/\s]+)\]?:(?P<port>\d{1,5})/?$")
_ANSWER_SECONDS = 10.0
_IDLE_SECONDS = 30.0


@dataclass(frozen=True)
class Shares:
    """How a cluster is divided: ``tasks`` run at a time, of them at most ``together`` on one node, each with ``cpus``
    CPUs, and with a GPU on ``cuda``."""

    device: str
    cpus: float
    tasks: int
    together: int


def shares_of(nodes: list[dict[str, float]], device: str = "auto") -> Shares:
    """One task for a GPU, with its share of its node's CPUs; on CPUs, one task for a node (more on nodes that have
    several times the CPUs of the smallest). ``nodes``: Ray's resources of each. CannotBeDone where nothing fits."""
    if device not in ("auto", "cpu", "cuda"):
        raise ReapcError(f"--device {device}: with --ray, auto, cpu or cuda", hint="Ray gives each task its own GPU")
    if device == "auto":
        device = "cuda" if any(node.get("GPU", 0) >= 1 for node in nodes) else "cpu"
    what = "GPU" if device == "cuda" else "CPU"
    fit = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes if node.get(what, 0) >= 1]
    if not fit:
        raise CannotBeDone(
            f"--device {device}: no node of the Ray cluster has a {what}", hint="`ray status` lists what it has"
        )
    if device == "cpu":
        cpus = min(cpu for cpu, _ in fit)
        tasks = [int(cpu // cpus) for cpu, _ in fit]
    else:
        cpus = min(cpu / gpu for cpu, gpu in fit)
        cpus = float(int(cpus)) if cpus >= 1 else cpus  # Ray takes parts of a CPU only below one
        tasks = [int(gpu) for _, gpu in fit]
    return Shares(device, cpus, sum(tasks), max(tasks))


def observe_on_ray(
    address: str,
    checkpoint: Checkpoint,
    calibration: Tokens,
    work: Path,
    progress: Progress,
    *,
    out: Path,
    model_name: str,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory_bytes: int | None = None,
    shards: int | None = None,
) -> Scores:
    """``observe`` over ``shards`` tasks of the Ray cluster at ``address``: "local" starts one on this machine, "auto"
    takes the one that runs here, HOST:PORT joins one that this machine is a node of, ray://HOST:PORT reaches any.

    By default as many shards as tasks run at a time (``shares_of``): each reads the whole model. ``work`` is the same
    path on every node. Shards that are done stay there when a run is interrupted. ``memory_bytes``: the bound of each
    worker. Raises what ``observe`` raises;
    CannotBeDone where ray is not installed or a shard's workers died ``RETRIES`` + 1 times; ReapcError for an address
    that does not answer."""
    from reapc.observe.combine import merge
    from reapc.observe.scores import load_scores
    from reapc.stream import run

    batches = sum(1 for _ in calibration.batches(run.TOKENS_PER_BATCH))
    if shards is not None:
        calibration.shard(1, shards, run.TOKENS_PER_BATCH)  # refuses too many before anything is started
    work = work.resolve()
    hub = not Path(model_name).expanduser().is_dir()
    with connected(address) as ray:
        shares = shares_of([node["Resources"] for node in ray.nodes() if node["Alive"]], device)
        same = {"digest": checkpoint.digest, "tokens": calibration.digest, "device": shares.device, "dtype": dtype}
        count = shards or _shards_before(work, same) or min(shares.tasks, batches)
        claim_folder(work, json.dumps({**same, "shards": count}), _OWN_FILE)
        job = Job(
            model=model_name,
            # a snapshot's folder is named by its commit: every node fetches that one
            revision=checkpoint.folder.name if hub else revision,
            folder=None if hub else checkpoint.folder.resolve(),
            digest=checkpoint.digest,
            work=work,
            shards=count,
            device=shares.device,
            dtype=dtype,
            threads=max(1, int(shares.cpus)),
            together=min(shares.together, count),
            memory_bytes=memory_bytes,
        )
        _Driver(ray, job, shares, calibration, checkpoint.spec.num_layers, progress).run()
        files = [job.finished(shard) for shard in range(1, count + 1)]
        merged = merge([load_scores(file) for file in files], [str(file) for file in files])
        merged.header.update(revision=revision)
        merged.save(out)
        _tidy(ray, job)
    scores = load_scores(out)
    for layer, experts in scores.never_routed().items():
        progress.log(f"observe: layer {layer}: {len(experts)} experts were never routed to: {experts}")
    remove(work)
    return scores


def _shards_before(work: Path, same: dict[str, str]) -> int | None:
    """Into how many shards an interrupted run of the same observation was cut: a cluster may have grown since."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = json.loads((work / "identity").read_text())
        if same.items() <= before.items():
            return int(before["shards"])
    return None


def require_ray(address: str) -> Any:
    """The module ``ray``. CannotBeDone where it is not installed, ReapcError where nothing answers at ``address``."""
    try:
        import ray
    except ImportError as error:
        raise CannotBeDone(
            f"--ray {address}: the package ray is not installed here",
            hint="pip install -c constraints.txt 'reapc[ray]'",
        ) from error
    if address != "local" and not ray.is_initialized():
        _require_answer(address, (os.environ.get("RAY_ADDRESS") or _recorded()) if address == "auto" else address)
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ``ray``, connected to ``address``; a connection that this process has already is used, and kept."""
    ray = require_ray(address)
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # without a token Ray would write one for later clusters too
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        own = {"include_dashboard": False}
    # Ray tells of workers that died on standard output, which is kept for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
            raise ReapcError(
                f"--ray {address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                hint="the cluster needs this environment's versions of Python and Ray; one with token authentication "
                "wants RAY_AUTH_MODE=token and its token here; `ray start --head` starts one and says its address, "
                "--ray local one of this machine alone",
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _recorded() -> str | None:
    """The address that the last `ray start` has left on this machine; None where there is none."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return str(canonicalize_bootstrap_address("auto") or "") or None
    except (ImportError, ConnectionError, ValueError):
        return None


def _require_answer(given: str, address: str | None) -> None:
    """ReapcError where nothing listens at ``address``: Ray itself would wait for minutes, and end the process."""
    if address is None:
        return
    found = _ADDRESS.match(address)
    if not found or int(found["port"]) > 65535:
        raise ReapcError(f"--ray {address!r}: local, auto, HOST:PORT or ray://HOST:PORT is expected")
    try:
        socket.create_connection((found["host"], int(found["port"])), _ANSWER_SECONDS).close()
    except OSError as error:
        raise ReapcError(
            f"--ray {given}: nothing answers at {address}: {error.strerror or error}",
            hint="`ray status` on the head node says whether Ray runs; its port is 6379 where `ray start` was not told "
            "another, and 10001 for ray://",
        ) from error


class _Driver:
    """Runs the tasks of a job and keeps the scores of those that are done."""

    def __init__(self, ray: Any, job: Job, shares: Shares, tokens: Tokens, layers: int, progress: Progress) -> None:
        self._ray, self._job, self._shares, self._tokens, self._progress = ray, job, shares, tokens, progress
        self._sizes = {shard: layers * _computed(tokens, shard, job.shards) for shard in range(1, job.shards + 1)}

    def run(self) -> None:
        job, ray = self._job, self._ray
        missing = [shard for shard in self._sizes if not job.finished(shard).is_file()]
        if done := job.shards - len(missing):
            self._progress.log(f"observe: {done} of {job.shards} shards were done before; going on")
        if not missing:
            return
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
        task = ray.remote(num_cpus=self._shares.cpus, num_gpus=int(self._shares.device == "cuda"), max_retries=RETRIES)(
            observe_shard
        )
        tokens = ray.put(self._tokens)
        pending = {task.remote(job, tokens, shard, board): shard for shard in missing}
        try:
            self._collect(pending, board)
        finally:
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                ray.kill(board)  # ends the tasks that still run

    def _collect(self, pending: dict[Any, int], board: Any) -> None:
        """Waits for all, and takes each off ``pending`` when its scores are stored."""
        self._wait_for_a_worker(pending, board)
        total, finished, shown = sum(self._sizes[shard] for shard in pending.values()), 0.0, 0.0
        with self._progress.task(f"observe in {self._job.shards} shards", total, "tokens x layers") as advance:
            while pending:
                ready, _ = self._ray.wait(list(pending), timeout=TELL_SECONDS)
                for ref in ready:
                    self._store(ref, pending[ref])
                    finished += self._sizes[pending.pop(ref)]
                    done = self._job.shards - len(pending)
                    self._progress.log(f"observe: {done} of {self._job.shards} shards done")
                left = self._listen(board)
                now = finished + sum(self._sizes[i] - left[i] for i in pending.values() if i in left)
                if now > shown:  # a shard that was begun again is shown when it is past what it had
                    advance(now - shown)
                    shown = now

    def _wait_for_a_worker(self, pending: dict[Any, int], board: Any) -> None:
        """Until then there is no rate to show."""
        begun, said = time.monotonic(), False
        while not self._listen(board) and not self._ray.wait(list(pending), timeout=TELL_SECONDS)[0]:
            if not said and time.monotonic() - begun > _IDLE_SECONDS:
                said = True
                self._progress.log("observe: no worker has begun yet: the cluster is busy, or its workers are starting")

    def _listen(self, board: Any) -> dict[int, float]:
        """What is left of the shards that were begun; passes on the workers' remarks."""
        errors = self._ray.exceptions
        left: dict[int, float] = {}
        with contextlib.suppress(errors.RayActorError, errors.GetTimeoutError):
            left, said = self._ray.get(board.read.remote(), timeout=_IDLE_SECONDS)
            for line in said:
                self._progress.log(line)
        return left

    def _store(self, ref: Any, shard: int) -> None:
        """Writes the scores of a task that has ended, or raises what ended it."""
        errors = self._ray.exceptions
        try:
            content = self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ReapcError | OSError):
                raise error.cause from None
            raise
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as e:
            raise died(self._job, shard) from e
        except errors.RayError as error:
            raise CannotBeDone(
                f"shard {shard}/{self._job.shards}: {type(error).__name__}: {str(error).splitlines()[0]}",
                hint=f"shards that are done stay in {self._job.work}, and the same command goes on from there",
            ) from error
        with atomic_path(self._job.finished(shard)) as partial, partial.open("wb") as file:
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())


def _computed(tokens: Tokens, shard: int, shards: int) -> int:
    """Tokens that are computed for a shard, padding included."""
    from reapc.stream import run

    rows = tokens.shard(shard, shards, run.TOKENS_PER_BATCH)
    batches = tokens.batches(run.TOKENS_PER_BATCH)
    return sum(batch.tokens for batch in batches if rows.start <= batch.rows.start < rows.stop)


def _tidy(ray: Any, job: Job) -> None:
    """Removes what workers have left, on the other nodes as far as they answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remove_states(job)
    here = ray.get_runtime_context().get_node_id()
    task = ray.remote(num_cpus=0, max_retries=0)(remove_states)
    others = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(job)
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    ]
    if others:
        ray.wait(others, num_returns=len(others), timeout=_IDLE_SECONDS)
