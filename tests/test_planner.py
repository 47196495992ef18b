"""What the planner decides, and what it says when it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from specs import DEMO, demo_spec, qwen30b, recipe_of

from reapc.arch import known
from reapc.cli.plan import command
from reapc.errors import CannotBeDone, ReapcError
from reapc.plan import Plan
from reapc.planner.explain import arithmetic
from reapc.planner.question import from_recipe
from reapc.planner.search import make_plan

SERVE = {"context": 2048}


def demo_plan(ram: str, **sections: Any) -> Plan:
    return make_plan(recipe_of({"ram": ram}, **{"serve": SERVE, **sections}), demo_spec(), "demo")


def test_more_memory_is_never_worse() -> None:
    losses = [demo_plan(f"{mib}MiB").chosen.predicted_loss for mib in range(54, 96)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_more_cards_and_memory_per_card_are_never_worse() -> None:
    spec = qwen30b()
    for engine in ("auto", "llama.cpp"):
        losses = []
        for gib in (8, 10, 12, 16, 20, 24, 32):
            recipe = recipe_of({"gpus": 2, "vram": f"{gib}GiB", "compute_capability": "8.6"}, serve={"engine": engine})
            losses.append(make_plan(recipe, spec, "qwen").chosen.predicted_loss)
        assert losses == sorted(losses, reverse=True)


def test_a_tight_budget_prunes_and_quantizes() -> None:
    plan = demo_plan("55.6MiB")
    assert plan.chosen.experts_kept < 24
    assert plan.chosen.bits_per_expert_weight < 5
    assert plan.chosen.fits
    assert not any(c.format == plan.chosen.format for c in plan.runners_up)
    assert Plan.model_validate(plan.to_json()) == plan


def test_every_device_is_checked_and_not_the_sum() -> None:
    """Two layers on three cards: llama.cpp has no way to use the third, which stays idle."""
    spec = demo_spec(num_hidden_layers=2)
    recipe = recipe_of({"gpus": 3, "vram": "24GiB"}, serve={**SERVE, "engine": "llama.cpp"})
    cards = make_plan(recipe, spec, "x").chosen.placement.devices[:3]
    assert [device.used_bytes > 0 for device in cards] == [True, True, False]
    one = recipe_of({"gpus": 4, "vram": "1060MiB"}, serve={**SERVE, "engine": "llama.cpp"})
    plan = make_plan(one, demo_spec(), "x")
    assert sum(plan.chosen.placement.layers_per_device) == 4
    for device in plan.chosen.placement.devices:
        assert device.used_bytes <= device.capacity_bytes
        assert device.overhead_bytes >= 2**30


def test_qwen30b_on_one_3090_is_served_quantized_by_llama_cpp() -> None:
    plan = make_plan(recipe_of("rtx3090x1"), qwen30b(), "Qwen/Qwen3-30B-A3B")
    assert (plan.chosen.engine, plan.chosen.experts_kept) == ("llama.cpp", 128)
    reasons = {(r.engine, r.format): r.reason for r in plan.refused}
    assert "too much" in reasons["vllm", "bf16"]
    assert "alone need" in reasons["vllm", "bf16"] or "needs" in reasons["vllm", "bf16"]


def test_nothing_fits_names_the_smallest_budget_exactly() -> None:
    with pytest.raises(CannotBeDone) as caught:
        demo_plan("51MiB")
    assert caught.value.exit_code == 1
    need = int(re.search(r'target\.ram = "(\d+)B"', str(caught.value)).group(1))  # type: ignore[union-attr]
    assert demo_plan(f"{need}B").chosen.fits
    with pytest.raises(CannotBeDone):
        demo_plan(f"{need - 1}B")
    # every way that the error names does help, and a step less of it does not
    ratio = float(re.search(r"prune\.max_ratio = ([\d.]+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert demo_plan("51MiB", prune={"max_ratio": ratio}).chosen.fits
    with pytest.raises(CannotBeDone):
        demo_plan("51MiB", prune={"max_ratio": ratio - 1 / 24})
    context = int(re.search(r"serve\.context = (\d+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert demo_plan("51MiB", serve={"context": context}).chosen.fits
    with pytest.raises(CannotBeDone):
        demo_plan("51MiB", serve={"context": context + 1})


def test_nothing_fits_on_cards_names_the_bytes_per_card() -> None:
    def plan(vram: str) -> Plan:
        return make_plan(recipe_of({"gpus": 2, "vram": vram}), qwen30b(), "x")

    with pytest.raises(CannotBeDone) as caught:
        plan("2GiB")
    need = int(re.search(r'target\.vram = "(\d+)B"', str(caught.value)).group(1))  # type: ignore[union-attr]
    assert plan(f"{need}B").chosen.fits
    with pytest.raises(CannotBeDone):
        plan(f"{need - 1}B")


@pytest.mark.parametrize(
    ("sections", "message", "code"),
    [
        ({"prune": {"ratio": 0.9}}, "leaves 3 of 24 experts.*\n.*largest ratio possible is 0.8333", 2),
        ({"prune": {"experts": 25}}, "the model has 24 experts", 2),
        ({"serve": {"context": 8192}}, "knows 4096 positions", 2),
        ({"quantize": {"format": "Q4_KM"}}, "did you mean 'Q4_K_M'", 2),
        ({"quantize": {"method": "gptq"}}, "vLLM needs a GPU", 1),
        ({"quantize": {"method": "gguf"}, "serve": {"engine": "vllm"}}, "vllm.*cannot serve", 1),
        ({"serve": {"engine": "vllm"}}, "vLLM needs a GPU", 1),
        ({"quantize": {"format": "IQ2_XS", "imatrix": False}}, "importance matrix", 1),
    ],
)
def test_errors_say_what_and_how(sections: dict[str, Any], message: str, code: int) -> None:
    with pytest.raises(ReapcError, match=message) as caught:
        demo_plan("1GiB", **sections)
    assert caught.value.exit_code == code


def test_the_recipe_fixes_ratio_experts_format_and_bits() -> None:
    assert demo_plan("1GiB", prune={"ratio": 0.25}).chosen.experts_kept == 18
    assert demo_plan("1GiB", prune={"experts": 4}).chosen.experts_kept == 4
    assert demo_plan("1GiB", quantize={"format": "q4_k_m"}).chosen.format == "Q4_K_M"
    assert demo_plan("1GiB", quantize={"method": "none"}).chosen.format == "BF16"
    assert demo_plan("1GiB", quantize={"bits": 3}).chosen.format.startswith(("Q3", "IQ3"))


def test_never_eight_experts_by_itself() -> None:
    """llama-quantize would apply Mixtral's rules."""
    spec = demo_spec(num_experts=12)
    kept = {
        make_plan(recipe_of({"ram": f"{kib}KiB"}, serve=SERVE, prune={"max_ratio": 0.6}), spec, "x").chosen.experts_kept
        for kib in range(50_400, 56_000, 200)
    }
    assert 8 not in kept
    assert len(kept) > 1


