"""Joint allocation for vLLM: exact bytes of mixed checkpoints, probes against written folders, budgets of every card,
the KV cache, builds and commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_glm4, make_model, make_project, make_tokens, run_main
from specs import demo_spec, qwen30b

from reapc.allocate.checkpoints import (
    decide_methods,
    measured_checkpoints,
    prior_checkpoints,
    probed_parts,
    within,
)
from reapc.allocate.masks import by_criterion, by_measuring
from reapc.allocate.on_target import OnTarget
from reapc.allocate.record import read_allocation
from reapc.allocate.streamed import StreamedProber
from reapc.allocate.unit_rounding import measure_unit_errors
from reapc.arch import ModelSpec, known
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.measure import Choice
from reapc.engines import vllm
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import layout, weights
from reapc.formats.weights import WeightFormat
from reapc.observe.observe import observe
from reapc.observe.scores import Scores
from reapc.planner.cards import Cards
from reapc.planner.checkpoint_units import KEPT, CheckpointParts, checkpoint_parts, stored_as
from reapc.planner.devices import Devices, Taken
from reapc.progress import Silent
from reapc.prune.criteria import choose, share_without
from reapc.prune.rewrite import prune
from reapc.quantize import fp8
from reapc.quantize.nearest import rounded
from reapc.recipe import ServeSection, load_recipe
from reapc.stream.tokens import Tokens, read_tokens, write_tokens
from reapc.target import Target, load_target, make_target
from reapc.verify.fidelity import compare

COUNTS = (12, 11, 10, 9, 8, 7, 6)


def plain(method: str) -> list[WeightFormat]:
    if method.startswith("fp8"):
        return [weights.plain(method, 8, 128 if method == "fp8-block" else 0)]
    widths = (8, 4) if method == "gptq" else (8, 4, 3)
    return [weights.plain(method, bits, group) for bits in widths for group in (32, 64)]


def parts_of(spec: ModelSpec, method: str, mtp: bool = False) -> CheckpointParts:
    return checkpoint_parts(spec, method, plain(method), lambda fmt, group: None, mtp)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("units") / "model"
    changes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32}
    return Checkpoint(make_model(folder, dtype=torch.bfloat16, initializer_range=0.1, **changes))


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return make_tokens(6, 40)


@pytest.fixture(scope="module")
def scores(checkpoint: Checkpoint, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return observe(checkpoint, tokens, tmp_path_factory.mktemp("observed") / "work", Silent())


@pytest.mark.parametrize("method", ["ct", "auto-round", "gptq", "fp8", "fp8-block"])
@pytest.mark.parametrize("model", ["demo", "glm-4.5-air", "glm-5"])
def test_bytes_and_widths_are_those_of_the_checkpoint(model: str, method: str) -> None:
    """A random choice for every unit: its format's name says all of it, and the checkpoint has just those bytes."""
    spec = demo_spec() if model == "demo" else known.spec(known.find(model))
    parts = parts_of(spec, method, mtp=bool(spec.mtp_layers))
    random = np.random.default_rng(0)
    types = {unit.name: str(random.choice(unit.types)) for unit in parts.groups}
    fmt = weights.parse(parts.format(types).name)
    assert fmt == parts.format(types)
    count = spec.num_experts - 2
    pruned = spec.with_experts(count)
    assert parts.bytes_of(types, count) == weights.checkpoint_bytes(fmt, pruned, mtp=parts.mtp)
    by_unit = {(unit.layer, group.name): types[unit.name] for unit in parts.groups for group in unit.groups}
    size = 0
    for item in layout.stored(fmt, pruned):
        if item.group.linears:
            name = item.tensor.name.removeprefix(f"{spec.layers[item.tensor.layer].prefix}.")
            option = by_unit[item.tensor.layer, item.group.name]
            assert (item.format.name if item.format else KEPT) == option, name
    if model == "demo":
        size = sum(item.bytes for item in layout.expected_tensors(fmt, pruned).values())
        assert size == parts.bytes_of(types, count)
    table = parts.table([count], parts.types())[0]
    chosen = [parts.types().index(types[unit.name]) for unit in parts.groups]
    assert int(table[np.arange(len(chosen)), chosen].sum()) + parts.kept_bytes(count) == parts.bytes_of(types, count)


