"""The whole compiler on a tiny model: real converter, quantizer and server."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import make_project, run_main

RECIPE = """
[model]
source = "model"

[target]
ram = "80MB"

[serve]
context = 512

[prune]
experts = 9

[quantize]
format = "Q4_K_M"
pre_tokenizer = "qwen2"

[calibration]
data = "tokens.safetensors"
sequences = 16
tokens = 64

[verify]
sequences = 4
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a model with the demo's tokenizer, and token ids."""
    folder = tmp_path_factory.mktemp("project")
    return make_project(folder, RECIPE, hidden_size=256, moe_intermediate_size=256, head_dim=64)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_build_then_nothing_to_do_then_only_what_changed(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run_main(capsys, "build", project / "tiny.toml", "--out", out, "--json")
    assert code == 0, err
    summary = json.loads(text.strip().splitlines()[-1])
    keys = ["output", "experts_kept", "format", "predicted_bytes", "actual_bytes", "kl", "top1", "seconds"]
    assert list(summary) == keys
    assert summary["output"] == str(out)
    assert (summary["experts_kept"], summary["format"]) == (9, "Q4_K_M")
    assert summary["actual_bytes"] == (out / "model.gguf").stat().st_size
    assert abs(summary["predicted_bytes"] / summary["actual_bytes"] - 1) < 0.02
    assert 0 < summary["kl"] < 5
    manifest = json.loads((out / "manifest.json").read_text())
    fit = {row["name"]: row for row in manifest["fit"]}
    assert fit["weights"]["predicted_bytes"] == fit["weights"]["actual_bytes"]
    assert abs(fit["KV cache"]["predicted_bytes"] - fit["KV cache"]["actual_bytes"]) < 1 << 20
    assert "expected (estimate)" in err
    assert "scores: two halves of the data drop the same experts" in err
    stability = manifest["stability"]
    assert (stability["kept"], stability["chance"]) == (9, 0.25)
    assert stability["curve"][-1][2] == 1.0
    plans = json.loads((out / "plan.json").read_text())
    assert plans["from_prior"]["loss_source"] == "prior"
    assert plans["from_scores"]["loss_source"] == "measured"
    before = digest(out / "model.gguf")

    code, text, err = run_main(capsys, "build", project / "tiny.toml", "--out", out)
    assert code == 0
    assert "nothing to do" in text
    assert "observe" not in err

    code, text, err = run_main(
        capsys, "build", project / "tiny.toml", "--out", tmp_path / "q8", "--set", "quantize.format=Q8_0", "--json"
    )
    assert code == 0, err
    other = json.loads((tmp_path / "q8" / "manifest.json").read_text())
    assert {"observe", "prune", "convert"} <= set(other["reused"])
    assert "quantize" not in other["reused"]
    assert other["format"] == "Q8_0"
    assert other["fidelity"]["kl"] < manifest["fidelity"]["kl"]
    assert digest(out / "model.gguf") == before

    # the same recipe, another format, into the folder of the earlier result: replaced, whole; a neighbour stays
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "backup").write_text("mine")
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", out, "--set", "quantize.format=Q8_0")
    assert code == 0, err
    assert digest(out / "model.gguf") == digest(tmp_path / "q8" / "model.gguf")
    assert (tmp_path / "out.old" / "backup").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    code, text, err = run_main(
        capsys, "build", project / "tiny.toml", "--out", tmp_path / "shared", "--json",
        "--scores", tmp_path / "q8" / "scores.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "observe" not in json.loads((tmp_path / "shared" / "manifest.json").read_text())["stage_seconds"]
    assert digest(tmp_path / "shared" / "model.gguf") == before
    assert json.loads(text.splitlines()[-1])["kl"] == pytest.approx(summary["kl"], rel=1e-6)

    # the shared scores file stands in for the observation, and the parts as commands give the same bytes
    code, _, err = run_main(
        capsys, "prune", project / "model", "--scores", out / "scores.safetensors", "--experts", 9,
        "--out", tmp_path / "pruned",
    )  # fmt: skip
    assert code == 0, err
    code, text, err = run_main(
        capsys, "quantize", tmp_path / "pruned", "--format", "Q8_0", "--no-imatrix", "--pre-tokenizer", "qwen2",
        "--out", tmp_path / "direct.gguf", "--json",
    )  # fmt: skip
    assert code == 0, err
    code, text, err = run_main(
        capsys, "compare", tmp_path / "pruned", tmp_path / "direct.gguf", "--tokens", project / "tokens.safetensors",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(text)["kl"] < 0.02
    assert json.loads(text)["top1"] > 0.9


def test_kill_9_and_the_same_command_end_in_the_same_bytes(project: Path, tools: str, tmp_path: Path) -> None:
    def build(cache: Path, out: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        command = [sys.executable, "-m", "reapc", "build", str(project / "tiny.toml"), "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    caches = [tmp_path / name for name in ("whole", "killed")]
    for cache in caches:
        (cache / "reapc").mkdir(parents=True)
        (cache / "reapc" / "llama.cpp").symlink_to(Path(tools) / "reapc" / "llama.cpp")
    start = time.monotonic()
    whole = build(caches[0], tmp_path / "a")
    text = whole.communicate(timeout=300)[0].decode()
    assert whole.returncode == 0, text
    duration = time.monotonic() - start
    moments = random.Random(time.time_ns())
    for _ in range(3):
        process = build(caches[1], tmp_path / "b")
        time.sleep(moments.uniform(0.3, 0.9) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "b").exists():  # whole or not there
            assert json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    last = build(caches[1], tmp_path / "b")
    text = last.communicate(timeout=300)[0].decode()
    assert last.returncode == 0, text
    assert digest(tmp_path / "a" / "model.gguf") == digest(tmp_path / "b" / "model.gguf")


class TestRefusals:
    def test_output_holds_something_else(self, project: Path, cache: str, capsys, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out")
        assert code == 2
        assert "holds something else" in err
        assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["mine"]

    def test_below_threshold_exits_1_and_says_by_how_much(self, project: Path, cache: str, capsys, tmp_path) -> None:
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", "--set", "verify.max_kl=1e-7"
        )
        assert code == 1
        assert "above max_kl 1e-07" in err
        assert not (tmp_path / "out").exists()

    def test_budget_that_nothing_fits_says_the_smallest(self, project: Path, cache: str, capsys, tmp_path) -> None:
        arguments = ("build", project / "tiny.toml", "--out", tmp_path / "out", "--set")
        code, _, err = run_main(capsys, *arguments, 'target.ram="1MB"')
        assert code == 1
        need = int(err.split("needs ")[1].split(" bytes")[0])
        assert run_main(capsys, "plan", project / "tiny.toml", "--set", f"target.ram={need}B")[0] == 0
        assert run_main(capsys, "plan", project / "tiny.toml", "--set", f"target.ram={need - 1}B")[0] == 1

    def test_no_room_is_found_before_the_first_pass(self, project: Path, cache: str, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("reapc.checkpoint.atomic.free_bytes", lambda path: 12345)
        monkeypatch.setattr("reapc.passes.observe", lambda *a, **k: pytest.fail("a pass was started"))
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", "--set", "calibration.seed=5"
        )
        assert code == 1
        assert "of disk" in err

    def test_cache_that_cannot_be_written(self, project: Path, cache: str, capsys, tmp_path, monkeypatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out")
        assert code == 2
        assert "XDG_CACHE_HOME" in err

    def test_norm_topk_false_is_not_put_into_gguf(self, project: Path, cache: str, capsys, tmp_path) -> None:
        config = json.loads((project / "model" / "config.json").read_text())
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
        code, _, err = run_main(capsys, "plan", project / "tiny.toml", "--set", f'model.source="{tmp_path / "m"}"')
        assert code == 1
        assert "norm_topk_prob" in err


def request(port: int, path: str, body: dict | None = None) -> dict:
    data = json.dumps(body).encode() if body is not None else None
    call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("road", ["llama-server", "llama_cpp.server"])
def test_serve_script_answers(project: Path, cache: str, capsys, tmp_path: Path, road: str) -> None:
    out = tmp_path / "with space" / "out"
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", out)
    assert code == 0, err
    environment = dict(os.environ)
    if road == "llama_cpp.server":
        script = (out / "serve.sh").read_text()
        hint = next(line for line in script.splitlines() if line.strip().startswith("candidate=/"))
        (out / "serve.sh").write_text(script.replace(hint, "candidate=/nonexistent"))
        environment.pop("REAPC_LLAMA_CPP", None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment["PORT"] = str(port)
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen([str(out / "serve.sh")], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            try:
                request(port, "/v1/models")
                break
            except OSError:
                time.sleep(0.3)
        completion = request(port, "/v1/completions", {"prompt": "def ", "max_tokens": 5})
        assert completion["usage"]["completion_tokens"] > 0
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        assert request(port, "/v1/chat/completions", chat)["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.wait(20)
        log.close()
