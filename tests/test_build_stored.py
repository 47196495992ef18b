"""Builds that keep the source's quantization: planned from the bytes of its files, pruned byte for byte, measured
against the original and served as it is; and builds that decode it because they want another format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_project, run_main
from family_models import make
from quantized_models import SCHEMES, packed_copy
from safetensors.torch import load_file, save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.formats import weights
from reapc.planner.question import from_recipe
from reapc.planner.search import answer
from reapc.recipe import load_recipe

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
method = "none"

[calibration]
data = "tokens.safetensors"
sequences = 12
tokens = 64

[verify]
sequences = 4
"""
QWEN = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "tie_word_embeddings": False}
KEPT = {name: 9 for name in SCHEMES} | {"mxfp4:experts": 4}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` in bf16 (Qwen3-MoE, untied), and one folder for each scheme, named after it; gpt-oss for MXFP4."""
    folder = make_project(tmp_path_factory.mktemp("stored"), RECIPE, dtype=torch.bfloat16, **QWEN)
    (folder / "gpt").mkdir()
    make("gpt_oss", folder / "gpt")
    for name, scheme in SCHEMES.items():
        packed_copy(folder / ("gpt" if name == "mxfp4:experts" else "model"), folder / name, scheme)
    ids = load_file(folder / "tokens.safetensors")["input_ids"] % 64
    save_file({"input_ids": ids}, folder / "small.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "stored-cache"))


def options(project: Path, name: str, **changes: Any) -> list[str]:
    found = {"model.source": project / name, "prune.experts": KEPT[name]}
    if name == "mxfp4:experts":
        found["calibration.data"] = project / "small.safetensors"
    return [part for key, value in {**found, **changes}.items() for part in ("--set", f"{key}={value}")]


def is_expert(name: str) -> bool:
    return ".experts." in name


def check_bytes(source: Path, result: Path, kept: dict[str, list[int]]) -> int:
    """Every tensor of ``result`` holds the source's bytes: those of the expert that it was, the rows of the router that
    are left, or all of it. Returns how many tensors of experts were looked at."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, result))
    looked = 0
    for name, tensor in after.items():
        parts = name.split(".")
        experts = kept.get(parts[2]) if parts[1] == "layers" else None
        original = before.get(name)
        if experts and is_expert(name) and parts[parts.index("experts") + 1].isdigit():
            place = parts.index("experts") + 1
            original = before[".".join([*parts[:place], str(experts[int(parts[place])]), *parts[place + 1 :]])]
        elif experts and (is_expert(name) or name.endswith(("mlp.gate.weight", "router.weight", "router.bias"))):
            assert original is not None
            original = original[experts]
        assert original is not None, name
        assert tensor.dtype == original.dtype, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), original.contiguous().view(torch.uint8)), name
        looked += is_expert(name)
    return looked


@pytest.mark.parametrize("name", SCHEMES)
def test_a_build_keeps_the_source_byte_for_byte(name: str, project: Path, capsys, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run_main(
        capsys, "build", project / "tiny.toml", "--out", out, "--json", *options(project, name)
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads(text.strip().splitlines()[-1])
    assert (summary["format"], summary["experts_kept"]) == (name, KEPT[name])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["as_stored"]
    assert "quantizer" not in manifest
    looked = check_bytes(project / name, out / "model", manifest["kept"])
    parts = {"fp8-block": 2, "fp8": 2, "ct-w4g32:experts": 3, "gptq-w4g64": 4, "nvfp4:experts": 4}.get(name, 3)
    assert looked == (3 * 6 if name == "mxfp4:experts" else 2 * 9 * 3 * parts)
    # the prediction is that of the bytes that are there, header apart
    rows = {row["name"]: row for row in manifest["fit"]}
    real = sum(tensor.nbytes for tensor in load_file(out / "model/model.safetensors").values())
    assert rows["weights"]["predicted_bytes"] == rows["weights"]["actual_bytes"] == real
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (project / name, out / "model"))
    assert after["quantization_config"] == before["quantization_config"]
    assert 0 < manifest["fidelity"]["kl"] < 5
    reasons = json.loads((out / "plan.json").read_text())["from_scores"]["reasons"]
    assert any("copied byte for byte, and nothing is quantized again" in line for line in reasons)
    assert "--quantization" not in (out / "serve.sh").read_text()  # vLLM reads it off config.json
    assert "vllm" in (out / "serve.sh").read_text()


def test_nothing_pruned_loses_nothing(project: Path, capsys, tmp_path: Path) -> None:
    """The measure of fidelity is against what the original decodes to."""
    changes = options(project, "fp8-block", **{"prune.experts": 12})
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *changes)
    assert code == 0, err
    fidelity = json.loads((tmp_path / "out/manifest.json").read_text())["fidelity"]
    assert fidelity["kl"] < 1e-6
    assert fidelity["top1"] == 1
    shards = [folder / "model.safetensors" for folder in (project / "fp8-block", tmp_path / "out/model")]
    assert shards[0].read_bytes() == shards[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "fmt"),
    [
        ("ct-w4g32:experts", {"quantize.method": "fp8", "quantize.format": "fp8-block"}, "fp8-block"),
        ("gptq-w4g64", {"quantize.method": "auto", "quantize.format": "bf16"}, "bf16"),
        pytest.param(
            "fp8-block",
            {"quantize.method": "auto_round", "quantize.bits": 4, "quantize.iters": 0},
            "auto-round-w4g",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_format_starts_from_the_decoded_weights(
    name: str, changes: dict[str, Any], fmt: str, project: Path, capsys, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", out, *options(project, name, **changes))
    assert code == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"].startswith(fmt)
    assert not manifest["as_stored"]
    rows = {row["name"]: row for row in manifest["fit"]}
    assert rows["weights"]["predicted_bytes"] == rows["weights"]["actual_bytes"]
    source, result = Checkpoint(project / name), Checkpoint(out / "model")
    experts = manifest["kept"]["1"]
    for new, old in enumerate(experts):
        a, b = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (old, new))
        before, after = source.tensor(a).float(), result.tensor(b).float()
        error = float((after - before).norm() / before.norm())
        # bf16 keeps 8 bits of mantissa, e4m3 three, four bits a fifteenth of the largest
        assert error < {"bf16": 2**-8, "fp8-block": 2**-4}.get(fmt, 0.15)
    assert ("quantization_config" in json.loads((out / "model/config.json").read_text())) == (fmt != "bf16")


def test_the_plan_of_the_config_is_that_of_the_files(project: Path) -> None:
    """What `reapc plan` says of a model that nobody has downloaded."""
    recipe = load_recipe(project / "tiny.toml")
    for name in SCHEMES:
        spec = Checkpoint(project / name).spec
        small = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"experts": KEPT[name]})})
        question = from_recipe(small, spec, name)
        plan = answer(question)
        assert plan.chosen.format == name
        real = Checkpoint(project / name).bytes
        whole = from_recipe(small.model_copy(update={"prune": recipe.prune.model_copy(update={
            "experts": spec.num_experts})}), spec, name)  # fmt: skip
        counted = answer(whole).chosen.weights_bytes
        # scales of 16 bit or 32, and of activations: nothing else may differ
        assert abs(counted - real) / real < 0.02, (name, counted, real)
        if name in ("fp8-block", "ct-w4g32:experts", "gptq-w4g64", "auto-round-w4g32", "mxfp4:experts"):
            assert counted == real


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({**SCHEMES["gptq-w4g64"], "sym": False}, "asymmetric"),
        ({**SCHEMES["gptq-w4g64"], "desc_act": True}, "columns are reordered"),
        ({**SCHEMES["fp8-block"], "weight_block_size": [64, 64]}, "tiles are 64 x 64"),
    ],
)
def test_what_vllm_does_not_load_is_not_kept(
    scheme: dict[str, Any], words: str, project: Path, capsys, tmp_path: Path
) -> None:
    packed_copy(project / "model", tmp_path / "m", scheme)
    changes = options(project, "fp8-block", **{"model.source": tmp_path / "m"})
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *changes)
    assert code == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_experts_of_a_layer_in_several_ways_are_not_kept(project: Path, capsys, tmp_path: Path) -> None:
    kept = ["lm_head", "model.layers.1.mlp.experts.3.up_proj"]
    packed_copy(project / "model", tmp_path / "m", {**SCHEMES["fp8-block"], "modules_to_not_convert": kept})
    changes = options(project, "fp8-block", **{"model.source": tmp_path / "m"})
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *changes)
    assert code == 1
    assert "the experts of model.layers.1 are not all stored in one way" in err


def test_a_packing_without_a_name_is_refused_in_words(project: Path, capsys, tmp_path: Path) -> None:
    scheme = {**SCHEMES["gptq-w4g64"], "group_size": 16}  # vLLM's kernels have no such group, and neither has the plan
    packed_copy(project / "model", tmp_path / "m", scheme)
    changes = options(project, "fp8-block", **{"model.source": tmp_path / "m"})
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", *changes)
    assert code == 1
    assert "in a layout that reapc does not plan in vLLM as it is" in err
    assert 'quantize.format = "bf16" decodes it' in err


def test_auto_takes_what_is_stored_where_it_fits(project: Path, capsys) -> None:
    """A recipe that fixes no format: the source's own loses nothing, so it is taken, and the plan says so."""
    shutil.copy(ROOT / "recipes/deepseek_v32_h100x8.toml", project / "auto.toml")
    changes = ["--set", "quantize.format=auto", "--set", "serve.engine=auto"]
    code, text, err = run_main(capsys, "plan", project / "auto.toml", "--json", *changes)
    assert code == 0, err
    plan = json.loads(text)["plan"]
    assert (plan["engine"], plan["format"]) == ("vllm", "fp8-block")
    assert any("fp8-block is what the checkpoint is published in" in line for line in plan["reasons"])
    code, text, err = run_main(capsys, "plan", ROOT / "recipes/kimi_k2_h100x8.toml", "--json")
    assert code == 0, err
    (line,) = [line for line in json.loads(text)["plan"]["reasons"] if "is published in" in line]
    assert "cannot stay so in vLLM: with 250 of 384 experts" in line
    assert "decoded to 16 bit" in line


def test_names_are_those_of_weight_formats() -> None:
    assert all(weights.parse(name) is not None for name in SCHEMES)
