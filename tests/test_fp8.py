"""The streaming FP8 cast: values against arithmetic, files against the prediction, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.cli.progress import make_progress
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.quantize import fp8

# A normal e4m3 number has 3 bits after the point: rounding to nearest is off by at most 2^-4 of it; below 2^-6 the
# step is 2^-9.
RELATIVE, ABSOLUTE = 2**-4, 2**-10


def bound(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.maximum(weight.abs() * RELATIVE, scale * ABSOLUTE) * (1 + 1e-5)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16, shards="300KB")


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 5), (130, 384)])
def test_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, shape[1])
    cast, scales = fp8.cast_blocks(weight)
    assert cast.dtype == torch.float8_e4m3fn
    assert cast.shape == weight.shape
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert scales[i, j] == part.abs().max() / 448
    spread = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert bool(((cast.float() * spread - weight).abs() <= bound(weight, spread)).all())


def test_channels() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight[3] = 0  # a row of zeros has no scale of its own
    cast, scales = fp8.cast_channels(weight)
    assert scales.shape == (64, 1)
    assert bool(torch.isfinite(cast.float()).all())
    assert bool((cast[3].float() == 0).all())
    assert bool(((cast.float() * scales - weight.float()).abs() <= bound(weight.float(), scales)).all())
    assert bool((cast.float().abs().amax(dim=1)[scales[:, 0] != 1] == 448).all())


@pytest.mark.parametrize("name", ["fp8-block", "fp8", "fp8-block:experts", "fp8+layers.0=16"])
def test_a_checkpoint(half: Path, tmp_path: Path, name: str) -> None:
    fmt = weights.parse(name)
    assert fmt is not None
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    facts = fp8.quantize(half, tmp_path / "out", fmt, make_progress())
    assert facts["method"] == "round to nearest"
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before
    source, result = Checkpoint(half), Checkpoint(tmp_path / "out")
    assert len(result.shards) == len(source.shards) > 1
    assert result.bytes == weights.checkpoint_bytes(fmt, source.spec)
    config = json.loads((tmp_path / "out/config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((half / "config.json").read_text())
    ignored = settings["modules_to_not_convert" if fmt.method == "fp8-block" else "ignore"]
    cast = {n.removesuffix(".weight") for n, e in result.entries.items() if e.dtype == "F8_E4M3"}
    assert cast
    assert not cast & set(ignored)
    routers = {t.module for t in source.spec.tensors() if t.role == "router"}
    assert routers <= set(ignored)
    linears = {t.module for t in source.spec.tensors() if len(t.shape) == 2 and t.role not in ("embedding", "lm_head")}
    assert cast | set(ignored) == linears | {"lm_head"}
    for tensor in source.spec.tensors():
        if tensor.module not in cast:
            assert torch.equal(source.tensor(tensor.name), result.tensor(tensor.name))


def test_refused(tiny: Path, tmp_path: Path) -> None:
    fmt, int4 = weights.parse("fp8"), weights.parse("ct-w4g32")
    assert fmt is not None
    assert int4 is not None
    with pytest.raises(ReapcError, match="is not an FP8 format"):
        fp8.quantize(tiny, tmp_path / "out", int4, make_progress())
    fp8.quantize(tiny, tmp_path / "out", fmt, make_progress())
    with pytest.raises(ReapcError, match="exists already"):
        fp8.quantize(tiny, tmp_path / "out", fmt, make_progress())
    with pytest.raises(ReapcError, match=r"quantized already \(compressed-tensors\)"):
        fp8.quantize(tmp_path / "out", tmp_path / "again", fmt, make_progress())
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(tiny / "model.safetensors")
    name = next(n for n in tensors if "experts.0.gate_proj" in n)
    tensors[name][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReapcError, match="NaN or infinite"):
        fp8.quantize(broken, tmp_path / "nan", fmt, make_progress())
    assert not (tmp_path / "nan").exists()
    assert not list(tmp_path.glob("*.partial"))
