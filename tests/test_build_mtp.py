"""Builds that keep the multi-token-prediction layers: counted in the plan, pruned, written in the format's own way, and
named in the launch line where they draft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_glm4, run_main
from quantized_models import SCHEMES, packed_copy
from safetensors.numpy import save_file
from safetensors.torch import load_file

from reapc.arch import load_config
from reapc.checkpoint.reader import Checkpoint

RECIPE = """
[model]
source = "model"

[target]
name = "rtx4090"

[serve]
engine = "vllm"
context = 256
speculative = "mtp"

[prune]
experts = 9
mtp = "prune"

[quantize]
method = "none"

[calibration]
data = "tokens.safetensors"
sequences = 8
tokens = 32

[verify]
sequences = 2
"""
MTP = "model.layers.3."


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4.x with an MTP layer: "model" in bf16, "fp8" in tiles."""
    folder = tmp_path_factory.mktemp("mtp")
    make_glm4(
        folder / "model", dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=128, intermediate_size=256,
        head_dim=64, vocab_size=2048,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "demo" / "model" / name, folder / "model" / name)
    packed_copy(folder / "model", folder / "fp8", SCHEMES["fp8-block"])
    ids = np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32)
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "mtp-cache"))


def build(project: Path, capsys: Any, out: Path, **changes: Any) -> tuple[int, str]:
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", out, *sets)
    return code, err


@pytest.mark.parametrize(
    ("source", "changes", "dtypes"),
    [
        ("model", {}, {"BF16"}),
        ("model", {"quantize.method": "fp8", "quantize.format": "fp8-block"}, {"F8_E4M3", "F32"}),
        ("fp8", {}, {"F8_E4M3", "F32"}),
        ("fp8", {"quantize.method": "auto", "quantize.format": "bf16"}, {"BF16"}),
        pytest.param(
            "model",
            {"quantize.format": "auto-round-w4g64:experts", "quantize.method": "auto_round", "quantize.iters": "0"},
            {"BF16"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mtp_layers_are_kept_and_counted(
    source: str, changes: dict[str, str], dtypes: set[str], project: Path, capsys, tmp_path: Path
) -> None:
    """AutoRound does not know MTP layers: theirs stay in 16 bit, and are counted so."""
    out = tmp_path / "out"
    code, err = build(project, capsys, out, **{"model.source": project / source, **changes})
    assert code == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    rows = {row["name"]: row for row in manifest["fit"]}
    real = sum(tensor.nbytes for tensor in load_file(out / "model/model.safetensors").values())
    assert rows["weights"]["predicted_bytes"] == rows["weights"]["actual_bytes"] == real
    assert load_config(out / "model")["num_nextn_predict_layers"] == 1
    result = Checkpoint(out / "model")
    mtp = {name: entry for name, entry in result.entries.items() if name.startswith(MTP)}
    experts = {name.split(".experts.")[1].split(".")[0] for name in mtp if ".experts." in name}
    assert experts == {str(number) for number in range(9)}
    assert {entry.dtype for name, entry in mtp.items() if ".experts." in name} == dtypes
    assert f"{MTP}eh_proj.weight" in mtp
    assert '--speculative-config \'{"method": "mtp"' in (out / "serve.sh").read_text()
    plan = json.loads((out / "plan.json").read_text())["from_scores"]["chosen"]
    (device,) = plan["placement"]["devices"]
    drafting = sum(entry.bytes for entry in mtp.values())
    assert device["weights_bytes"] >= plan["weights_bytes"] - drafting
    if source == "model" and not changes:  # the longest rows of its router, by torch
        original = load_file(project / "model/model.safetensors")
        norms = original[f"{MTP}mlp.gate.weight"].float().norm(dim=1)
        kept = sorted(norms.argsort(descending=True)[:9].tolist())
        for new, old in enumerate(kept):
            name = MTP + "mlp.experts.{}.up_proj.weight"
            assert torch.equal(original[name.format(old)], result.stored_tensor(name.format(new)))


def test_mtp_layers_without_drafting_take_room_on_the_disk_only(project: Path, capsys, tmp_path: Path) -> None:
    found = {}
    for name, changes in {"none": {"serve.speculative": "none"}, "mtp": {}}.items():
        code, err = build(project, capsys, tmp_path / name, **changes)
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "plan.json").read_text())["from_scores"]["chosen"]
    assert found["none"]["weights_bytes"] == found["mtp"]["weights_bytes"]
    held = {name: plan["placement"]["devices"][0]["weights_bytes"] for name, plan in found.items()}
    assert held["none"] < held["mtp"]
    assert "--speculative-config" not in (tmp_path / "none/serve.sh").read_text()


def test_every_expert_and_the_mtp_layers_are_the_source_itself(project: Path, capsys, tmp_path: Path) -> None:
    code, err = build(project, capsys, tmp_path / "out", **{"prune.experts": 12})
    assert code == 0, err
    before, after = (folder / "model.safetensors" for folder in (project / "model", tmp_path / "out/model"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune.mtp": "drop"}, 'prune.mtp = "drop" leaves out the MTP layers that would draft'),
        (
            {"serve.engine": "llama.cpp", "serve.speculative": "none"},
            'prune.mtp = "prune" is for vLLM: reapc plans llama.cpp without MTP layers',
        ),
    ],
)
def test_refused_in_words(changes: dict[str, str], words: str, project: Path, capsys, tmp_path: Path) -> None:
    code, err = build(project, capsys, tmp_path / "out", **changes)
    assert code == 1
    assert words in err
    assert not (tmp_path / "out").exists()
