"""gpt-oss, Qwen3-VL-MoE and Llama-4 against published counts, saved models and llama.cpp's converter.

Parameters by role against transformers' meta-device models: test_arch_gqa.py.
"""

from __future__ import annotations

from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import pytest
from mla_models import gguf_parts, header
from multimodal_models import GPT_OSS, MAVERICK, QWEN3_VL, TINY, is_vision, run_converter, save
from specs import changed

from reapc.arch import ModelSpec, known, model_spec
from reapc.errors import ReapcError
from reapc.toolchain import find_llamacpp

OSS_20, OSS_120 = "openai/gpt-oss-20b", "openai/gpt-oss-120b"
VL_30, VL_235 = "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"
SCOUT, MAVERICK_17 = (f"meta-llama/Llama-4-{n}-Instruct" for n in ("Scout-17B-16E", "Maverick-17B-128E"))


# --- sizes as published ---------------------------------------------------------------------------------------------


# Values in the whole checkpoint, vision included. Qwen3-VL: dumps of the headers, github gogongxt/python. Llama-4: the
# hub's safetensors totals, as quoted in public repositories.
@pytest.mark.parametrize(
    ("name", "values"),
    [(VL_30, 31_070_754_032), (VL_235, 235_670_022_896), (SCOUT, 108_641_793_536), (MAVERICK_17, 401_583_781_376)],
)
def test_whole_checkpoint_as_published(name: str, values: int) -> None:
    spec = known.spec(name)
    assert spec.parameters + spec.vision_parameters == values


# 27 blocks of 12 tensors; patch_embed 2, pos_embed 1, merger and three deepstack mergers of 6.
@pytest.mark.parametrize(("name", "tensors"), [(VL_30, 882), (VL_235, 1_388)])
def test_tensors_on_disk_as_published(name: str, tensors: int) -> None:
    assert len(list(known.spec(name).tensors())) + 27 * 12 + 3 + 4 * 6 == tensors


def test_gpt_oss_20b_as_published() -> None:
    # The dump: 459 tensors of 11,956,805,184 values; the experts' matrices as bytes of two weights, and a scale for 32.
    spec = known.spec(OSS_20)
    matrices = [t for t in spec.tensors() if t.name.endswith(("gate_up_proj", "down_proj"))]
    weights = sum(t.parameters for t in matrices)
    assert spec.parameters - weights + weights // 2 + weights // 32 == 11_956_805_184
    assert len(list(spec.tensors())) + len(matrices) == 459
    assert (spec.quantization or {})["quant_method"] == "mxfp4"


# The model card (arXiv 2508.10925, table 1), in billions: MLP, attention, embedding and head, total, active.
@pytest.mark.parametrize(
    ("name", "card"), [(OSS_20, (19.12, 0.64, 1.16, 20.91, 3.61)), (OSS_120, (114.71, 0.96, 1.16, 116.83, 5.13))]
)
def test_gpt_oss_as_its_card_splits_it(name: str, card: tuple[float, ...]) -> None:
    spec = known.spec(name)
    roles = spec.parameters_by_role()
    found = (
        roles["expert"] + roles["router"], roles["attention"], roles["embedding"] + roles["lm_head"], spec.parameters,
        spec.active_parameters,
    )  # fmt: skip
    assert [value / 1e9 for value in found] == pytest.approx(card, abs=0.0051)


# --- names and shapes: tiny models that transformers writes and the converter reads -----------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in TINY}
    for name, folder in folders.items():
        save(TINY[name][0], folder)
    return folders


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_equal_a_saved_model(name: str, tiny: dict[str, Path]) -> None:
    spec = model_spec(deepcopy(TINY[name][0]))
    saved = header(tiny[name] / "model.safetensors")
    vision = {key: saved.pop(key) for key in list(saved) if is_vision(key)}
    assert {tensor.name: tensor.shape for tensor in spec.tensors()} == saved
    assert spec.vision_parameters == sum(map(prod, vision.values()))


@pytest.fixture(scope="module")
def converted(tiny: dict[str, Path]) -> dict[str, dict[str, Any]]:
    tools = find_llamacpp()
    if tools.convert is None:
        pytest.skip("no llama.cpp: reapc doctor --install")
    return dict(zip(tiny, run_converter(tools.convert.parent, list(tiny.values())), strict=True))


@pytest.mark.parametrize("name", TINY)
def test_gguf_parts_equal_the_converter(name: str, converted: dict[str, dict[str, Any]]) -> None:
    config, arch = TINY[name]
    found = converted[name]
    assert "error" not in found, found["error"]
    spec = model_spec(deepcopy(config))
    assert found["arch"] == spec.gguf_arch == arch
    expected = gguf_parts(spec) | {part.name: part.shape for part in spec.gguf_extra}
    assert expected == {key: tuple(shape) for key, (shape, _) in found["tensors"].items()}
    assert ("rope_freqs.weight" in expected) == (name == "scout")


# --- what the engines need ------------------------------------------------------------------------------------------


def cache_elements(spec: ModelSpec, context: int) -> int:
    return sum(s.elements * s.entries(context) for layer in spec.layers for s in layer.kind.cache)


