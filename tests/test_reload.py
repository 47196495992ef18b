"""The strict reload: what passes it is what was planned, and every way to be something else is an error by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from quantized_models import changed, fmt, kl, library, quantized, same_as_library, source, streamed
from safetensors.torch import load_file

from reapc.checkpoint.reader import Checkpoint
from reapc.cli.progress import make_progress
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.quantize import fp8
from reapc.verify.quantized import check_quantized, error_bound

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
EXPERT = "model.layers.1.mlp.experts.3.down_proj"
OTHER = "model.layers.1.mlp.experts.4.down_proj"
ROUTER = "model.layers.0.mlp.gate"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(source(tmp_path_factory.mktemp("reload") / "source"))


@pytest.fixture(scope="module")
def gptq(original: Checkpoint) -> Path:
    """The model by GPTQModel, through reapc's driver."""
    return quantized(original.folder, original.folder.parent / "gptq", "gptq-w4g32")


@pytest.fixture(scope="module")
def blocks(original: Checkpoint) -> Path:
    return quantized(original.folder, original.folder.parent / "blocks", "fp8-block")


@pytest.fixture(scope="module")
def channels(original: Checkpoint) -> Path:
    return quantized(original.folder, original.folder.parent / "channels", "fp8")


@pytest.mark.parametrize(("name", "form"), [("gptq", "gptq-w4g32"), ("blocks", "fp8-block"), ("channels", "fp8")])
def test_what_was_planned_passes(name: str, form: str, original: Checkpoint, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    report = check_quantized(folder, fmt(form), original.spec, original=original, progress=make_progress())
    assert report.bytes == weights.checkpoint_bytes(fmt(form), original.spec)
    assert report.tensors == len(load_file(folder / "model.safetensors"))
    bits = fmt(form).bits
    assert report.roles["expert"].quantized == {bits: 2 * 6 * 3}
    assert report.roles["attention"].quantized == {bits: 2 * 4}
    assert report.roles["router"].kept == 2
    assert report.roles["lm_head"].kept == 1
    assert not report.roles["router"].quantized
    errors = report.roles["expert"]
    assert 0 < float(errors.mean_error or 0) <= float(errors.largest_error or 0) < error_bound(fmt(form).method, bits)
    assert json.loads(json.dumps(report.to_json()))["roles"]["expert"]["quantized"] == {str(bits): 36}
    alone = check_quantized(folder, fmt(form), original.spec)
    assert not alone.compared
    assert alone.roles["expert"].mean_error is None


def test_transformers_alone_reads_random_experts_of_gptq(original: Checkpoint, gptq: Path, tmp_path: Path) -> None:
    """GPTQModel's own reload has the weights that are decoded here, bit for bit (it rounds them to float16). The same
    files opened with transformers alone have random experts, and its loading info says so where nobody looks."""
    plain, theirs = library([("plain", gptq), ("gptqmodel", gptq)], tmp_path)
    checkpoint = Checkpoint(gptq)
    assert same_as_library(checkpoint, theirs) == 2 * (4 + 6 * 3)
    ours = streamed(checkpoint, tmp_path / "ours")
    lost = kl(streamed(original, tmp_path / "original"), ours)
    assert kl(ours, theirs["log_probs"]) < lost / 50  # it computes in float16
    assert int(plain["missing"]) == 2 * 2  # gate_up_proj and down_proj of both layers
    assert kl(ours, plain["log_probs"]) > 2 * lost
    for expert in (EXPERT, OTHER):
        was = original.tensor(f"{expert}.weight").float()
        assert float((plain[expert] - was).norm() / was.norm()) > 1
        assert float((checkpoint.tensor(f"{expert}.weight") - was).norm() / was.norm()) < error_bound("gptq", 4)


def lose(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def keep_an_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{EXPERT}.{part}"]
    tensors[f"{EXPERT}.weight"] = torch.zeros(64, 32, dtype=torch.bfloat16)


def keep_an_expert_and_say_so(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    keep_an_expert(tensors, config)
    config["quantization_config"]["dynamic"] = {f"-:{EXPERT}": {}}


def add_a_key(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.extra"] = torch.zeros(3)


def quantize_the_router(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{ROUTER}.weight"]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"{ROUTER}.{part}"] = tensors["model.layers.0.mlp.experts.0.gate_proj." + part].clone()


def swap_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for part in ("qweight", "qzeros", "scales"):
        first, second = f"{EXPERT}.{part}", f"{OTHER}.{part}"
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def random_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = f"{EXPERT}.qweight"
    tensors[name] = torch.randint(-(2**31), 2**31, tensors[name].shape, dtype=torch.int64).int()


def change_the_router(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{ROUTER}.weight"][0, 0] += 1


def shift_zeros(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}.qzeros"] += 0x11111111


def reorder(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.experts.0.up_proj.g_idx"] = torch.arange(64, dtype=torch.int32) % 2


def empty(value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{EXPERT}.scales"].fill_(value)

    return change


def one_dead_group(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}.scales"][0, 5] = 0


def say(**changes: Any) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"].update(changes)

    return change


def say_nothing(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose(f"{EXPERT}.scales"), f"1 missing: '{EXPERT}.scales'"),
        (lose("model.norm.weight"), "1 missing: 'model.norm.weight'"),
        (keep_an_expert, f"4 missing: '{EXPERT}.qweight', '{EXPERT}.qzeros', '{EXPERT}.scales' and 1 more; 1 unex"),
        (keep_an_expert_and_say_so, f"1 unexpected: '{EXPERT}.weight'"),
        (add_a_key, "1 unexpected: 'model.extra'"),
        (quantize_the_router, f"1 missing: '{ROUTER}.weight'; 4 unexpected: '{ROUTER}."),
        (swap_experts, f"{EXPERT}.weight: off by 1."),
        (random_expert, f"{EXPERT}.weight: off by "),
        (change_the_router, f"{ROUTER}.weight: not the original's weights"),
        (shift_zeros, f"{EXPERT}.qzeros: not 8 throughout"),
        (reorder, "experts.0.up_proj.g_idx: columns out of order"),
        (empty(0.0), f"{EXPERT}.weight: off by 1.000"),
        (empty(float("nan")), f"{EXPERT}.weight: NaN or infinite weights"),
        (one_dead_group, f"{EXPERT}.weight: a scale is zero where the weights are not"),
        (say(sym=False), "gptq 4 bits, asymmetric, groups of 32, gptq 4 bits, groups of 32 was planned"),
        (say(desc_act=True), "gptq 4 bits, act-order"),
        (say(checkpoint_format="gptq_v2"), "was planned"),
        (say(dynamic={r"+:.*\.experts$": {"bits": 8}}), "mlp.experts (the name that vLLM asks about): gptq 8 bits"),
        (say_nothing, "config.json: no quantization_config"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(change: Change, words: str, original: Checkpoint, gptq: Path, tmp_path: Path) -> None:
    folder = changed(gptq, tmp_path / "changed", change)
    with pytest.raises(ReapcError) as error:
        check_quantized(folder, fmt("gptq-w4g32"), original.spec, original=original)
    assert words in str(error.value)
    assert str(folder) in str(error.value)


def test_zeros_are_seen_without_the_original(original: Checkpoint, gptq: Path, tmp_path: Path) -> None:
    folder = changed(gptq, tmp_path / "changed", empty(0.0))
    with pytest.raises(CannotBeDone, match=f"{EXPERT}.weight: nothing but zeros"):
        check_quantized(folder, fmt("gptq-w4g32"), original.spec)


@pytest.mark.parametrize("form", ["gptq-w8g32", "gptq-w4g64", "gptq-w4g32+layers.0=8", "gptq-w4g32:experts", "fp8"])
def test_another_format_than_planned(form: str, original: Checkpoint, gptq: Path) -> None:
    with pytest.raises(CannotBeDone, match=r"not the tensors of|not as planned"):
        check_quantized(gptq, fmt(form), original.spec)


@pytest.mark.parametrize(
    ("name", "form", "key"), [("blocks", "fp8-block", "modules_to_not_convert"), ("channels", "fp8", "ignore")]
)
@pytest.mark.parametrize("module", [ROUTER, "lm_head"])
def test_what_an_engine_would_quantize(
    name: str, form: str, key: str, module: str, original: Checkpoint, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    ignored = [m for m in Checkpoint(folder).config["quantization_config"][key] if m != module]
    wrong = changed(folder, tmp_path / "changed", say(**{key: ignored}))
    with pytest.raises(CannotBeDone, match=f"{module}: .*8 bits"):
        check_quantized(wrong, fmt(form), original.spec, original=original)


def test_a_tied_head_is_named_too(tmp_path: Path) -> None:
    """It is not on disk, but engines have a module of its name, which they would look for in pieces."""
    checkpoint = Checkpoint(make_model(tmp_path / "tied", dtype=torch.bfloat16))
    folder = tmp_path / "fp8"
    fp8.quantize(checkpoint.folder, folder, fmt("fp8"), make_progress())
    report = check_quantized(folder, fmt("fp8"), checkpoint.spec, original=checkpoint)
    assert report.roles["dense_mlp"].quantized == {8: 3}
    ignored = [m for m in Checkpoint(folder).config["quantization_config"]["ignore"] if m != "lm_head"]
    wrong = changed(folder, tmp_path / "changed", say(ignore=ignored))
    with pytest.raises(CannotBeDone, match="lm_head: vLLM would take it to be quantized"):
        check_quantized(wrong, fmt("fp8"), checkpoint.spec)


def test_a_tensor_beside_the_model_must_be_the_sources(original: Checkpoint, tmp_path: Path) -> None:
    """What config.json does not name (a vision tower, say) passes where the source has it too, and is compared."""

    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["tower.weight"] = torch.arange(4.0)

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["tower.weight"][2] += 1

    with_tower = Checkpoint(changed(original.folder, tmp_path / "source", add))
    fp8.quantize(with_tower.folder, tmp_path / "fp8", fmt("fp8"), make_progress())
    check_quantized(tmp_path / "fp8", fmt("fp8"), with_tower.spec, original=with_tower)
    with pytest.raises(CannotBeDone, match=r"unexpected: 'tower\.weight'"):
        check_quantized(tmp_path / "fp8", fmt("fp8"), original.spec, original=original)
    wrong = changed(tmp_path / "fp8", tmp_path / "changed", change)
    with pytest.raises(CannotBeDone, match=r"tower\.weight: not the original's weights"):
        check_quantized(wrong, fmt("fp8"), with_tower.spec, original=with_tower)


def test_bounds_tell_a_quantized_weight_from_a_wrong_one() -> None:
    bounds = [error_bound("gptq", bits) for bits in range(8, 1, -1)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 1  # a random or a swapped weight is off by its own size at least
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    for bits in range(2, 9):  # rounding to nearest, the crudest of quantizers
        groups = weight.reshape(256, -1, 128)
        step = groups.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
        rounded = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        assert float((rounded - groups).norm() / weight.norm()) < error_bound("ct", bits)


def test_a_plain_format_has_nothing_to_check(original: Checkpoint) -> None:
    with pytest.raises(ReapcError, match="bf16 is not a quantized format"):
        check_quantized(original.folder, fmt("bf16"), original.spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "export", "kind"),
    [
        ("auto-round-w4g32", None, "transformers"),
        ("auto-round-w2g32:experts", None, "transformers"),
        ("auto-round-w3g32+attention=8+layers.1=4", None, "transformers"),
        ("ct-w4g32+attention=8", None, "transformers"),
        ("ct-w3g32+attention=16", None, "transformers"),
        ("ct-w5g32", None, ""),
        ("ct-w4g32+layers.1=8", None, ""),  # transformers 5.23 reads all experts in the width of the first group
        ("gptq-w4g32+attention=8", "auto_gptq", "gptqmodel"),
        ("gptq-w8g32", None, "gptqmodel"),
    ],
)
def test_every_driver(form: str, export: str | None, kind: str, original: Checkpoint, tmp_path: Path) -> None:
    folder = quantized(original.folder, tmp_path / "out", form, export=export)
    report = check_quantized(folder, fmt(form), original.spec, original=original)
    assert report.bytes == weights.checkpoint_bytes(fmt(form), original.spec)
    if not kind:
        return
    (theirs,) = library([(kind, folder)], tmp_path)
    checkpoint = Checkpoint(folder)
    assert same_as_library(checkpoint, theirs) == len(checkpoint.packed)
    ours = streamed(checkpoint, tmp_path / "ours")
    lost = kl(streamed(original, tmp_path / "original"), ours)
    assert kl(ours, theirs["log_probs"]) < max(lost / 20, 1e-3)  # GPTQModel computes in float16: 5e-4 on this model