def test_what_is_kept_everywhere_is_bf16() -> None:
    parts = parts_of(demo_spec(), "ct")
    assert parts.format({unit.name: KEPT for unit in parts.groups}).name == "bf16"
    assert weights.checkpoint_bytes(parts.unquantized, demo_spec()) == weights.checkpoint_bytes(
        stored_as(KEPT), demo_spec()
    )


def test_rounding_is_what_the_format_can_hold() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    errors = {}
    for name in ("ct-w8g32", "ct-w4g32", "ct-w4g128", "ct-w3g32", "ct-w2g32", "fp8"):
        fmt = weights.parse(name)
        found = rounded(weight, fmt)
        errors[name] = float((found - weight.float()).square().sum() / weight.float().square().sum())
        if fmt.method == "ct":
            groups = found.reshape(64, -1, fmt.group_size)
            assert max(len(torch.unique(group)) for row in groups for group in row) <= 1 << fmt.bits
            furthest = weight.float().reshape(64, -1, fmt.group_size).abs().amax(-1)
            torch.testing.assert_close(groups.abs().amax(-1), furthest, rtol=2e-3, atol=1e-6)
    assert errors["ct-w8g32"] < errors["fp8"] < errors["ct-w4g32"] < errors["ct-w4g128"] < errors["ct-w3g32"]
    assert errors["ct-w3g32"] < errors["ct-w2g32"] < 0.5
    assert torch.equal(rounded(torch.zeros(32, 64), weights.parse("ct-w4g32")), torch.zeros(32, 64))


def test_a_probe_is_the_model_that_would_be_written(
    checkpoint: Checkpoint, tokens: Tokens, scores: Scores, tmp_path: Path
) -> None:
    """KL of the streamed variants against that of folders: FP8 in a part, and FP8 of the pruned model."""
    parts = parts_of(checkpoint.spec, "fp8-block")
    prober = StreamedProber(checkpoint, parts, tokens, tmp_path / "probes", Silent())
    experts = {unit.name: "fp8-block" if unit.part == "experts" else KEPT for unit in parts.groups}
    every = {unit.name: "fp8-block" for unit in parts.groups}
    kept = choose(scores, "reap", 8)
    found = prober.kls({"experts": (experts, None), "pruned": (every, kept), "nothing": ({}, None)})
    fp8.quantize(checkpoint.folder, tmp_path / "experts", parts.format(experts), Silent())
    prune(checkpoint, kept, tmp_path / "eight", Silent())
    fp8.quantize(tmp_path / "eight", tmp_path / "pruned", parts.format(every), Silent())
    for name in ("experts", "pruned"):
        kl = compare(checkpoint.folder, tmp_path / name, tokens, Silent()).kl
        assert found[name] == pytest.approx(kl, rel=1e-3)
        assert kl > 1e-6
    assert found["nothing"] == pytest.approx(0, abs=1e-9)
    weight = Checkpoint(tmp_path / "experts").tensor("model.layers.2.mlp.experts.3.up_proj.weight")
    original = checkpoint.tensor("model.layers.2.mlp.experts.3.up_proj.weight")
    assert torch.equal(weight, rounded(original, stored_as("fp8-block")))


