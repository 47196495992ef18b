"""The plain grouped-query families against transformers, llama.cpp's converter and the headers of published files."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
from gqa_models import TINY, convert, gguf_shapes, pack_experts, publish, save, transformers_model
from mla_models import header

from reapc.arch import known, model_spec
from reapc.arch.spec import ModelSpec

TYPES = {config["model_type"] for config in TINY.values()}
NAMES = [name for name in known.names() if known.config(name)["model_type"] in TYPES]
QWEN2: dict[str, Any] = {  # Qwen1.5-MoE-A2.7B, which the catalogue has not
    "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "vocab_size": 151936,
    "tie_word_embeddings": False, "decoder_sparse_step": 1, "norm_topk_prob": False, "qkv_bias": True,
}  # fmt: skip
# config.json of Llama-4-Scout (the catalogue's copy lacks it), from github, "Llama 4 Scout" module listing.
LLAMA4_VISION = {
    "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "vision_output_dim": 4096, "projector_input_dim": 4096,
    "projector_output_dim": 4096, "pixel_shuffle_ratio": 0.5, "num_channels": 3,
}  # fmt: skip


def named(part: str) -> ModelSpec:
    """The catalogue's model with this name, or an unambiguous part of it."""
    return known.spec(known.find(part) or "")


def test_the_catalogue_has_these_models() -> None:
    assert {name.split("/")[1] for name in NAMES} == {
        "Qwen3-235B-A22B", "Qwen3-235B-A22B-FP8", "Qwen3-30B-A3B", "Qwen3-30B-A3B-FP8",
        "Qwen3-Coder-30B-A3B-Instruct", "Qwen3-Coder-480B-A35B-Instruct", "Qwen3-VL-235B-A22B-Instruct",
        "Qwen3-VL-30B-A3B-Instruct", "GLM-4.5", "GLM-4.5-FP8", "GLM-4.5-Air", "GLM-4.6", "GLM-4.7", "MiniMax-M2",
        "MiniMax-M2.1", "MiniMax-M2.5", "MiniMax-M2.7", "Mixtral-8x7B-v0.1", "Mixtral-8x22B-v0.1",
        "Phi-3.5-MoE-instruct", "OLMoE-1B-7B-0924", "ERNIE-4.5-21B-A3B-PT", "granite-3.0-1b-a400m-instruct",
        "granite-3.1-3b-a800m-instruct", "gpt-oss-20b", "gpt-oss-120b", "Llama-4-Scout-17B-16E-Instruct",
        "Llama-4-Maverick-17B-128E-Instruct",
    }  # fmt: skip


# --- sizes against transformers' model on the meta device -----------------------------------------------------------


def role_of(name: str) -> str:
    """The role of a transformers parameter, by its name alone."""
    rules = (
        (r"visual\.|vision_model|multi_modal_projector", "vision"), (r"embed", "embedding"), (r"lm_head", "lm_head"),
        (r"shared_expert", "shared_expert"), (r"\.router\.|mlp\.gate\.|moe\.gate\.|statics|e_score", "router"),
        (r"\.experts\.|(in|out)put_linear", "expert"), (r"norm", "norm"), (r"attn", "attention"),
        (r"\.mlp\.|feed_forward", "dense_mlp"),
    )  # fmt: skip
    return next(role for pattern, role in rules if re.search(pattern, name))


@pytest.mark.parametrize("name", [*NAMES, "qwen2_moe"])
def test_parameters_equal_transformers(name: str) -> None:
    import torch

    config = deepcopy(QWEN2) if name == "qwen2_moe" else known.config(name)
    spec = model_spec(deepcopy(config))
    if config["model_type"] == "llama4":
        config["vision_config"] = LLAMA4_VISION
    with torch.device("meta"):
        model = transformers_model(config)
    counts: Counter[str] = Counter()
    for key, tensor in model.state_dict().items():
        counts[role_of(key)] += tensor.numel()
    if spec.tied_embeddings:
        counts.pop("lm_head", None)
    assert spec.vision_parameters == counts.pop("vision", 0)
    assert spec.parameters_by_role() == dict(counts)
    assert spec.parameters == counts.total()
    inner = model.config.get_text_config()
    chosen = counts["expert"] * inner.num_experts_per_tok // model_experts(inner)
    outside = 0 if spec.tied_embeddings else counts["embedding"]
    assert spec.active_parameters == counts.total() - outside - counts["expert"] + chosen