# By hand: K and V of every KV head; below, at and far above the window. gpt-oss slides on layers 0, 2, 4 ...; Llama-4
# attends to chunks but on layers 3, 7, 11 ...
@pytest.mark.parametrize(
    ("name", "context", "elements"),
    [
        (OSS_20, 100, 2 * 8 * 64 * 24 * 100),
        (OSS_20, 128, 2 * 8 * 64 * 24 * 128),
        (OSS_20, 131_072, 2 * 8 * 64 * (12 * 131_072 + 12 * 128)),
        (OSS_120, 129, 2 * 8 * 64 * (18 * 129 + 18 * 128)),
        (VL_30, 1_000, 2 * 4 * 128 * 48 * 1_000),
        (VL_235, 1_000, 2 * 4 * 128 * 94 * 1_000),
        (SCOUT, 8_192, 2 * 8 * 128 * 48 * 8_192),
        (MAVERICK_17, 8_193, 2 * 8 * 128 * (12 * 8_193 + 36 * 8_192)),
    ],
)
def test_cache_by_hand(name: str, context: int, elements: int) -> None:
    assert cache_elements(known.spec(name), context) == elements


def test_which_layers_have_a_window() -> None:
    def full(name: str) -> list[int]:
        return [layer.index for layer in known.spec(name).layers if layer.kind.cache[0].window is None]

    assert full(OSS_20) == list(range(1, 24, 2))
    assert full(SCOUT) == full(MAVERICK_17) == list(range(3, 48, 4))
    assert full(VL_30) == list(range(48))


def test_layers_numbers_and_keys() -> None:
    oss, vl, scout, maverick = map(known.spec, (OSS_120, VL_30, SCOUT, MAVERICK_17))
    assert maverick.moe_layers == tuple(range(1, 48, 2))
    assert scout.moe_layers == tuple(range(48))
    assert (maverick.dense_intermediate_size, maverick.expert_intermediate_size) == (16_384, 8_192)
    assert [spec.shared_experts for spec in (oss, vl, scout, maverick)] == [0, 0, 1, 1]
    assert [spec.top_k for spec in (oss, vl, scout, maverick)] == [4, 8, 1, 1]
    assert oss.norm_topk
    assert vl.norm_topk
    assert not any(spec.tied_embeddings for spec in (oss, vl, scout, maverick))
    assert oss.expert_count_keys == ("num_local_experts",)
    assert vl.expert_count_keys == ("text_config.num_experts",)
    assert scout.expert_count_keys == ("text_config.num_local_experts",)


# vLLM: sinks go with the heads; a rank that holds a slice of an expert keeps the whole bias of its down matrix.
PARALLEL = {
    "q_proj": "column", "k_proj": "kv", "v_proj": "kv", "o_proj.weight": "row", "o_proj.bias": "replicate",
    "sinks": "column", "norm": "replicate", "router": "replicate", "mlp.gate.": "replicate",
    "experts.gate_up_proj": "expert", "experts.down_proj": "expert_row", "experts.down_proj_bias": "replicate",
    "shared_expert.gate_proj": "column", "shared_expert.up_proj": "column", "shared_expert.down_proj": "row",
    "feed_forward.gate_proj": "column", "feed_forward.up_proj": "column", "feed_forward.down_proj": "row",
    "embed_tokens": "vocab", "lm_head": "vocab",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_sharding_is_vllms(name: str) -> None:
    for group, _ in model_spec(deepcopy(TINY[name][0])).groups():
        mark = max((mark for mark in PARALLEL if mark in group.name), key=len)
        assert group.parallel == PARALLEL[mark], group.name


@pytest.mark.parametrize("name", TINY)
def test_pruning_drops_every_row_of_an_expert(name: str) -> None:
    config = deepcopy(TINY[name][0])
    spec, text = model_spec(config), config.get("text_config", config)
    width = text["moe_intermediate_size"] if name == "qwen3-vl" else text["intermediate_size"]
    biases = 2 * width + 64 + 1 if name == "gpt-oss" else 0
    layers = 2 if name == "maverick" else 4
    share = layers * (3 * 64 * width + 64 + biases)
    assert spec.parameters - spec.with_experts(4).parameters == 2 * share


# --- broken configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        *((GPT_OSS, key, None, f"c.json: key '{key}' is missing") for key in
          ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_local_experts",
           "intermediate_size", "num_experts_per_tok", "sliding_window")),
        *((QWEN3_VL, f"text_config.{key}", None, f"c.json: text_config: key '{key}' is missing") for key in
          ("hidden_size", "num_experts", "moe_intermediate_size", "num_experts_per_tok", "vocab_size")),
        *((MAVERICK, f"text_config.{key}", None, f"c.json: text_config: key '{key}' is missing") for key in
          ("hidden_size", "num_local_experts", "intermediate_size", "num_experts_per_tok", "vocab_size")),
        (QWEN3_VL, "vision_config.depth", None, "c.json: vision_config: key 'depth' is missing"),
        (GPT_OSS, "layer_types", ["full_attention"] * 3, "layer_types has 3 entries, and the model has 4 layers"),
        (GPT_OSS, "layer_types", ["full"] * 4, r"layer_types\[0\] = 'full'"),
        (GPT_OSS, "num_local_experts", "six", "num_local_experts = 'six': int expected"),
        (GPT_OSS, "num_experts_per_tok", 7, "num_experts_per_tok = 7 with 6 experts"),
        (QWEN3_VL, "text_config.num_local_experts", 5, "num_experts = 6 and num_local_experts = 5 contradict"),
        (MAVERICK, "text_config.interleave_moe_layer_step", "2", "interleave_moe_layer_step = '2': int expected"),
        (MAVERICK, "text_config.num_key_value_heads", 3, "num_attention_heads = 4 is not a multiple of"),
    ],
)  # fmt: skip
def test_broken_configs_name_the_key(config: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ReapcError, match=message) as caught:
        model_spec(changed(config, key, value), "c.json")
    assert caught.value.exit_code == 2