def test_errors_are_weighed_by_inputs_and_experts(checkpoint: Checkpoint, scores: Scores) -> None:
    every = [parts_of(checkpoint.spec, method) for method in ("ct", "fp8")]
    errors = measure_unit_errors(checkpoint, every, scores, Silent())
    experts = errors["layers.2.experts"]
    assert set(experts.errors) == {*(fmt.name for fmt in plain("ct")), "fp8", KEPT}
    assert experts.weights.sum() == pytest.approx(1)
    assert experts.relative(KEPT) == 0
    assert experts.relative("ct-w8g32") < experts.relative("ct-w4g32") < experts.relative("ct-w4g64")
    # one expert by hand: the mean over its three matrices
    expert, fmt = int(experts.weights.argmax()), stored_as("ct-w4g32")
    shares = []
    for name, key in (("gate_proj", "gate_up"), ("up_proj", "gate_up"), ("down_proj", "down")):
        weight = checkpoint.tensor(f"model.layers.2.mlp.experts.{expert}.{name}.weight").double()[::2]
        moments = torch.from_numpy(scores.total(f"second_moment.layers.2.experts.{key}")[expert])
        lost = ((weight - rounded(weight, fmt)).square() @ moments).sum() / (weight.square() @ moments).sum()
        shares.append(float(lost))
    assert experts.errors["ct-w4g32"][expert] == pytest.approx(np.mean(shares), rel=1e-4)
    without = Scores(scores.header, {k: v for k, v in scores.arrays.items() if not k.startswith("second_moment.")})
    with pytest.raises(ReapcError, match="no second moments"):
        measure_unit_errors(checkpoint, every, without, Silent())


def asked(model: str, target: str, **serve: object) -> OnTarget:
    section = ServeSection.model_validate({"engine": "vllm", **serve})
    return OnTarget(model, known.spec(known.find(model)), load_target(target), section, 0.5, False)


@pytest.mark.parametrize(
    ("model", "target", "serve"),
    [
        ("glm-5", "h100x8", {}),
        ("glm-5", "h100x4", {"kv_cache": "auto", "context": 32768}),
        ("glm-4.5-air", "rtx3090x4", {}),
        ("Qwen/Qwen3-30B-A3B", "rtx4090", {"kv_cache": "auto", "context": 32768}),
    ],
)
def test_every_card_holds_what_it_was_given(model: str, target: str, serve: dict[str, object]) -> None:
    """Tensor, pipeline and expert parallel: the solver's bytes are those of the engine's own sum, and the choice is no
    worse than the uniform one in the same method."""
    made = asked(model, target, **serve)
    cards = Cards(made.plan, made.question)
    every = cards.methods()
    assert {parts.method for parts in every} >= {"ct", "gptq", "auto-round"}
    best, (found, taken, _), losses = decide_methods(
        prior_checkpoints(made.question.spec, every, made.question.counts), within(cards)
    )
    parts = best.parts
    assert isinstance(parts, CheckpointParts)
    assert parts.method == min(losses, key=lambda method: losses[method])
    types = {u.name: best.types[o] for u, o in zip(parts.groups, taken.options, strict=True)}
    plan = cards.planned(made.plan, parts, Taken(types, taken.experts, taken.kv, taken.damage, 4.0))
    devices = plan.chosen.placement.devices
    assert all(device.free_bytes >= 0 for device in devices)
    problem = cards.budgets(best.problem(0), parts, best.types)
    stages = devices[:: cards.layout.tp][: cards.layout.pp]
    free = problem.capacity[taken.case] - taken.device_bytes
    assert [device.free_bytes for device in stages] == free.tolist()
    assert plan.chosen.kv_dtype == taken.kv
    assert plan.chosen.weights_bytes == parts.bytes_of(types, taken.experts)
    assert plan.chosen.format.startswith(f"mix of {parts.method} widths, ")
    assert found.best.damage <= made.plan.chosen.predicted_loss * 1.02
    assert found.relative_gap < 1e-2