def model_experts(config: Any) -> int:
    """The expert count as transformers' config has it."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next(int(getattr(config, key)) for key in keys if hasattr(config, key))


# Billions in all and active, as the model cards and papers say, and what their rounding and their own way of counting
# (with or without embeddings, MTP) allow.
CARDS = {
    "Qwen3-235B-A22B": (235, 22, 0.6), "Qwen3-Coder-480B": (480, 35, 0.6), "Qwen3-30B-A3B": (30.5, 3.3, 0.4),
    "GLM-4.5": (355, 32, 2.3), "GLM-4.5-Air": (106, 12, 1), "MiniMax-M2": (230, 10, 1.4),
    "Mixtral-8x7B": (46.7, 12.9, 0.2), "Mixtral-8x22B": (141, 39, 0.5), "OLMoE": (6.92, 1.3, 0.15),
    "Phi-3.5-MoE": (41.9, 6.6, 0.15), "ERNIE-4.5-21B": (21.8, 3, 0.4), "gpt-oss-120b": (116.8, 5.1, 0.1),
    "gpt-oss-20b": (20.9, 3.6, 0.1), "Scout": (109, 17, 1.3), "Maverick": (400, 17, 1),
    "granite-3.0-1b": (1.3, 0.4, 0.05), "granite-3.1-3b": (3.3, 0.8, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    total, active, tolerance = CARDS[name]
    spec = named(name)
    assert spec.parameters / 1e9 == pytest.approx(total, abs=tolerance)
    assert spec.active_parameters / 1e9 == pytest.approx(active, abs=tolerance)


def test_qwen2_is_qwen15_moe_a27b() -> None:
    """Its card: 14.3B parameters, 2.7B activated (those of the layers and the head)."""
    spec = model_spec(deepcopy(QWEN2))
    assert spec.parameters / 1e9 == pytest.approx(14.3, abs=0.05)
    assert spec.active_parameters / 1e9 == pytest.approx(2.7, abs=0.4)


def test_whole_checkpoints_as_the_hub_counts_them() -> None:
    """What the hub shows for the bf16 files: MTP layers and vision towers included."""
    air, scout = named("GLM-4.5-Air"), named("Scout")
    assert air.parameters + air.mtp_parameters == 110_468_824_832
    assert scout.parameters + scout.vision_parameters == 108_641_793_536
    assert named("gpt-oss-120b").parameters == 116_829_156_672
    assert named("Mixtral-8x7B").parameters == 46_702_792_704


# Tensors and values in the published checkpoints, by their safetensors headers (github gogongxt/python,
# scripts/models/*.md; the 2507 builds of the Qwen3 models): scales, MTP layers and vision included.
HEADERS = {
    "Qwen3-235B-A22B-FP8": (73_417, 235_107_904_512), "Qwen3-30B-A3B-FP8": (37_491, 30_533_947_392),
    "Qwen3-VL-235B": (1_388, 235_670_022_896), "Qwen3-VL-30B": (882, 31_070_754_032),
    "GLM-4.5-FP8": (88_543, 358_458_543_424), "MiniMax-M2.7": (96_103, 228_703_644_928),
    "gpt-oss-20b": (459, 11_956_805_184),
}  # fmt: skip
VISION_TENSORS = 27 * 12 + 3 * 6 + 6 + 2 + 1  # Qwen3-VL: blocks, deepstack mergers, merger, patches, positions


def _stored(spec: ModelSpec) -> tuple[int, int]:
    """Tensors and values on disk: FP8 with a scale per 128 x 128 or per row, MXFP4 with two weights a byte and a scale
    per 32, else as it is."""
    method = (spec.quantization or {}).get("quant_method")
    tensors = values = 0
    for group, layers in spec.groups(mtp=True):
        count = layers * (spec.num_experts if "{e}" in group.name else 1)
        size = prod(group.shape) * (spec.num_experts if group.expert_axis is not None else 1)
        scales = 0
        if method == "fp8" and group.linears:
            scales = ceil(group.shape[0] / 128) * ceil(group.shape[1] / 128)
        elif method == "compressed-tensors" and (group.linears or "shared_head.head" in group.name):
            scales = group.shape[0]
        elif method == "mxfp4" and group.role == "expert" and group.linears:
            size, scales = size // 2, size // 32
        tensors, values = tensors + count * (2 if scales else 1), values + count * (size + scales)
    return tensors, values


@pytest.mark.parametrize("name", HEADERS)
def test_tensors_and_values_equal_the_published_headers(name: str) -> None:
    spec = named(name)
    tensors, values = _stored(spec)
    beside = VISION_TENSORS if spec.vision_parameters else 0
    assert (tensors + beside, values + spec.vision_parameters) == HEADERS[name]


def test_float32_tensors_are_those_of_the_published_headers() -> None:
    def float32(name: str) -> set[str]:
        found = {(group.name, group.dtype) for group, _ in named(name).groups(mtp=True) if group.dtype}
        assert {dtype for _, dtype in found} <= {"float32"}
        return {group.rsplit(".", 1)[0] if group.endswith("weight") else group for group, _ in found}

    assert float32("GLM-4.5-FP8") == {"mlp.gate.e_score_correction_bias"}
    assert float32("MiniMax-M2.7") == {"block_sparse_moe.gate", "block_sparse_moe.e_score_correction_bias"}
    assert float32("Qwen3-30B-A3B-FP8") == float32("gpt-oss-20b") == float32("Qwen3-VL-30B") == set()


# --- names and shapes: tiny models that transformers saves and the converter reads ----------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved by transformers, then mended to what is published."""
    folders = {name: tmp_path_factory.mktemp("gqa") for name in TINY}
    for name, folder in folders.items():
        save(TINY[name], folder)
        publish(TINY[name], folder)
    return folders


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_equal_a_saved_model(name: str, saved: dict[str, Path]) -> None:
    spec = model_spec(deepcopy(TINY[name]))
    tensors = header(saved[name] / "model.safetensors")
    vision = {key: tensors.pop(key) for key in list(tensors) if role_of(key) == "vision"}
    assert {tensor.name: tensor.shape for tensor in spec.tensors()} == tensors
    assert sum(map(prod, vision.values())) == spec.vision_parameters
    assert sum(tensor.parameters for tensor in spec.with_experts(4).tensors()) == spec.with_experts(4).parameters


