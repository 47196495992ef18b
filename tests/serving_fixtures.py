"""A tiny real build, real llama-servers on it, and small HTTP servers for what a real one cannot be made to do.

PYTEST_DONT_REWRITE: test modules import the helpers here before pytest loads it for its fixtures.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_project
from safetensors.numpy import save_file

from reapc.serving.built import read_built
from reapc.serving.process import Server
from reapc.serving.watch import environment_for

VOCABULARY = 2048
RECIPE = """
[model]
source = "model"

[target]
ram = "90MB"

[serve]
context = 256

[prune]
experts = 9

[quantize]
format = "Q4_K_M"
pre_tokenizer = "qwen2"

[calibration]
data = "tokens.safetensors"
sequences = 8
tokens = 48

[verify]
data = "held_out.safetensors"
sequences = 4
"""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a build: Q4_K_M, 9 of 12 experts, for llama.cpp."""
    from reapc.build import Build
    from reapc.progress import Silent
    from reapc.recipe import load_recipe
    from reapc.stages import cache_root

    folder = make_project(
        tmp_path_factory.mktemp("served"), RECIPE, sequences=8, length=48,
        hidden_size=256, moe_intermediate_size=256, head_dim=64, vocab_size=VOCABULARY,
    )  # fmt: skip
    random = np.random.default_rng(1)
    ids = random.integers(0, 2000, (4, 32)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    mask[1, 20:] = False
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "held_out.safetensors")
    tools, cache = cache_root() / "llama.cpp", folder / "cache"
    (cache / "reapc").mkdir(parents=True)
    if tools.is_dir():
        (cache / "reapc" / "llama.cpp").symlink_to(tools)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        Build(load_recipe(folder / "tiny.toml", ()), Silent()).run(folder / "out")
    return folder / "out"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the build that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


@contextmanager
def serving(built: Path, log: Path, *arguments: str, **variables: str) -> Iterator[tuple[str, Server]]:
    """A real llama-server from the build's own script: its address and process."""
    port = free_port()
    environment = {**environment_for(read_built(built), "127.0.0.1", port), **variables}
    with Server(["bash", str(built / "serve.sh"), *arguments], environment, log) as server:
        server.wait_ready(f"http://127.0.0.1:{port}", 60, lambda seconds, line: None, 0.05)
        yield f"http://127.0.0.1:{port}", server


@pytest.fixture(scope="module")
def llama(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a llama-server that serves the build."""
    with serving(built, tmp_path_factory.mktemp("llama") / "log") as (url, _):
        yield url


Answer = Callable[[str, str, Any], "tuple[int, Any] | None"]


@contextmanager
def stand_in(answer: Answer) -> Iterator[str]:
    """An HTTP server: ``answer(method, path, body)`` gives status and content (text, or data for JSON); None drops the
    connection without an answer."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            found = answer(self.command, self.path, body)
            if found is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, content = found
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = _do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    from reapc.cli.main import main

    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    sys.stderr.write(captured.err)  # shown when the test fails
    assert "Traceback" not in captured.err
    return int(exit_.value.code or 0), captured.out, captured.err