def test_the_cache_is_chosen_where_the_card_has_it() -> None:
    """fp8 needs compute capability 8.9; a fixed type is kept; its bytes and its loss are those of the planner."""
    for target, expected in (("rtx3090x4", {"auto"}), ("rtx4090x2", {"auto", "fp8"})):
        made = asked("glm-4.5-air", target, kv_cache="auto", context=65536)
        cards = Cards(made.plan, made.question)
        assert set(cards.caches()) == expected
    parts = next(parts for parts in cards.methods() if parts.method == "ct")
    damages = prior_checkpoints(made.question.spec, [parts], made.question.counts)[0]
    problem = cards.budgets(damages.problem(0), parts, damages.types)
    cases = len(made.question.counts)
    assert problem.kv.tolist() == ["auto"] * cases + ["fp8"] * cases
    np.testing.assert_allclose(problem.fixed[cases:] - problem.fixed[:cases], 0.003)
    saved = problem.capacity[cases:] - problem.capacity[:cases]
    assert (saved == saved[0]).all()
    sizes = cards._sizes(parts.unquantized, "auto")
    held = sizes.placed(cards.layout, 100, cards.stages).devices[0].kv_bytes
    assert saved[0, 0] == held // 2
    fixed = asked("glm-4.5-air", "rtx4090x2", kv_cache="fp8", context=65536)
    assert set(Cards(fixed.plan, fixed.question).caches()) == {"fp8"}


def test_the_cache_of_llama_cpp_is_chosen() -> None:
    """q8_0 where the bytes are worth more in weights; each card's cache is what the plan says."""
    from reapc.allocate.allocation import prior_only
    from reapc.planner.allocate import allocate

    made = asked("Qwen/Qwen3-30B-A3B", "rtx3090", engine="llama.cpp", kv_cache="auto", context=32768)
    spec, counts = made.question.spec, made.question.counts
    devices = Devices(made.plan, spec, made.question.target, made.question.serve)
    damages = prior_only(spec, counts)
    problem = devices.budgets(damages.problem(0), damages.parts)
    cases = len(counts)
    assert problem.kv[::cases].tolist() == ["f16", "q8_0", "q4_0"]
    np.testing.assert_allclose(problem.cache[::cases], [0, 0.002, 0.02])
    found = allocate(problem)
    only = {kind: allocate(problem.take(problem.kv == kind)).best.damage for kind in ("f16", "q8_0", "q4_0")}
    assert found.best.damage == pytest.approx(min(only.values()), rel=1e-3)
    assert found.best.kv == min(only, key=lambda kind: only[kind]) == "q8_0"
    groups = {g.name: damages.types[o] for g, o in zip(damages.parts.groups, found.best.options, strict=True)}
    plan = devices.planned(made.plan, spec, damages.parts, Taken(groups, found.best.experts, "q8_0", 0.01, 5.0))
    assert plan.chosen.kv_dtype == "q8_0"
    # 32768 tokens, 48 layers, 2 x 512 values of 34 bytes for 32
    assert plan.chosen.kv_bytes == 32768 * 48 * 1024 * 34 // 32
    assert all(device.free_bytes >= 0 for device in plan.chosen.placement.devices)


def test_narrow_experts_take_what_the_layout_can_cut() -> None:
    """768 columns over 4 cards leave 192: groups of 128 do not divide them, so that the experts get none."""
    target = make_target({"gpus": 4, "vram": "8GB", "compute_capability": "8.6"}, "test")
    section = ServeSection.model_validate({"engine": "vllm", "tensor_parallel": 4})
    one = OnTarget("q", qwen30b(), target, section, 0.5, False)
    cards = Cards(one.plan, one.question)
    assert cards.layout.tp == 4
    parts = next(parts for parts in cards.methods() if parts.method == "ct")
    by_part = {unit.part: unit.types for unit in parts.groups}
    if cards.layout.ep == 1:
        assert not any(kind.endswith("g128") for kind in by_part["experts"])
    assert any(kind.endswith("g128") for kind in by_part["attention"])