def test_qwen3_vl_experts_have_the_published_shape() -> None:
    """(E, hidden, 2 width) and (E, width, hidden), as in the headers of Qwen3-VL-30B-A3B-Instruct."""
    shapes = {tensor.name: tensor.shape for tensor in named("Qwen3-VL-30B").layer_tensors(47)}
    prefix = "model.language_model.layers.47.mlp.experts"
    assert shapes[f"{prefix}.gate_up_proj"] == (128, 2048, 1536)
    assert shapes[f"{prefix}.down_proj"] == (128, 768, 2048)


def test_glm_stores_an_mtp_layer() -> None:
    """Layer 92 of GLM-4.5, as in its headers: a whole layer with experts, and seven tensors more."""
    spec = named("GLM-4.5-FP8")
    (layer,) = spec.mtp_layers
    assert (layer.prefix, layer.kind) == ("model.layers.92", spec.layers[91].kind)
    assert {group.name: group.shape for group in spec.mtp_outer} == {
        "model.layers.92.eh_proj.weight": (5120, 10240), "model.layers.92.embed_tokens.weight": (151552, 5120),
        "model.layers.92.enorm.weight": (5120,), "model.layers.92.hnorm.weight": (5120,),
        "model.layers.92.shared_head.head.weight": (151552, 5120), "model.layers.92.shared_head.norm.weight": (5120,),
    }  # fmt: skip
    assert not named("MiniMax-M2.7").mtp_layers  # num_mtp_modules = 3, and none in the file


