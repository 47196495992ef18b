"""A server as a child process: started in a session of its own, waited for, and stopped with all that it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2

from reapc.errors import CannotBeDone
from reapc.serving.memory import process_tree

GRACE_SECONDS = 20.0
LAST_LINES = 20
_KILL_SECONDS = 10.0  # a process in the kernel's hands (a driver, a disk) takes a while even so


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log that hold something; a log of any length is read from its end."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return list(deque((line.rstrip() for line in text.splitlines() if line.strip()), maxlen=count))


def require_free(host: str, port: int) -> None:
    """CannotBeDone when something already listens there: its answers would be taken for the server's."""
    address = "127.0.0.1" if host in ("0.0.0.0", "") else host
    try:
        family, kind, number, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise CannotBeDone(f"--host {host}: no such address ({error})") from error
    with socket.socket(family, kind, number) as probe:
        probe.settimeout(2)
        if probe.connect_ex(where) == 0:
            raise CannotBeDone(
                f"port {port} of {host} is taken: something already listens there",
                hint="choose another with --port, or stop what runs there",
            )


class Server:
    """A running script. ``stop`` ends every process of its session; used as a context, it always does."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        # a killed reapc cannot stop its server: the kernel then ends the script, which has become the engine
        setpriv = shutil.which("setpriv")
        if setpriv:
            command = [setpriv, "--pdeathsig", "TERM", *command]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches reapc alone, which then stops the server in order
                )
        except OSError as error:
            raise CannotBeDone(f"{error.filename or command[0]}: {error.strerror or error}") from error

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> set[int]:
        """The processes of the engine that live."""
        try:
            return process_tree(self.process.pid)
        except OSError:  # no /proc
            return {self.process.pid} if self.process.poll() is None else set()

    def died(self) -> CannotBeDone | None:
        """The error to raise when the server has ended by itself, with its own last words."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        words = "\n    ".join(last_lines(self.log)) or "(it wrote nothing)"
        return CannotBeDone(f"the server {how}; its last words:\n    {words}", hint=f"all of its log: {self.log}")

    def wait_ready(
        self, url: str, timeout_seconds: float, tell: Callable[[float, str], None], interval_seconds: float = 0.5
    ) -> float:
        """Seconds until /health answers (or /v1/models, where there is no /health). CannotBeDone: it died, or took
        longer. ``tell`` is called with the seconds so far and the log's last line."""
        start = time.monotonic()
        with httpx2.Client(base_url=url, timeout=5.0, trust_env=False) as http:
            while True:
                if (error := self.died()) is not None:
                    raise error
                if _ready(http):
                    return time.monotonic() - start
                passed = time.monotonic() - start
                if passed > timeout_seconds:
                    words = "\n    ".join(last_lines(self.log))
                    raise CannotBeDone(
                        f"the server was not ready after {timeout_seconds:.0f} s; the last of its log:\n    {words}",
                        hint=f"wait longer with --timeout, or read all of its log: {self.log}",
                    )
                tell(passed, next(iter(last_lines(self.log, 1)), ""))
                time.sleep(interval_seconds)

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> bool:
        """SIGTERM to all of it, SIGKILL to what is left after the grace time; True when SIGTERM was enough."""
        mine = self.pids
        self._signal(signal.SIGTERM, mine)
        end = time.monotonic() + grace_seconds
        while time.monotonic() < end:
            self.process.poll()
            mine |= self.pids
            if not any(_lives(pid) for pid in mine):
                return True
            time.sleep(0.05)
        self._signal(signal.SIGKILL, mine)
        self.process.wait()
        end = time.monotonic() + _KILL_SECONDS
        while any(_lives(pid) for pid in mine) and time.monotonic() < end:
            time.sleep(0.05)
        return False

    def _signal(self, number: int, pids: set[int]) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
        for pid in pids:  # what made a group of its own
            try:
                if os.getpgid(pid) != self.process.pid:
                    os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                continue


def _ready(http: httpx2.Client) -> bool:
    try:
        answer = http.get("/health")
        if answer.status_code == 404:
            answer = http.get("/v1/models")
        return answer.status_code in (200, 401, 403)  # behind a key it is up all the same
    except httpx2.HTTPError:
        return False


def _lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return Path("/proc").is_dir() is False
