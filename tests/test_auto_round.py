"""AutoRound on small real checkpoints: what is published, what is refused, and that it resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import packed
import psutil
import pytest
import torch
from conftest import make_tokens
from packed import Counting, parse

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights, writers
from reapc.formats.layout import stored
from reapc.formats.writers import WRITERS, Writer
from reapc.observe.scores import Scores
from reapc.progress import Silent
from reapc.quantize import auto_round, quantization_config, worker
from reapc.quantize.published import linears, publish
from reapc.quantize.starved import STARVED_SHARE, starved

GROUPED = [name for name in weights.names() if re.match(r"(auto-round|ct|gptq)-", name)]
TOKENS = make_tokens(12, 32, padded=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.make_small(tmp_path_factory.mktemp("small") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Counting]:
    out, progress = tmp_path_factory.mktemp("mixed") / "model", Counting()
    facts = auto_round.quantize(source, out, parse(MIXED), TOKENS, progress, iters=2, threads=2)
    return out, facts, progress


MIXED = "auto-round-w4g32+attention=8+layers.1=3"


def test_what_is_published(source: Path, mixed: tuple[Path, dict[str, Any], Counting]) -> None:
    out, facts, progress = mixed
    fmt, spec = parse(MIXED), Checkpoint(source).spec
    assert packed.tensor_bytes(out) == weights.checkpoint_bytes(fmt, spec)
    packed.check_against_source(source, out, fmt)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert {name: value for name, value in ours.items() if name != "quantization_config"} == theirs
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    assert (out / "notes.txt").read_text() == "kept as it is\n"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(packed.tensors(out))
    assert index["metadata"]["total_size"] == packed.tensor_bytes(out)
    text = "".join(path.read_text() for path in out.glob("*.json"))
    assert str(out.parent) not in text
    assert "/tmp" not in text
    assert [path.name for path in out.parent.iterdir()] == ["model"]  # nothing of the work is left
    assert progress.done == [(f"AutoRound to {MIXED}", 1, 2)] * 2
    assert facts["settings"]["tokens"] == TOKENS.count
    assert facts["quantized"] == 2 * (4 + 5 * 3)


def test_it_reloads_and_stands_for_what_is_packed(
    source: Path, mixed: tuple[Path, dict[str, Any], Counting], tmp_path: Path
) -> None:
    ids = make_tokens(4, 24, seed=3).input_ids
    loaded, rounding = packed.reload_kl(source, mixed[0], parse(MIXED), ids, tmp_path)
    assert loaded < 0.3 * rounding  # the loader computes in bfloat16


def test_engines_find_the_width_of_every_linear(source: Path) -> None:
    checkpoint = Checkpoint(source)
    for name in (MIXED, "auto-round-w4g32:experts", "auto-round-w8g32+layers.1=16", "auto-round-w2g64+attention=16"):
        fmt = parse(name)
        config = quantization_config.for_auto_round(fmt, linears(checkpoint, fmt), "model.layers")
        extra = config.get("extra_config", {})
        for item in stored(fmt, checkpoint.spec):
            if item.tensor.role not in ("expert", "attention", "router"):
                continue
            bits = item.format.bits if item.format else 16
            assert extra.get(item.tensor.module, config).get("bits") == bits
            if item.tensor.role == "expert":  # vLLM asks for all experts of a layer at once
                experts = item.tensor.module.rsplit(".", 2)[0]
                assert extra.get(experts, config).get("bits") == bits


def test_compressed_tensors_own_rules_find_the_width_of_every_linear(source: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    checkpoint = Checkpoint(source)
    linear = torch.nn.Linear(1, 1)
    for name in ("ct-w4g32", "ct-w4g32:experts", "ct-w4g32+attention=8", "ct-w3g64+layers.0=8+attention=2+layers.1=16"):
        fmt = parse(name)
        found = quantization_config.for_compressed_tensors(fmt, linears(checkpoint, fmt))
        config = QuantizationConfig.model_validate(found)
        widths: dict[str, int] = {}
        for group in config.config_groups.values():
            assert group.weights is not None
            assert (group.weights.group_size, group.weights.symmetric) == (fmt.group_size, True)
            for target in group.targets:
                widths[target] = group.weights.num_bits
        for item in stored(fmt, checkpoint.spec):
            if item.tensor.role not in ("expert", "attention", "router", "lm_head"):
                continue
            module = item.tensor.module
            ignored = bool(match_targets(module, linear, config.ignore))
            assert ignored == (item.format is None), module
            if item.format is not None:
                assert widths[match_targets(module, linear, widths)[0]] == item.format.bits, module


def test_one_table_says_what_is_written(source: Path, tmp_path: Path) -> None:
    unwritten = {name for name in GROUPED if writers.why_not(parse(name))}
    assert unwritten == {f"auto-round-w{bits}g{group}" for bits in (5, 6, 7) for group in weights.GROUPS}
    with pytest.raises(ReapcError, match="has no 6 bits") as error:
        auto_round.quantize(source, tmp_path / "out", parse("auto-round-w4g32+layers.1=6"), TOKENS, Silent())
    assert "ct-w6g32" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("auto-round-w4g32", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(gptq"),
        ("ct-w4g128", {}, "do not divide into groups of 128"),
        ("fp8", {}, "AutoRound does not write fp8"),
    ],
)
def test_refused(name: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = packed.make_small(tmp_path / "model", moe_intermediate_size=64, num_hidden_layers=1)
    config = folder / "config.json"
    if change:  # a quantized checkpoint has other tensors: that is not what the message is to be about
        packed.save_file({"model.norm.weight": torch.zeros(128)}, folder / "model.safetensors")
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ReapcError, match=words) as error:
        auto_round.quantize(folder, tmp_path / "out", parse(name), TOKENS, Silent())
    assert error.value.exit_code == 2
    if "g128" in name:
        assert "groups of 32 or 64" in error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_not_touched(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match="exists already"):
        auto_round.quantize(source, tmp_path, parse("ct-w4g32"), TOKENS, Silent())


def test_a_damaged_result_is_not_published(
    source: Path, mixed: tuple[Path, dict[str, Any], Counting], tmp_path: Path
) -> None:
    checkpoint, fmt = Checkpoint(source), parse(MIXED)
    modules = linears(checkpoint, fmt)
    good = {
        name: torch.tensor(value, dtype=torch.float16 if value.dtype == np.float32 else None)
        for name, value in packed.tensors(mixed[0]).items()
    }
    first = "model.layers.0.mlp.experts.3.up_proj"
    damages: list[tuple[dict[str, Any], str]] = [
        ({f"{first}.scales": torch.full_like(good[f"{first}.scales"], float("nan"))}, "no numbers"),
        ({f"{first}.qweight": good[f"{first}.qweight"][:1]}, r"I32 \[16, 128\] was planned"),
        ({f"{first}.qweight": None}, "not in its output"),
        ({f"{first}.qweight": None, f"{first}.weight": torch.zeros(1)}, "left unquantized"),
    ]
    for i, (change, words) in enumerate(damages):
        raw = tmp_path / f"raw{i}"
        raw.mkdir()
        changed = {name: value.contiguous() for name, value in {**good, **change}.items() if value is not None}
        packed.save_file(changed, raw / "model.safetensors")
        with pytest.raises(CannotBeDone, match=words):
            publish(checkpoint, raw, tmp_path / f"out{i}", modules, {})


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        auto_round.quantize(
            source, tmp_path / "out", parse("ct-w4g64"), TOKENS, Counting(KeyboardInterrupt), iters=0, threads=2
        )
    assert not list(tmp_path.iterdir())
    running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in running if "_auto_round_main.py" in " ".join(child.cmdline())]


def test_a_failing_quantizer_says_its_last_words(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "batch_rows", lambda tokens: -1)
    with pytest.raises(CannotBeDone, match=r"AutoRound to ct-w4g64 failed \(exit 1\)(.|\n)*Error"):
        auto_round.quantize(source, tmp_path / "out", parse("ct-w4g64"), TOKENS, Silent(), iters=1, threads=2)
    assert not list(tmp_path.iterdir())


def test_needed_bytes_grow_with_the_experts(source: Path) -> None:
    spec = Checkpoint(source).spec
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for tool, most in (("auto-round", 7), ("gptqmodel", 4)):
        needed = worker.needed_bytes(spec, tool)
        assert size <= needed - worker._LOADED_BYTES <= most * size
        more = worker.needed_bytes(spec.with_experts(50), tool)
        assert more > needed + 9 * 2 * spec.expert_weights


def test_starved_experts_are_named() -> None:
    routed = {0: [500, 4, 0, 496], 2: [250, 250, 5, 495]}
    header = {"layers": [0, 2], "tokens": 1000}
    names = ("gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
    arrays = {f"layers.{i}.routed_tokens": np.array(values, float) for i, values in routed.items()}
    arrays |= {f"layers.{i}.{name}": np.ones(4) for i in routed for name in names}
    found = starved(Scores(header, arrays))
    assert found["layers"] == {"0": {"1": 4, "2": 0}}  # 5 of 1000 is the threshold itself
    assert (found["count"], found["experts"], found["fewest"]) == (2, 8, 0)
    assert "2 of 8 experts saw fewer than 5 of the 1000" in found["summary"]
    assert "0.2 (0), 0.1 (4)" in found["summary"]
    assert starved(Scores(header, arrays), share=STARVED_SHARE / 100)["layers"] == {"0": {"2": 0}}
    arrays["layers.0.routed_tokens"] = np.full(4, 250.0)
    assert starved(Scores(header, arrays))["summary"].startswith("every expert saw")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GROUPED if not writers.why_not(parse(name))])
def test_every_width_and_group_is_written(name: str, source: Path, tmp_path: Path) -> None:
    fmt = parse(name)
    auto_round.quantize(source, tmp_path / "out", fmt, TOKENS, Silent(), iters=0, threads=2)
    packed.check_against_source(source, tmp_path / "out", fmt)
    assert packed.tensor_bytes(tmp_path / "out") == weights.checkpoint_bytes(fmt, Checkpoint(source).spec)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_the_table_leaves_out_what_the_library_cannot(
    bits: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITERS, "auto-round", (Writer("auto-round", "auto_round", tuple(range(2, 9))),))
    with pytest.raises(CannotBeDone, match=f"got bits={bits}"):
        auto_round.quantize(source, tmp_path / "out", parse(f"auto-round-w{bits}g32"), TOKENS, Silent(), iters=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ct-w4g32", "ct-w3g128+attention=8", "ct-w5g32:experts", "gptq-w4g64"])
def test_other_layouts_reload(name: str, source: Path, tmp_path: Path) -> None:
    fmt, ids = parse(name), make_tokens(4, 24, seed=3).input_ids
    auto_round.quantize(source, tmp_path / "out", fmt, TOKENS, Silent(), iters=1, threads=2)
    loaded, rounding = packed.reload_kl(source, tmp_path / "out", fmt, ids, tmp_path)
    assert loaded < 0.3 * rounding


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    fmt = parse("auto-round-w3g64")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        auto_round.quantize(source, tmp_path / name, fmt, TOKENS, Silent(), iters=4, seed=seed, threads=2)
    first, second, other = (packed.tensors(tmp_path / name) for name in "abc")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_it_resumes_after_the_last_finished_layer(source: Path, tmp_path: Path) -> None:
    fmt, scratch = parse("auto-round-w4g32"), tmp_path / "scratch"
    progress = Counting(KeyboardInterrupt)  # when the first layer is done
    with pytest.raises(KeyboardInterrupt):
        auto_round.quantize(source, tmp_path / "out", fmt, TOKENS, progress, iters=2, threads=2, scratch=scratch)
    assert scratch.is_dir()
    assert not (tmp_path / "out").exists()
    facts = auto_round.quantize(source, tmp_path / "out", fmt, TOKENS, Silent(), iters=2, threads=2, scratch=scratch)
    assert facts["resumed_layers"] == 1
    assert not scratch.exists()
    packed.check_against_source(source, tmp_path / "out", fmt)
    # another request does not take over what this one left
    with pytest.raises(KeyboardInterrupt):
        auto_round.quantize(source, tmp_path / "new", fmt, TOKENS, progress, iters=2, threads=2, scratch=scratch)
    facts = auto_round.quantize(source, tmp_path / "new", fmt, TOKENS, Silent(), iters=3, threads=2, scratch=scratch)
    assert facts["resumed_layers"] == 0
