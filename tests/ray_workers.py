"""What tests of distributed observation use: a progress that remembers, a killer of workers, a stand-in for Slurm."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from reapc.observe.distributed_worker import WORKERS

SBATCH = """#!{python}
# Stands in for Slurm: runs an array's tasks at a time, and a job only when the one that it depends on went well.
import os, pathlib, subprocess, sys
*options, script = sys.argv[1:]
given = dict(option.partition("=")[::2] for option in options)
assert set(given) <= {{"--parsable", "--array", "--dependency", "--kill-on-invalid-dep"}}, given
if "--dependency" in given and pathlib.Path(given["--dependency"].removeprefix("afterok:")).read_text() != "0":
    sys.exit("DependencyNeverSatisfied")
if "--array" in given:
    first, _, last = given["--array"].partition("-")
    tasks = [{{"SLURM_ARRAY_TASK_ID": str(i)}} for i in range(int(first), int(last) + 1)]
else:
    tasks = [{{}}]
running = [subprocess.Popen(["bash", script], env={{**os.environ, **task}}, stdout=sys.stderr) for task in tasks]
pathlib.Path("77").write_text(str(max(job.wait() for job in running)))
print("77;cluster" if "--parsable" in given else "Submitted batch job 77")
"""


class Recorder:
    """A progress that keeps what it is told, and calls ``at`` with every remark."""

    def __init__(self, at: Callable[[str], None] = lambda line: None) -> None:
        self.lines: list[str] = []
        self.totals: list[float] = []
        self.done = 0.0
        self._at = at

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        self.totals.append(total)

        def advance(amount: float) -> None:
            assert amount > 0
            self.done += amount

        yield advance

    def log(self, line: str) -> None:
        self.lines.append(line)
        self._at(line)

    def said(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


class Killer(threading.Thread):
    """Ends the worker that computes ``shard`` once it has stored a layer; stopped first, so that there it stays."""

    def __init__(self, work: Path, shard: str) -> None:
        super().__init__(daemon=True)
        self.folder = work / WORKERS / socket.gethostname() / shard
        self.deadline = time.monotonic() + 120
        self.layers: list[str] = []

    def run(self) -> None:
        process = self._worker()
        while not (self.folder / "layer-0.safetensors").exists() and time.monotonic() < self.deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        self.layers = sorted(path.name for path in self.folder.glob("layer-*.safetensors"))
        process.send_signal(signal.SIGKILL)

    def _worker(self) -> psutil.Process:
        """The process that has the shard's hidden states mapped."""
        while time.monotonic() < self.deadline:
            for process in psutil.process_iter(["name"]):
                with contextlib.suppress(OSError):
                    task = (process.info["name"] or "").startswith("ray::observe_sh")
                    if task and str(self.folder) in Path(f"/proc/{process.pid}/maps").read_text():
                        return process
            time.sleep(0.01)
        raise AssertionError(f"no worker in {self.folder}")