def test_measured_damages_and_the_decision(
    checkpoint: Checkpoint, tokens: Tokens, scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes in one pass, the mixes that are chosen measured as well, and nothing measured twice."""
    target = make_target({"gpus": 1, "vram": "1764300kB", "compute_capability": "8.9"}, "test")
    section = ServeSection.model_validate({"engine": "vllm", "context": 256})
    made = OnTarget("tiny", checkpoint.spec, target, section, 0.5, False)
    cards = Cards(made.plan, made.question)
    every = cards.methods()
    kept = by_criterion(scores, "reap", 1)
    passes: list[int] = []
    import reapc.allocate.streamed as streamed

    real = streamed.figures_of
    monkeypatch.setattr(streamed, "figures_of", lambda *a, **k: (passes.append(len(a[1])), real(*a, **k))[1])
    results = []
    for _ in range(2):
        prober = StreamedProber(checkpoint, probed_parts(every), tokens, tmp_path, Silent())
        found = measured_checkpoints(checkpoint, every, scores, made.question.counts, kept, Silent(), prober=prober)
        results.append(decide_methods(found, within(cards), prober))
    assert passes[0] == 3 + 3  # experts, attention, the dense layer; three counts
    assert len(passes) <= 4
    best, (allocation, taken, measurements), _ = results[0]
    assert [m.kl for m in measurements] == [m.kl for m in results[1][1][2]]
    assert best.source == "measured"
    assert {probe.name.rpartition(" in ")[0] for probe in best.probes} >= {"experts", "attention", "dense"}
    assert all(probe.kl > 0 for probe in best.probes)
    assert 2 <= len(measurements) <= 3
    assert min(m.kl for m in measurements) == next(m.kl for m in measurements if m.of(taken))
    assert allocation.lower_bound <= allocation.best.damage
    # without tokens the errors alone, in the prior's nats
    plain_found = measured_checkpoints(checkpoint, every, scores, made.question.counts, kept, Silent())
    assert {damages.source for damages in plain_found} == {"errors"}


def test_masks_of_the_measured_choice(scores: Scores) -> None:
    """At a count that was not asked for: what the next lower one keeps, filled up by the winner's values."""
    asked_at: list[int] = []

    def chosen(count: int) -> Choice:
        asked_at.append(count)
        return Choice("frequency", choose(scores, "frequency", count))

    kept = by_measuring(scores, 1, (6, 9), chosen)
    assert kept(9) == choose(scores, "frequency", 9)
    assert kept(7) == choose(scores, "frequency", 7)  # frequency's choices are nested
    assert kept(11) == choose(scores, "frequency", 11)
    assert sorted(set(asked_at)) == asked_at[::-1] == [6, 9]  # each once
    greedy = by_measuring(scores, 1, (6,), lambda count: Choice("greedy", choose(scores, "ean", count)))
    for layer, experts in greedy(8).items():
        assert set(choose(scores, "ean", 6)[layer]) <= set(experts)
        assert len(experts) == 8
    assert share_without(scores, greedy(12)) == pytest.approx(0)


RECIPE = """
[model]
source = "model"

[target]
gpus = 1
vram = "1764300kB"
compute_capability = "8.9"

[serve]
engine = "vllm"
context = 512
kv_cache = "auto"

[prune]
max_ratio = 0.5

[quantize]
allocate = true

[calibration]
data = "tokens.safetensors"
sequences = 16
tokens = 64

[verify]
sequences = 4
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocated-vllm")
    changes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return make_project(folder, RECIPE, dtype=torch.bfloat16, **changes)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (("quantize.method=fp8", "target.vram='1765600kB'", "quantize.heal=true"), "fp8"),
        (("quantize.method=auto_round", "quantize.iters=0"), "ct"),
        pytest.param(("quantize.method=gptq",), "gptq", marks=pytest.mark.slow),
    ],
)
def test_a_build_allocates(
    project: Path, cache: str, capsys, tmp_path: Path, settings: tuple[str, ...], method: str
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    code, _, err = run_main(capsys, "build", project / "tiny.toml", "--out", tmp_path / "out", "--json", *options)
    assert code == 0, err
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    found = manifest["allocation"]
    assert found["method"].startswith(method)
    assert manifest["experts_kept"] == found["experts"]
    assert manifest["reload"]["format"] == found["format"]
    assert len(set(found["groups"].values())) > 1
    rows = {row["name"]: row for row in manifest["fit"]}
    assert rows["weights"]["predicted_bytes"] == rows["weights"]["actual_bytes"] == found["data_bytes"]
    plan = json.loads((out / "plan.json").read_text())["from_scores"]["chosen"]
    assert plan["kv_dtype"] == found["kv_dtype"]
    assert rows["KV cache"]["predicted_bytes"] == plan["kv_bytes"]
    assert all(device["free_bytes"] >= 0 for device in plan["placement"]["devices"])
    script = (out / "serve.sh").read_text()
    assert f"with vLLM: mix of {found['method']} widths, " in script
    assert (f"--kv-cache-dtype {found['kv_dtype']}" in script) or found["kv_dtype"] == "auto"
    assert manifest["format"] == plan["format"]
    assert plan["predicted_loss"] == found["expected_kl"]
    assert "Bits by tensor" in (out / "report.html").read_text()
    assert bool(manifest["healing_quantized"]) == ("quantize.heal=true" in settings)


def test_what_contradicts_it_is_refused(project: Path, tmp_path: Path) -> None:
    for setting in (
        "quantize.bits=4",
        "quantize.format=ct-w4g32",
        "quantize.mixed.attention=8",
        "quantize.method=none",
    ):
        with pytest.raises(ReapcError, match="fixes them"):
            load_recipe(project / "tiny.toml", (setting,))
    with pytest.raises(CannotBeDone, match="there is nothing to allocate"):
        asked("Qwen/Qwen3-30B-A3B", "h200")


def test_commands(project: Path, scores: Scores, capsys, tmp_path: Path) -> None:
    """allocate for a target, prune to its count, quantize with its widths: the bytes that were announced."""
    model, target = project / "model", tmp_path / "card.toml"
    target.write_text('name = "card"\ngpus = 1\nvram = "1764900kB"\ncompute_capability = "8.9"\n')
    write_tokens(tmp_path / "tokens.safetensors", make_tokens(4, 32, 2000))
    code, _, err = run_main(capsys, "observe", model, "--tokens", tmp_path / "tokens.safetensors", "--out",
                            tmp_path / "scores.safetensors")  # fmt: skip
    assert code == 0, err
    out = tmp_path / "allocation.json"
    given = ("--scores", tmp_path / "scores.safetensors", "--target", target, "--engine", "vllm", "--context", 512)
    code, text, err = run_main(capsys, "allocate", model, *given, "--tokens", tmp_path / "tokens.safetensors",
                               "--method", "fp8", "--out", out)  # fmt: skip
    assert code == 0, err
    assert "vllm on card; chosen uniformly" in text
    data = read_allocation(out)
    assert data["predicted"]["source"] == "measured"
    if data["experts"] < 12:
        code, _, err = run_main(capsys, "quantize", model, "--allocation", out, "--out", tmp_path / "no")
        assert (code, f"--experts {data['experts']}" in err) == (2, True)
        code, _, err = run_main(capsys, "prune", model, "--scores", tmp_path / "scores.safetensors", "--experts",
                                data["experts"], "--out", tmp_path / "pruned")  # fmt: skip
        assert code == 0, err
        model = tmp_path / "pruned"
    code, text, err = run_main(capsys, "quantize", model, "--allocation", out, "--tokens",
                               tmp_path / "tokens.safetensors", "--out", tmp_path / "mix", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(text)["bytes"] == data["data_bytes"]
    for wrong, words in (
        (("--target", target, "--budget", "3bpw"), "one of --budget and --target"),
        (("--budget", "3.0bpw", "--engine", "vllm"), "need --target"),
        (("--target", target, "--engine", "vllm", "--context", 512, "--types", "Q4_K"), "--types names GGUF types"),
    ):
        code, _, err = run_main(capsys, "allocate", model, *wrong)
        assert (code, words in err) == (2, True), err


def test_what_cannot_be_written_is_refused(tmp_path: Path, tokens: Tokens) -> None:
    """A checkpoint that is quantized already; experts in one tensor, which the quantizers do not take."""
    with pytest.raises(CannotBeDone, match="16 bit"):
        asked("gpt-oss-20b", "rtx4060ti-16g")
    spec = known.spec(known.find("Qwen/Qwen3.5-35B-A3B"))
    made = asked("Qwen/Qwen3-30B-A3B", "rtx4090")
    cards = Cards(made.plan, replace(made.question, spec=spec))
    with pytest.raises(CannotBeDone, match="leaves anything to choose"):
        cards.methods()


def test_glm_units(tmp_path: Path, tokens: Tokens) -> None:
    """A family with a dense first layer, shared experts and MTP layers: probes of each class run."""
    checkpoint = Checkpoint(make_glm4(tmp_path / "model", dtype=torch.bfloat16, moe_intermediate_size=64))
    parts = parts_of(checkpoint.spec, "ct", mtp=True)
    assert {unit.part for unit in parts.groups} == {"attention", "dense", "experts", "shared_experts"}
    prober = StreamedProber(checkpoint, parts, tokens, tmp_path / "probes", Silent())
    names = {part: {u.name for u in parts.groups if u.part == part} for part in ("dense", "shared_experts")}
    found = prober.kls({part: (prober.mix(parts.groups, own), None) for part, own in names.items()})
    assert all(kl > 0 for kl in found.values())


@pytest.mark.slow
def test_the_demo_model_at_equal_bytes(tmp_path: Path) -> None:
    """The mix for a card that uniform 4-bit weights just fill, against them, on text that nothing was chosen by."""
    checkpoint = Checkpoint(ROOT / "demo" / "model")
    spec = checkpoint.spec
    text = read_tokens(ROOT / "demo" / "calibration.safetensors", spec.vocab_size).take(np.arange(0, 128, 4))
    held_out = read_tokens(ROOT / "demo" / "held_out.safetensors", spec.vocab_size).take(np.arange(0, 80, 2))
    scores = observe(checkpoint, text, tmp_path / "observe", Silent())
    fmt = weights.parse("ct-w4g32")
    serve = ServeSection(engine="vllm", context=2048)

    def card(vram: int) -> Target:
        return make_target({"gpus": 1, "vram": f"{vram // 1000 + 1}kB", "compute_capability": "8.9"}, "test")

    used = vllm.Layouts(spec, fmt, "auto", card(2 * 10**9), serve).place(24).devices[0]
    made = OnTarget(
        "demo",
        spec,
        card(int((used.used_bytes - used.overhead_bytes + 1536 * 2**20) / 0.92) + 2000),
        serve,
        0.25,
        False,
    )
    cards = Cards(made.plan, made.question)
    every = cards.methods("auto_round")
    prober = StreamedProber(checkpoint, probed_parts(every), text.take(np.arange(0, 32, 2)), tmp_path, Silent())
    kept = by_criterion(scores, "weighted_sum", 1)
    found = measured_checkpoints(checkpoint, every, scores, made.question.counts, kept, Silent(), prober=prober)
    best, (_, taken, _), _ = decide_methods(found, within(cards), prober)
    parts = best.parts
    assert isinstance(parts, CheckpointParts)
    types = {u.name: best.types[o] for u, o in zip(parts.groups, taken.options, strict=True)}
    assert parts.bytes_of(types, taken.experts) <= weights.checkpoint_bytes(fmt, spec) + 2000
    judge = StreamedProber(checkpoint, parts, held_out, tmp_path, Silent())
    masks = kept(taken.experts) if taken.experts < 24 else None
    kls = judge.kls({"mix": (types, masks), "uniform": ({u.name: fmt.name for u in parts.groups}, None)})
    assert kls["mix"] < 0.7 * kls["uniform"], kls