def test_measured_losses_replace_the_prior() -> None:
    recipe = recipe_of({"ram": "55.6MiB"}, serve=SERVE)
    plan = make_plan(recipe, demo_spec(), "demo", measured=lambda kept: 10.0)
    assert plan.loss_source == "measured"
    assert plan.chosen.experts_kept == 24


def test_arithmetic_adds_up() -> None:
    recipe = recipe_of({"ram": "55.6MiB"}, serve=SERVE)
    plan = make_plan(recipe, demo_spec(), "demo")
    lines = arithmetic(plan, from_recipe(recipe, demo_spec(), "demo"))
    tensors = sum(size for name, size, _ in lines if not name.startswith("RAM"))
    assert tensors == plan.chosen.weights_bytes
    ram = plan.chosen.placement.devices[0]
    assert sum(size for name, size, _ in lines if name.startswith("RAM")) == ram.capacity_bytes


def test_cli(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DEMO))
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nsource = "./model"\n[target]\nram = "55.6MiB"\n[serve]\ncontext = 2048\n')
    runner = CliRunner()
    shown = runner.invoke(command, [str(recipe), "--explain"], catch_exceptions=False)
    assert "Bytes per device" in shown.output
    assert "Arithmetic" in shown.output
    data = json.loads(runner.invoke(command, [str(recipe), "--json", "--set", "prune.ratio=0.25"]).output)
    assert data["plan"]["experts_kept"] == data["plan"]["experts"]["kept"] == 18
    assert sum(row["bytes"] for row in data["plan"]["tensors"]) == data["plan"]["weights_bytes"]


def test_measured_pruning_loss_is_the_priors_for_an_even_share_and_falls_with_the_share() -> None:
    from reapc.planner.prior import measured_pruning_loss, pruning_loss

    assert measured_pruning_loss(0.25, 0.25) == pytest.approx(pruning_loss(0.25))
    assert measured_pruning_loss(0.25, 0.05) == pytest.approx(pruning_loss(0.25) / 5)
    assert measured_pruning_loss(0.0, 0.0) == 0


def test_llama_cpp_serves_maverick_with_all_its_experts_only() -> None:
    """It tells by the count how queries are computed (src/models/llama4.cpp); Scout's 16 may be pruned."""

    def asked(name: str, **sections: Any) -> Plan:
        spec = known.spec(name)
        target = {"gpus": 8, "vram": "141GB", "compute_capability": "9.0"}
        return make_plan(recipe_of(target, serve={"engine": "llama.cpp"}, **sections), spec, name)

    maverick, scout = "meta-llama/Llama-4-Maverick-17B-128E-Instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    with pytest.raises(CannotBeDone, match="does not normalize queries and keys"):
        asked(maverick, prune={"experts": 96})
    assert asked(maverick).chosen.experts_kept == 128
    assert asked(scout, prune={"experts": 12}).chosen.experts_kept == 12
