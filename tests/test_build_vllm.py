"""The vLLM road of a build on a tiny model, with the real quantizers: bytes, reload, report, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_project, run_main

from reapc.checkpoint.reader import Checkpoint
from reapc.formats import weights

RECIPE = """
[model]
source = "model"

[target]
name = "rtx4090"

[serve]
engine = "vllm"
context = 512

[prune]
experts = 9

[quantize]
format = "fp8"

[calibration]
data = "tokens.safetensors"
sequences = 16
tokens = 64

[verify]
sequences = 4
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm-project")
    changes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return make_project(folder, RECIPE, dtype=torch.bfloat16, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "vllm-cache"))


@pytest.mark.parametrize(
    ("name", "settings", "tool"),
    [
        ("fp8", {}, "reapc"),
        ("fp8-block:experts+layers.0=16", {}, "reapc"),
        ("auto-round-w4g32:experts", {"iters": 0}, "auto-round"),
        ("ct-w3g64", {"iters": 0}, "auto-round"),
        ("gptq-w4g128", {}, "gptqmodel"),
    ],
)
def test_a_build(project: Path, capsys, tmp_path: Path, name: str, settings: dict[str, int], tool: str) -> None:
    out = tmp_path / "out"
    changes = [f"quantize.{key}={value}" for key, value in {"format": name, **settings}.items()]
    options = [part for change in changes for part in ("--set", change)]
    code, text, err = run_main(capsys, "build", project / "tiny.toml", "--out", out, "--json", *options)
    assert code == 0, err
    summary = json.loads(text.strip().splitlines()[-1])
    assert (summary["experts_kept"], summary["format"]) == (9, name)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["engine"] == "vllm"
    assert manifest["artifact"] == "model"
    fmt = weights.parse(name)
    assert fmt is not None
    spec = Checkpoint(project / "model").spec.with_experts(9)
    rows = {row["name"]: row for row in manifest["fit"]}
    assert rows["weights"]["predicted_bytes"] == rows["weights"]["actual_bytes"] == weights.checkpoint_bytes(fmt, spec)
    # rounding a random model to 8 bits changes little, to 3 or 4 bits more, pruning most: all of it is in this figure
    assert 0 < manifest["fidelity"]["kl"] < 3
    assert manifest["reload"]
    assert manifest["quantizer"]["tool"] == {"fp8": "reapc", "gptq": "gptqmodel"}.get(
        name[:4], manifest["quantizer"]["tool"]
    )
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"]
    assert str(tmp_path) not in (out / "model" / "config.json").read_text()
    assert (out / "model" / "tokenizer.json").read_bytes() == (project / "model" / "tokenizer.json").read_bytes()
    assert "serve" in (out / "serve.sh").read_text()
    if not name.startswith("fp8"):
        assert manifest["starved"]["experts"] == 18  # 9 experts in each of two layers
        assert set(manifest["starved"]) >= {"count", "layers", "threshold_tokens", "summary"}
    if name == "fp8":
        again, text, _ = run_main(capsys, "build", project / "tiny.toml", "--out", out, "--json", *options)
        assert again == 0
        assert json.loads(text.strip().splitlines()[-1])["kl"] == summary["kl"]
        # what is quantized is not quantized again
        code, _, err = run_main(
            capsys, "quantize", out / "model", "--format", "ct-w4g32", "--out", tmp_path / "twice",
            "--tokens", project / "tokens.safetensors",
        )  # fmt: skip
        assert code == 2
        assert "quantized already" in err
        assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("quantize.format=int8",), 1, "no quantizer is driven for int8"),
        (("quantize.format=gptq-w3g32",), 2, "gptq has 4, 8 bits"),
        (("quantize.format=auto-round-w5g32",), 1, "2, 3, 4, 8 bits"),
        (("quantize.method=gptq", "quantize.format=fp8"), 2, "is not what quantize.method"),
        (("quantize.format=ct-w4g32", "target.compute_capability='7.0'"), 1, "needs compute capability 7.5"),
        (("quantize.format=ct-w4g32+layers.9=8",), 1, "the model has the layers 0 to 1"),
    ],
)
def test_refused(project: Path, capsys, tmp_path: Path, options: tuple[str, ...], code: int, words: str) -> None:
    sets = [part for option in options for part in ("--set", option)]
    found, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *sets)
    assert (found, words in err) == (code, True), err
    assert not (tmp_path / "out").exists()


def test_a_group_that_the_widths_refuse(tmp_path: Path, capsys) -> None:
    make_model(tmp_path / "narrow", dtype=torch.bfloat16, mlp_only_layers=[])  # experts of 32 columns
    code, _, err = run_main(capsys, "quantize", tmp_path / "narrow", "--format", "ct-w4g64", "--out", tmp_path / "out")
    assert code == 2
    assert "do not divide into groups of 64" in err
    assert "its widths take groups of 32" in err


def test_without_the_libraries(project: Path, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        if name in ("auto-round", "gptqmodel"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", missing)
    options = ("--set", "quantize.format=gptq-w4g32")
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *options)
    assert code == 1
    assert "the package gptqmodel is not installed" in err
    assert "reapc[quantizers]" in err


def test_too_little_memory(project: Path, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reapc.requirements.available_ram", lambda host, findings: 100 << 20)
    options = ("--set", "quantize.format=auto-round-w4g32")
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *options)
    assert code == 1
    assert "auto-round loads the whole pruned model" in err
    assert "100.0 MiB are available" in err