ARCHS = {
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "qwen3_vl_moe": "qwen3vlmoe",
    "glm4_moe": "glm4moe", "glm4_moe plain": "glm4moe", "minimax_m2": "minimax-m2", "mixtral": "llama",
    "phimoe": "phimoe", "phimoe plain": "phimoe", "olmoe": "olmoe", "ernie4_5_moe": "ernie4_5-moe",
    "granitemoe": "granitemoe", "gpt_oss": "gpt-oss", "gpt_oss packed": "gpt-oss", "llama4": "llama4",
}  # fmt: skip
EXTRA = {
    "phimoe": {"rope_factors_long.weight": (8,), "rope_factors_short.weight": (8,)},
    "llama4": {"rope_freqs.weight": (8,)},
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same through llama.cpp's converter; gpt-oss in MXFP4 too."""
    packed = tmp_path_factory.mktemp("packed") / "gpt_oss"
    pack_experts(saved["gpt_oss"], packed)
    return convert({**saved, "gpt_oss packed": packed})


@pytest.mark.parametrize("name", ARCHS)
def test_gguf_parts_equal_the_converter(name: str, converted: dict[str, dict[str, Any]]) -> None:
    found = converted[name]
    assert "error" not in found, found["error"]
    spec = model_spec(deepcopy(TINY[name.removesuffix(" packed")]))
    written = {key: tuple(shape) for key, (shape, _) in found["tensors"].items()}
    assert gguf_shapes(spec) == written
    assert found["arch"] == spec.gguf_arch == ARCHS[name]
    assert {part.name: part.shape for part in spec.gguf_extra} == EXTRA.get(name, {})
    assert sum(".nextn." in key for key in written) == (6 if name == "glm4_moe" else 0)
    assert {kind for key, (_, kind) in found["tensors"].items() if "_exps.weight" in key} == {
        "MXFP4" if name == "gpt_oss packed" else "BF16"
    }


@pytest.mark.parametrize("name", ["qwen2_moe dense", "qwen3_moe dense", "qwen3_moe step"])
def test_the_converter_refuses_dense_layers_of_qwen(name: str, converted: dict[str, dict[str, Any]]) -> None:
    """Its qwen architectures have no dense MLP: what the spec says of those is nominal, and no such model is served."""
    dense = next(layer.index for layer in model_spec(deepcopy(TINY[name])).layers if not layer.is_moe)
    assert f"Can not map tensor 'model.layers.{dense}.mlp.down_proj.weight'" in converted[name]["error"]


def test_rope_factors_follow_the_published_configs() -> None:
    """Scout scales its rope, Maverick does not; a transformers 5 config states it under rope_parameters."""
    assert [(part.name, part.shape) for part in named("Scout").gguf_extra] == [("rope_freqs.weight", (64,))]
    assert not named("Maverick").gguf_extra
    config = deepcopy(TINY["llama4"])
    config["text_config"]["rope_parameters"] = config["text_config"].pop("rope_scaling")
    assert model_spec(config).gguf_extra == model_spec(TINY["llama4"]).gguf_extra
    config["text_config"]["rope_parameters"]["rope_type"] = "default"
    assert not model_spec(config).gguf_extra


# --- what the engines need ------------------------------------------------------------------------------------------

# vLLM's layers: QKVParallelLinear, RowParallelLinear, MergedColumnParallelLinear, FusedMoE; everything else is whole.
PARALLEL = {
    "self_attn.q_proj": "column", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv", "o_proj.weight": "row",
    "o_proj.bias": "replicate", "sinks": "column", "mlp.gate.": "replicate", "router": "replicate",
    "e_score": "replicate", "block_sparse_moe.gate.": "replicate", "norm": "replicate", "eh_proj": "replicate",
    "embed_tokens": "vocab", "lm_head": "vocab", "shared_head.head": "vocab", "shared_expert_gate": "replicate",
    "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
    "feed_forward.gate_proj": "column", "feed_forward.up_proj": "column", "feed_forward.down_proj": "row",
    **{f"{shared}.{name}": where for shared in ("shared_expert", "shared_experts")
       for name, where in (("gate_proj", "column"), ("up_proj", "column"), ("down_proj", "row"))},
    **{f"experts.{{e}}.{name}": "expert" for name in ("gate_proj", "up_proj", "w1", "w3")},
    **{f"experts.{{e}}.{name}": "expert_row" for name in ("down_proj", "w2")},
    "experts.gate_up_proj": "expert", "experts.down_proj": "expert_row", "experts.down_proj_bias": "replicate",
    "input_linear": "expert", "output_linear": "expert_row",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_sharding_is_vllms(name: str) -> None:
    split = {"q_norm": "column", "k_norm": "kv"} if name == "minimax_m2" else {}
    table = {**PARALLEL, **{f"self_attn.{norm}.weight": where for norm, where in split.items()}}
    for group, _ in model_spec(deepcopy(TINY[name])).groups(mtp=True):
        mark = max((mark for mark in table if mark in group.name), key=len)
        assert group.parallel == table[mark], group.name


@pytest.mark.parametrize("name", TINY)
def test_linears_are_all_of_a_matrix_and_no_router_is_one(name: str) -> None:
    """What a weight format covers: every matrix of attention, MLPs and experts, whole, and nothing else."""
    spec = model_spec(deepcopy(TINY[name]))
    for group, _ in spec.groups():
        matrix = group.role in ("attention", "expert", "shared_expert", "dense_mlp") and len(group.shape) == 2
        matrix = matrix and "shared_expert_gate" not in group.name
        assert sum(map(prod, group.linears)) == (prod(group.shape) if matrix else 0), group.name


@pytest.mark.parametrize(
    ("name", "context", "elements"),
    [
        # layers x (k + v) x KV heads x head_dim x tokens
        ("Qwen3-235B-A22B", 1, 94 * 2 * 4 * 128), ("Qwen3-VL-30B", 1, 48 * 2 * 4 * 128),
        ("Qwen3-Coder-480B", 1000, 62 * 2 * 8 * 128 * 1000), ("GLM-4.5-Air", 1, 46 * 2 * 8 * 128),
        ("GLM-4.7", 1, 92 * 2 * 8 * 128), ("MiniMax-M2", 1, 62 * 2 * 8 * 128), ("OLMoE", 1, 16 * 2 * 16 * 128),
        ("Mixtral-8x22B", 65536, 56 * 2 * 8 * 128 * 65536), ("ERNIE-4.5-21B", 1, 28 * 2 * 4 * 128),
        ("granite-3.0-1b", 1, 24 * 2 * 8 * 64), ("Phi-3.5-MoE", 1, 32 * 2 * 8 * 128),
        # gpt-oss slides over 128 tokens on every second layer
        ("gpt-oss-120b", 32768, 2 * 8 * 64 * 18 * (32768 + 128)), ("gpt-oss-20b", 100, 2 * 8 * 64 * 24 * 100),
        # Llama-4 attends to chunks of 8192 on three layers of four
        ("Scout", 100_000, 2 * 8 * 128 * (12 * 100_000 + 36 * 8192)),
        ("Maverick", 8000, 2 * 8 * 128 * 48 * 8000),
    ],
)  # fmt: skip
def test_cache_elements_by_hand(name: str, context: int, elements: int) -> None:
    streams = [stream for layer in named(name).layers for stream in layer.kind.cache]
    assert sum(stream.elements * stream.entries(context) for stream in streams) == elements
    assert {stream.heads for stream in streams} == {named(name).num_kv_heads}
    assert {stream.kind for stream in streams} == {"kv"}


def test_windows_are_where_the_config_has_them() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [stream.window for layer in model_spec(config).layers for stream in layer.kind.cache]

    assert windows(deepcopy(TINY["mixtral"])) == [8, 8, 8]
    assert windows({**TINY["mixtral"], "sliding_window": None}) == [None] * 3
    assert windows(deepcopy(TINY["gpt_oss"])) == [8, None, 8]
    assert windows({**TINY["gpt_oss"], "layer_types": None}) == [8, None, 8]
    llama = deepcopy(TINY["llama4"])
    assert windows(llama) == [64, 64, 64, None]
    llama["text_config"] |= {"no_rope_layers": [0, 1, 0, 1]}
    assert windows(llama) == [None, 64, None, 64]
    llama["text_config"] |= {"layer_types": ["full_attention"] * 4}
    assert windows(llama) == [None] * 4
    llama["text_config"] |= {"layer_types": None, "no_rope_layers": None, "attention_chunk_size": None}
    assert windows(llama) == [None] * 4


def test_numbers_of_the_router() -> None:
    glm, ernie, llama = named("GLM-4.5"), named("ERNIE-4.5-21B"), named("Maverick")
    assert (glm.top_k, glm.shared_experts, glm.n_group, glm.norm_topk) == (8, 1, 1, True)
    assert (glm.moe_layers, named("GLM-4.5-Air").moe_layers) == (tuple(range(3, 92)), tuple(range(1, 46)))
    assert (ernie.top_k, ernie.shared_experts, ernie.moe_layers) == (6, 2, tuple(range(1, 28)))
    assert (llama.top_k, llama.shared_experts, llama.moe_layers) == (1, 1, tuple(range(1, 48, 2)))
    tiny = model_spec(TINY["glm4_moe"])
    assert (tiny.n_group, tiny.topk_group, tiny.shared_experts) == (2, 1, 2)
    renormalized = {name.split("/")[1]: known.spec(name).norm_topk for name in NAMES}
    assert {name for name, norm in renormalized.items() if not norm} == {
        "OLMoE-1B-7B-0924", "Phi-3.5-MoE-instruct", "Llama-4-Scout-17B-16E-Instruct",
        "Llama-4-Maverick-17B-128E-Instruct",
    }  # fmt: skip


def test_keys_that_count_experts_and_formats_are_passed_on() -> None:
    keys = {name: model_spec(deepcopy(config)).expert_count_keys for name, config in TINY.items()}
    assert keys["qwen3_vl_moe"] == ("text_config.num_experts",)
    assert keys["llama4"] == ("text_config.num_local_experts",)
    assert (keys["ernie4_5_moe"], keys["glm4_moe"]) == (("moe_num_experts",), ("n_routed_experts",))
    both = model_spec({**TINY["qwen3_moe"], "num_local_experts": 6})
    assert both.expert_count_keys == ("num_experts", "num_local_experts")
    assert (named("gpt-oss-20b").quantization or {})["quant_method"] == "mxfp4"
    assert (named("GLM-4.5-FP8").quantization or {})["format"] == "float-quantized"
    tied = {name for name, config in TINY.items() if model_spec(deepcopy(config)).tied_embeddings}
    assert tied == {"qwen3_moe", "ernie4_5_moe", "granitemoe"}


def test_pruning_takes_a_share_of_main_and_mtp_experts() -> None:
    spec = named("GLM-4.5")
    kept, expert = spec.with_experts(120), 3 * 5120 * 1536 + 5120 + 1  # with the router's row and its bias
    assert spec.parameters - kept.parameters == 89 * 40 * expert
    assert spec.mtp_parameters - kept.mtp_parameters == 40 * expert
    oss = named("gpt-oss-20b")
    share = 3 * 2880 * 2880 + 3 * 2880 + 2880 + 1  # biases of gate, up and down; the router's row and bias
    assert oss.parameters - oss.with_experts(24).parameters == 24 * 8 * share
