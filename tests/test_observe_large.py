"""A checkpoint of more than 12 GB observed in 2 GB of memory, a layer of 3.2 GB at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_tokens
from safetensors.torch import save_file

from reapc.arch import TensorSpec, model_spec
from reapc.checkpoint.streamed_writer import Slot, write_streamed

BOUND = 2_000_000_000
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "vocab_size": 4096, "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
}  # fmt: skip


def write_large(folder: Path) -> int:
    """The checkpoint, a shard for every layer; its bytes. Experts are one random matrix, turned on by some elements."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    spec = model_spec(CONFIG)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2048 * 1024, generator=generator).mul_(0.02).to(torch.bfloat16)

    def values(tensor: TensorSpec, layer: int) -> torch.Tensor:
        if tensor.role == "norm":
            return torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.role == "expert":
            return random.roll(1009 * (tensor.expert or 0) + layer).reshape(tensor.shape)
        return torch.randn(tensor.shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    weight_map: dict[str, str] = {}
    for layer in range(-1, spec.num_layers):
        tensors = list(spec.outer_tensors if layer < 0 else spec.layer_tensors(layer))
        name = f"model-{layer + 2}-of-{spec.num_layers + 1}.safetensors"
        slots = [Slot(tensor.name, "BF16", tensor.shape) for tensor in tensors]
        write_streamed(folder / name, slots, (values(tensor, layer) for tensor in tensors), {"format": "pt"})
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip(f"{tmp_path}: fewer than 30 GB of disk are free")
    folder = tmp_path / "large"
    assert write_large(folder) > 12e9
    yield folder
    shutil.rmtree(folder)


def run_sampled(command: list[str]) -> tuple[dict[str, object], int, float]:
    """The summary of a command, the most of its anonymous memory seen from outside, and its seconds."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = 0

    def sample() -> None:
        nonlocal most
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            most = max([most, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    out, err = process.communicate()
    thread.join()
    assert process.returncode == 0, err
    assert "warning" not in err
    return json.loads(out), most, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_a_layer_larger_than_the_memory_allowed(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"input_ids": torch.from_numpy(make_tokens(4, 128, vocab=4096).input_ids)}, tmp_path / "ids.safetensors")
    assert min(p.stat().st_size for p in large.glob("model-[2-5]-*")) > 1.5 * BOUND
    files = []
    for name, more in (("bounded", ("--memory", "2GB")), ("free", ())):
        out = tmp_path / name
        command = [
            sys.executable, "-m", "reapc", "observe", str(large), "--tokens", str(tmp_path / "ids.safetensors"),
            "--out", str(out), "--json", *more,
        ]  # fmt: skip
        summary, seen, seconds = run_sampled(command)
        memory = summary["memory"]
        assert isinstance(memory, dict)
        with capsys.disabled():
            print(f"\n{name}: {seconds:.0f} s, seen from outside {seen:,}, {memory}", file=sys.stderr)
        if more:
            assert memory["bound_bytes"] == BOUND
            assert seen <= memory["peak_bytes"] * 1.02 + (4 << 20)
            assert max(seen, memory["peak_bytes"]) <= memory["predicted_bytes"] <= BOUND
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert not any(path.name.endswith(".work") for path in tmp_path.iterdir())
    assert os.listdir(large)
