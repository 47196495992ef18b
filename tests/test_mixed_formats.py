"""Formats with another width for a part of the model: names, bytes, what the planner and vLLM's rules make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from specs import demo_spec, qwen30b, recipe_of

from reapc.engines import vllm, vllm_rules
from reapc.engines.vllm_rules import Layout
from reapc.errors import ReapcError
from reapc.formats import layout, weights, writers
from reapc.formats.weights import WeightFormat
from reapc.planner.question import from_recipe
from reapc.planner.search import make_plan
from reapc.recipe import ServeSection, load_recipe
from reapc.target import load_target


def fmt(name: str) -> WeightFormat:
    found = weights.parse(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name",
    [
        "auto-round-w4g128+attention=8",
        "auto-round-w4g32:experts+attention=8",
        "ct-w3g64+layers.0-1=8+layers.3=16",
        "gptq-w4g128+shared_experts=8+dense=16",
        "fp8-block+layers.0=16",
        "ct-w4g32+layers.0.experts=3g64+layers.1-2.attention=8+layers.3.experts=16",
    ],
)
def test_a_name_is_the_whole_format(name: str) -> None:
    assert fmt(name).name == name
    assert fmt(fmt(name).name) == fmt(name)
    assert fmt(name).base.name == name.split("+")[0]
    assert fmt(name.upper()) == fmt(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gptq-w4g128+attention=3", "gptq has 4, 8 bits"),
        ("gptq-w4g128+router=8", "'router=8' is not PART=BITS"),
        ("gptq-w4g128+layers.3-1=8", "is not PART=BITS"),
        ("gptq-w4g128+experts=8", "is not PART=BITS"),  # half of a MoE layer is not a part
        ("fp8+attention=4", "fp8 has 8 bits"),
        ("ct-w4g32+layers.0.gate=8", "is not PART=BITS"),
        ("ct-w4g32+layers.0.experts=8g48", "group sizes here: 32, 64, 128"),
        ("fp8+layers.0.experts=8g32", "group sizes here: none"),
        ("bf16+attention=8", "nothing to limit or to override"),
    ],
)
def test_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(ReapcError, match=words.replace("(", r"\(")):
        weights.parse(name)


def test_bytes_are_those_of_the_parts() -> None:
    spec = qwen30b()
    four, eight, bf16 = (weights.checkpoint_bytes(fmt(n), spec) for n in ("ct-w4g128", "ct-w8g128", "bf16"))
    last = spec.num_layers - 1
    assert weights.checkpoint_bytes(fmt(f"ct-w4g128+layers.0-{last}=8"), spec) == eight
    assert weights.checkpoint_bytes(fmt(f"ct-w4g128+layers.0-{last}=16"), spec) == bf16
    assert weights.checkpoint_bytes(fmt("ct-w4g128+attention=16"), spec) == weights.checkpoint_bytes(
        fmt("ct-w4g128:experts"), spec
    )
    # 12 of 48 equal layers hold a quarter of what the step from 4 to 8 bits costs
    quarter = weights.checkpoint_bytes(fmt("ct-w4g128+layers.0-11=8"), spec)
    assert quarter - four == (eight - four) // 4
    # what is said last counts
    assert weights.checkpoint_bytes(fmt(f"ct-w4g128+attention=8+layers.0-{last}=4"), spec) == four
    assert weights.checkpoint_bytes(fmt(f"ct-w4g128+layers.0-{last}=4+attention=8"), spec) > four


def test_one_width_inside_a_moe_layer() -> None:
    spec = demo_spec()
    found: dict[int, set[str]] = {}
    for item in layout.stored(fmt("auto-round-w4g32+attention=8+layers.1=2+layers.3=16"), spec):
        if item.tensor.role == "expert":
            assert item.tensor.layer is not None
            found.setdefault(item.tensor.layer, set()).add(item.format.name if item.format else "kept")
        if item.tensor.role in ("router", "embedding", "lm_head", "norm"):
            assert item.format is None
    assert found == {0: {"auto-round-w4g32"}, 1: {"auto-round-w2g32"}, 2: {"auto-round-w4g32"}, 3: {"kept"}}


def test_parts_of_layers_have_widths_and_group_sizes_of_their_own() -> None:
    spec = demo_spec()
    mixed = fmt("ct-w4g32+layers.0.experts=3g64+layers.1-2.attention=8+layers.2.attention=16")
    found = {
        (item.tensor.layer, item.tensor.role): item.format.name if item.format else "kept"
        for item in layout.stored(mixed, spec)
        if item.group.linears
    }
    assert found[0, "expert"] == "ct-w3g64"
    assert (found[0, "attention"], found[1, "attention"]) == ("ct-w4g32", "ct-w8g32")
    assert (found[2, "attention"], found[2, "expert"]) == ("kept", "ct-w4g32")
    sizes = {name: weights.checkpoint_bytes(fmt(name), spec) for name in ("ct-w4g32", "ct-w3g64")}
    all_three = weights.checkpoint_bytes(fmt("ct-w4g32+layers.0-3.experts=3g64+attention=3g64"), spec)
    assert all_three == sizes["ct-w3g64"] < weights.checkpoint_bytes(mixed, spec)
    assert weights.checkpoint_bytes(mixed, spec) == sum(
        item.bytes for item in layout.expected_tensors(mixed, spec).values()
    )
    assert mixed.label == "ct-w4g32 with other widths for 3 parts"


def test_the_memory_of_a_card_is_the_sum_of_its_layers() -> None:
    spec = qwen30b()
    serve = ServeSection(engine="vllm", context=4096)
    for name in ("auto-round-w4g128", "auto-round-w4g128+layers.0-11=8", "auto-round-w4g128+attention=16"):
        sizes = vllm.Layouts(spec, fmt(name), "auto", load_target("rtx3090"), serve)
        whole = sizes.place(spec.num_experts).devices[0].weights_bytes
        # vLLM pads the vocabulary to a multiple of 64: this one is
        assert spec.vocab_size % 64 == 0
        assert whole == weights.checkpoint_bytes(fmt(name), spec)


def test_vllm_rules_look_at_every_width() -> None:
    spec = qwen30b()
    narrow = Layout(8, 1, 1)  # 768 / 8 = 96 columns: int4 falls back to a slow kernel, 3 bit cannot
    assert vllm_rules.format_refusal(spec, fmt("auto-round-w4g32"), narrow) == (None, True)
    reason, _ = vllm_rules.format_refusal(spec, fmt("auto-round-w4g32+layers.5=3"), narrow)
    assert reason
    assert "auto-round-w3g32 cannot hold" in reason
    assert vllm_rules.format_refusal(spec, fmt("auto-round-w4g32+layers.0-47=16"), narrow) == (None, False)


def test_a_layer_that_is_not_there() -> None:
    spec = demo_spec()
    assert weights.misfit(fmt("ct-w4g32+layers.3=8"), spec) is None
    assert "layers.4=8: the model has the layers 0 to 3" in str(weights.misfit(fmt("ct-w4g32+layers.4=8"), spec))


def test_a_recipe_mixes(tmp_path: Path) -> None:
    spec = qwen30b()
    recipe = recipe_of("rtx3090", quantize={"method": "auto_round", "mixed": {"attention": 8, "layers.0-1": 16}})
    pairs = from_recipe(recipe, spec, "m").pairs
    assert pairs
    assert all(name.endswith("+attention=8+layers.0-1=16") for _, name in pairs)
    plan = make_plan(recipe, spec, "m", buildable=True)
    assert plan.chosen.format.endswith("+attention=8+layers.0-1=16")
    assert plan.chosen.weights_bytes == weights.checkpoint_bytes(
        fmt(plan.chosen.format), spec.with_experts(plan.chosen.experts_kept)
    )
    with pytest.raises(ReapcError, match="PART is layers"):
        from_recipe(recipe_of("rtx3090", quantize={"method": "gptq", "mixed": {"gate": 8}}), spec, "m")
    (tmp_path / "r.toml").write_text('[model]\nsource = "m"\n[target]\nram = "8GB"\n[quantize]\nmethod = "gguf"\n')
    with pytest.raises(ReapcError, match="llama-quantize mixes types by itself"):
        load_recipe(tmp_path / "r.toml", ("quantize.mixed.attention=8",))


def test_the_planner_and_the_quantizer_read_one_table() -> None:
    spec = demo_spec()
    for method, tools in writers.METHOD_TOOLS.items():
        recipe = recipe_of("rtx4090", quantize={"method": method})
        for _, name in from_recipe(recipe, spec, "m", buildable=True).pairs:
            found = writers.writer(fmt(name), method)
            assert found is not None
            assert found.tool == tools
    named = recipe_of("rtx4090", quantize={"format": "auto_gptq", "bits": 4})
    assert {fmt(name).method for _, name in from_recipe(named, spec, "m").pairs} == {"gptq"}
    assert named.quantize.writer == "auto_round"
    with pytest.raises(ReapcError, match="is not what quantize"):
        from_recipe(recipe_of("rtx4090", quantize={"method": "fp8", "format": "gptq-w4g32"}), spec, "m")
