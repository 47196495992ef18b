"""GPTQ by GPTQModel, and GPTQ layouts by AutoRound, on small real checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import packed
import pytest
from conftest import make_tokens
from packed import Counting, parse
from safetensors.torch import load_file, save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.formats.layout import stored
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.quantize import gptq, quantization_config
from reapc.quantize.published import linears
from reapc.quantize.starved import starved

TOKENS = make_tokens(12, 32, padded=True)
MIXED = "gptq-w4g32+attention=8"
LONELY = 4  # the expert of layer 0 that next to no token is routed to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token's first hidden value is large, and the router of layer 0 holds it against one expert."""
    folder = packed.make_small(tmp_path_factory.mktemp("small") / "model", shards="50GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 0.5
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[LONELY] = 0
    router[LONELY, 0] = -20.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Counting]:
    out, progress = tmp_path_factory.mktemp("mixed") / "model", Counting()
    facts = gptq.quantize(source, out, parse(MIXED), TOKENS, progress, threads=2)
    return out, facts, progress


def test_what_is_published(source: Path, mixed: tuple[Path, dict[str, Any], Counting]) -> None:
    out, facts, progress = mixed
    fmt = parse(MIXED)
    assert packed.tensor_bytes(out) == weights.checkpoint_bytes(fmt, Checkpoint(source).spec)
    packed.check_against_source(source, out, fmt)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    published = ours.pop("quantization_config")
    assert ours == theirs
    assert "meta" not in published
    assert (published["bits"], published["group_size"], published["sym"], published["desc_act"]) == (4, 32, True, False)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    assert "/tmp" not in (out / "config.json").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert progress.done == [(f"GPTQ to {MIXED}", 1, 2)] * 2
    assert facts["settings"]["tokens"] == TOKENS.count


def test_starved_experts_are_reported(
    source: Path, mixed: tuple[Path, dict[str, Any], Counting], tmp_path: Path
) -> None:
    fallback = mixed[1]["fallback"]
    linear = ("gate_proj", "up_proj", "down_proj")
    assert sorted(fallback["modules"]) == sorted(f"0.mlp.experts.{LONELY}.{name}" for name in linear)
    assert fallback["count"] == 3
    # and reapc's own count of the same tokens says the same
    counted = starved(observe(Checkpoint(source), TOKENS, tmp_path / "work", Silent(), moments=False))
    assert {layer: list(experts) for layer, experts in counted["layers"].items()} == {"0": [str(LONELY)]}
    assert counted["calibration_tokens"] == TOKENS.count


def test_it_reloads_and_stands_for_what_is_packed(
    source: Path, mixed: tuple[Path, dict[str, Any], Counting], tmp_path: Path
) -> None:
    ids = make_tokens(4, 24, seed=3).input_ids
    loaded, rounding = packed.reload_kl(source, mixed[0], parse(MIXED), ids, tmp_path)
    assert loaded < 0.3 * rounding  # the loader computes in bfloat16


def matched(config: dict[str, Any], name: str) -> int:
    """vLLM's rule (utils/gptq_utils.py: get_dynamic_override): the first pattern that matches from the start."""
    for pattern, change in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return 16 if pattern.startswith("-:") else change["bits"]
    bits: int = config["bits"]
    return bits


@pytest.mark.parametrize(
    "name",
    ["gptq-w4g32", "gptq-w4g32+attention=8", "gptq-w8g64+layers.1=16", "gptq-w4g32:experts", "gptq-w4g32+layers.0=8"],
)
def test_engines_find_the_width_of_every_linear(name: str, source: Path) -> None:
    from gptqmodel import QuantizeConfig

    checkpoint, fmt = Checkpoint(source), parse(name)
    config = quantization_config.for_gptq(fmt, linears(checkpoint, fmt))
    library = QuantizeConfig(bits=config["bits"], group_size=config["group_size"], dynamic=config.get("dynamic"))
    for item in stored(fmt, checkpoint.spec):
        if item.tensor.role not in ("expert", "attention", "router") or item.tensor.name.endswith("norm.weight"):
            continue
        module, bits = item.tensor.module, item.format.bits if item.format else 16
        theirs = library.dynamic_get(module)
        assert (16 if theirs is False else library.dynamic_get(module, "bits", config["bits"])) == bits, module
        fused = module.rsplit(".", 2)[0] if item.tensor.role == "expert" else re.sub(r"[qkv]_proj", "qkv_proj", module)
        assert matched(config, module) == matched(config, fused) == bits, fused


def test_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match="GPTQModel does not write ct-w4g32"):
        gptq.quantize(source, tmp_path / "out", parse("ct-w4g32"), TOKENS, Silent())
    folder = packed.make_small(tmp_path / "narrow", moe_intermediate_size=96, num_hidden_layers=1)
    with pytest.raises(ReapcError, match="do not divide into groups of 64") as error:
        gptq.quantize(folder, tmp_path / "out", parse("gptq-w4g64"), TOKENS, Silent())
    assert "groups of 32" in error.value.hint
    folder = packed.make_small(tmp_path / "odd", intermediate_size=128, num_attention_heads=4, head_dim=12)
    with pytest.raises(ReapcError, match=r"groups of 32|multiples of 32"):
        gptq.quantize(folder, tmp_path / "out", parse("gptq-w4g32"), TOKENS, Silent())
    config = source.parent / "quantized"
    config.mkdir()
    (config / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ReapcError, match=r"quantization_config: this checkpoint is quantized already \(awq"):
        gptq.quantize(config, tmp_path / "out", parse("gptq-w4g32"), TOKENS, Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("group", weights.GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_width_and_group_is_written(bits: int, group: int, source: Path, tmp_path: Path) -> None:
    fmt = parse(f"gptq-w{bits}g{group}")
    gptq.quantize(source, tmp_path / "out", fmt, TOKENS, Silent(), threads=2)
    packed.check_against_source(source, tmp_path / "out", fmt)
    assert packed.tensor_bytes(tmp_path / "out") == weights.checkpoint_bytes(fmt, Checkpoint(source).spec)


@pytest.mark.slow
def test_parts_that_the_library_does_not_know_are_no_silent_16_bit(tmp_path: Path) -> None:
    """GPTQModel 7.6 names no dense layers of Qwen3-MoE: it leaves them alone, and says nothing."""
    source = packed.make_small(tmp_path / "model", mlp_only_layers=[1])
    with pytest.raises(CannotBeDone, match=r"layers\.1\.mlp\.\w+_proj\.qweight: it was left unquantized"):
        gptq.quantize(source, tmp_path / "out", parse("gptq-w4g32"), TOKENS, Silent(), threads=2)
    assert not (tmp_path / "out").exists()
    gptq.quantize(source, tmp_path / "out", parse("gptq-w4g32+dense=16"), TOKENS, Silent(), threads=2)
    packed.check_against_source(source, tmp_path / "out", parse("gptq-w4g32+dense=16"))


@pytest.mark.slow
def test_all_tokens_for_every_expert_starve_none(source: Path, tmp_path: Path) -> None:
    facts = gptq.quantize(source, tmp_path / "out", parse("gptq-w4g32"), TOKENS, Silent(), all_experts=True, threads=2)
    assert facts["fallback"]["count"] == 0
    packed.check_against_source(source, tmp_path / "out", parse("gptq-w4g32"))
