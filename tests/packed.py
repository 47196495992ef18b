"""Packed linears read back by hand, and the checkpoints that the quantizers' tests make."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.formats import weights
from reapc.formats.layout import stored
from reapc.formats.weights import WeightFormat
from reapc.progress import Advance


class Counting:
    """A progress that remembers."""

    def __init__(self, fail: type[BaseException] | None = None) -> None:
        self.done: list[tuple[str, float, float]] = []
        self.lines: list[str] = []
        self.fail = fail

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        def advance(amount: float) -> None:
            self.done.append((name, amount, total))
            if self.fail:
                raise self.fail

        yield advance

    def log(self, line: str) -> None:
        self.lines.append(line)


def make_small(folder: Path, **changes: Any) -> Path:
    """A Qwen3-MoE in bf16 whose widths take every group size, in two shards."""
    settings = dict(
        dtype=torch.bfloat16, shards="500KB", num_experts=5, num_experts_per_tok=2, num_hidden_layers=2,
        hidden_size=128, moe_intermediate_size=128, intermediate_size=128, head_dim=32, mlp_only_layers=[],
        initializer_range=0.1,
    )  # fmt: skip
    return make_model(folder, **{**settings, **changes})  # type: ignore[arg-type]


def parse(name: str) -> WeightFormat:
    found = weights.parse(name)
    assert found is not None
    return found


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; bfloat16 as float32."""
    return {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_torch(path).items()
    }


def tensor_bytes(folder: Path) -> int:
    return sum(entry.nbytes for path in folder.glob("*.safetensors") for entry in load_torch(path).values())


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(rows, words) int32 as (rows, count) unsigned integers of ``bits`` bits, the lowest bits first."""
    stream = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return stream.reshape(len(words), count, bits).astype(np.int64) @ (1 << np.arange(bits))


def dequantized(found: dict[str, np.ndarray], module: str, fmt: WeightFormat, rows: int, columns: int) -> np.ndarray:
    """The (rows, columns) weight that a symmetric packed linear stands for."""
    if fmt.method == "ct":
        levels = unpack(found[f"{module}.weight_packed"], fmt.bits, columns)
        scales = found[f"{module}.weight_scale"]
        assert found[f"{module}.weight_shape"].tolist() == [rows, columns]
    else:
        levels = unpack(np.ascontiguousarray(found[f"{module}.qweight"].T), fmt.bits, columns)
        scales = found[f"{module}.scales"].T
        zeros = unpack(found[f"{module}.qzeros"], fmt.bits, rows)
        # GPTQ's first version stores zero points less one
        assert (zeros == (1 << fmt.bits - 1) - 1).all()
    return (levels - (1 << fmt.bits - 1)) * np.repeat(scales, fmt.group_size, axis=1)


def check_against_source(source: Path, folder: Path, fmt: WeightFormat) -> float:
    """Kept tensors are the source's, quantized ones near it; writes nothing. Returns the largest relative error."""
    original, found = tensors(source), tensors(folder)
    worst, expected = 0.0, set()
    for item in stored(fmt, Checkpoint(source).spec):
        name = item.tensor.name
        if item.format is None:
            expected.add(name)
            assert np.array_equal(original[name], found[name]), name
            continue
        module, (rows, columns) = item.tensor.module, item.tensor.shape
        values = dequantized(found, module, item.format, rows, columns)
        error = np.sqrt(np.square(values - original[name]).mean() / np.square(original[name]).mean())
        assert error < BOUNDS[item.format.bits], (name, error)
        worst = max(worst, float(error))
        expected |= {name for name in found if name.startswith(f"{module}.")}
    assert set(found) == expected
    return worst


# Relative error of rounding a normal distribution to 2 ** bits levels between its extremes in a group of 128 (about
# 2.7 sigma): 2.7 / 2 ** (bits - 1) / sqrt(12), times 2.2 for what GPTQ and tuning trade for the outputs' error.
BOUNDS = {bits: min(0.7, 2.2 * 2.7 / 2 ** (bits - 1) / 12**0.5) for bits in range(2, 9)}


def write_dequantized(source: Path, folder: Path, fmt: WeightFormat, out: Path) -> Path:
    """The checkpoint ``folder`` as a plain one in float32, by ``dequantized``."""
    found = tensors(folder)
    weights_of = {}
    for item in stored(fmt, Checkpoint(source).spec):
        name = item.tensor.name
        if item.format is None:
            weights_of[name] = found[name]
        else:
            weights_of[name] = dequantized(found, item.tensor.module, item.format, *item.tensor.shape)
    out.mkdir()
    plain = {name: torch.tensor(value, dtype=torch.float32).contiguous() for name, value in weights_of.items()}
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((source / "config.json").read_text()), "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    return out


_LOGITS = """
import json, os, sys
import torch
ids, out, *folders = sys.argv[1:]
from safetensors.torch import load_file, save_file
found = {}
for folder in folders:
    config = json.load(open(folder + "/config.json"))
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "gptq":
        os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
        from gptqmodel import GPTQModel
        model = GPTQModel.load(folder, device="cpu", backend="torch").model
    else:
        from transformers import AutoModelForCausalLM
        dtype = torch.float32 if method in (None, "compressed-tensors") else torch.bfloat16
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(input_ids=load_file(ids)["input_ids"]).logits
    found[str(len(found))] = logits.float().contiguous()
save_file(found, out)
"""


def reload_kl(source: Path, folder: Path, fmt: WeightFormat, ids: np.ndarray, work: Path) -> tuple[float, float]:
    """``folder`` loaded strictly by the library that its format belongs to, in a process of its own: its mean KL from
    what is packed in it (read by hand), and from the source."""
    plain = write_dequantized(source, folder, fmt, work / "plain")
    save_file({"input_ids": torch.tensor(ids, dtype=torch.int64)}, work / "ids.safetensors")
    files = [work / "ids.safetensors", work / "logits.safetensors", source, plain, folder]
    command = [sys.executable, "-c", _LOGITS, *(str(path) for path in files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(work / "logits.safetensors")
    return mean_kl(found["1"], found["2"]), mean_kl(found["0"], found["2"])


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence per position, in nats."""
    first, second = (torch.log_softmax(torch.tensor(values).double(), -1) for values in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())
