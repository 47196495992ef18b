"""DeepSeek, Kimi-K2 and GLM-5 against transformers, llama.cpp's converter, and the headers of published checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
from mla_models import (
    CONVERT,
    TINY,
    TOKENS,
    V3,
    VISION,
    gguf_parts,
    header,
    mend_names,
    mtp_tensors,
    own_names,
    transformers_model,
)

from reapc.arch import known
from reapc.arch.config import model_spec
from reapc.arch.spec import ModelSpec, TensorGroup
from reapc.errors import CannotBeDone, ReapcError
from reapc.toolchain import find_llamacpp

TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm4_moe_lite", "glm_moe_dsa")
NAMES = [name for name in known.names() if known.config(name)["model_type"] in TYPES]


def test_the_catalogue_has_these_models() -> None:
    assert {name.split("/")[1] for name in NAMES} == {
        "DeepSeek-V2-Lite-Chat", "DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V3.2", "Kimi-K2-Instruct", "Kimi-K2.5",
        "Kimi-K2.6", "GLM-4.7-Flash", "GLM-5", "GLM-5-FP8", "GLM-5.1", "GLM-5.2", "GLM-5.2-FP8",
    }  # fmt: skip


# --- sizes against transformers' model on the meta device ---------------------------------------------------------


def _role(name: str) -> str:
    """The role of a tensor of transformers' own model."""
    if "vision_tower" in name or "mm_projector" in name:
        return "vision"
    marks = {
        "embed_tokens": "embedding", "lm_head": "lm_head", "norm": "norm", ".mlp.gate.": "router",
        ".mlp.experts.": "expert", ".shared_experts.": "shared_expert", ".mlp.": "dense_mlp",
        ".self_attn.": "attention",
    }  # fmt: skip
    return next(role for mark, role in marks.items() if mark in name)


@lru_cache(maxsize=4)
def _counts(name: str) -> dict[str, int]:
    import torch

    counts: dict[str, int] = {}
    with torch.device("meta"):
        model = transformers_model(known.config(name))
    for key, tensor in model.state_dict().items():
        counts[_role(key)] = counts.get(_role(key), 0) + tensor.numel()
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_transformers(name: str) -> None:
    spec, counts = known.spec(name), dict(_counts(name))
    vision = counts.pop("vision", 0)
    assert spec.vision_parameters == vision
    assert spec.parameters_by_role() == counts
    assert spec.parameters == sum(counts.values())
    text = known.config(name).get("text_config", known.config(name))
    share = text["num_experts_per_tok"] / text["n_routed_experts"]
    assert spec.active_parameters == sum(counts.values()) - counts["embedding"] - counts["expert"] * (1 - share)


# In billions: the model cards' total and active parameters, and the difference that their rounding and their own
# counting allow (active: with or without the embedding).
CARDS = {
    "DeepSeek-V2-Lite-Chat": (15.7, 2.4, 0.06), "DeepSeek-V3": (671.0, 37, 0.5), "DeepSeek-R1": (671.0, 37, 0.5),
    "Kimi-K2-Instruct": (1026, 32, 0.5), "GLM-4.7-Flash": (30, 3, 0.6), "GLM-5": (744, 40, 0.9),
    "GLM-5.1": (744, 40, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    total, active, tolerance = CARDS[name]
    spec = known.spec(known.find(name) or "")
    assert spec.parameters / 1e9 == pytest.approx(total, abs=tolerance)
    assert spec.active_parameters / 1e9 == pytest.approx(active, abs=tolerance)


# Tensors and values of the published checkpoints, from their safetensors headers (github gogongxt/python,
# scripts/models/*.md): MTP layers, scales and vision included.
HEADERS = {
    "DeepSeek-V3": (91_991, 684_531_386_000), "DeepSeek-R1": (91_991, 684_531_386_000),
    "DeepSeek-V3.2": (92_425, 685_396_921_376), "Kimi-K2-Instruct": (139_644, 1_026_470_731_056),
    "Kimi-K2.6": (208_550, 170_738_182_128), "GLM-4.7-Flash": (9_703, 31_221_488_576),
    "GLM-5.1": (59_870, 753_864_139_008), "GLM-5.2": (59_585, 753_329_940_480),
    "GLM-5.2-FP8": (118_629, 753_375_793_584),
}  # fmt: skip
# What these checkpoints hold beside our list: Kimi-K2's rotary_emb.inv_freq, Kimi-K2.6's tower and projector
# (27 blocks of 12 tensors, 5 more of the tower and 6 of the projector).
BESIDE = {"Kimi-K2-Instruct": (61, 61 * 56), "Kimi-K2.6": (27 * 12 + 5 + 6, 471_143_920)}


def _all_groups(spec: ModelSpec) -> Iterator[tuple[TensorGroup, int]]:
    """Every group and how often it is stored, MTP included, experts counted one by one."""
    for group, layers in spec.groups(mtp=True):
        yield group, layers * (spec.num_experts if "{e}" in group.name else 1)


def _stored(spec: ModelSpec) -> tuple[int, int]:
    """Tensors and values on disk in the published format: FP8 with a scale per 128 x 128, or int4 experts with a scale
    per 32, eight packed into an int32, and two numbers for the shape; else as it is."""
    quantization = spec.quantization or {}
    tensors = values = 0
    for group, count in _all_groups(spec):
        size = prod(group.shape) * (spec.num_experts if group.expert_axis is not None else 1)
        if quantization.get("quant_method") == "fp8" and group.linears:
            rows, columns = group.shape
            tensors, values = tensors + 2 * count, values + count * (size + -(-rows // 128) * -(-columns // 128))
        elif quantization.get("quant_method") == "compressed-tensors" and group.role == "expert":
            tensors, values = tensors + 3 * count, values + count * (size // 8 + size // 32 + 2)
        else:
            tensors, values = tensors + count, values + count * size
    return tensors, values


@pytest.mark.parametrize("name", HEADERS)
def test_tensors_and_values_equal_the_published_headers(name: str) -> None:
    config = known.config(known.find(name) or "")
    if name == "Kimi-K2.6":  # the catalogue's copy has lost the key: it is K2.5's
        config["quantization_config"] = known.spec(known.find("Kimi-K2.5") or "").quantization
    tensors, values = _stored(model_spec(config))
    extra = BESIDE.get(name, (0, 0))
    assert (tensors + extra[0], values + extra[1]) == HEADERS[name]


def test_float32_tensors_are_those_of_the_published_headers() -> None:
    def float32(name: str) -> set[str]:
        return {g.name.rsplit(".", 2)[-2] for g, _ in known.spec(known.find(name) or "").groups(mtp=True) if g.dtype}

    assert float32("GLM-5.2") == float32("DeepSeek-V3") == float32("GLM-4.7-Flash") == {"gate"}  # the router's bias
    assert float32("DeepSeek-V2-Lite-Chat") == set()
    assert float32("DeepSeek-V3.2") == {
        "gate", "norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "k_norm",
        "enorm", "hnorm",
    }  # fmt: skip


# --- names and shapes: tiny models that transformers and the converter write ----------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved by transformers, under the published config; the MTP tensors, which it has not, beside them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    root = Path(__file__).resolve().parent.parent
    tokenizer = AutoTokenizer.from_pretrained(root / "demo" / "model")
    tokenizer.add_special_tokens({"extra_special_tokens": list(TOKENS)}, replace_extra_special_tokens=False)
    folders: dict[str, Path] = {}
    for name, config in TINY.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        transformers_model(config).to(torch.bfloat16).save_pretrained(folder)
        if name == "kimi_k25":
            mend_names(folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        if mtp := mtp_tensors(model_spec(config)):
            tensors = {tensor.name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in mtp}
            save_file(tensors, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_equal_a_saved_model(name: str, tiny: dict[str, Path]) -> None:
    spec = model_spec(TINY[name])
    saved = header(tiny[name] / "model.safetensors")
    vision = {k: saved.pop(k) for k in list(saved) if "vision_tower." in k or "mm_projector." in k}
    assert {tensor.name: tensor.shape for tensor in spec.tensors()} == saved
    assert sum(map(prod, vision.values())) == spec.vision_parameters


@pytest.fixture(scope="module")
def converted(tiny: dict[str, Path]) -> dict[str, Path]:
    """The same, through llama.cpp's converter (one process for all: it loads torch once)."""
    tools = find_llamacpp()
    if tools.convert is None:
        pytest.skip("no llama.cpp: reapc doctor --install")
    folders = [name for name in TINY if name != "kimi_k2"]  # Kimi-K2 is DeepSeek-V3 to the converter
    command = [sys.executable, "-P", "-c", CONVERT, str(tools.convert), *(str(tiny[name]) for name in folders)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return {name: tiny[name] / "model.gguf" for name in folders}


@pytest.mark.parametrize(
    ("name", "arch", "mtp_written"),
    [
        ("deepseek_v2", "deepseek2", 0), ("deepseek_v3", "deepseek2", 0), ("deepseek_v32", "deepseek32", 6),
        ("kimi_k25", "deepseek2", 0), ("glm4_moe_lite", "deepseek2", 6), ("glm_moe_dsa", "glm-dsa", 4),
    ],
)  # fmt: skip
def test_gguf_parts_equal_the_converter(name: str, arch: str, mtp_written: int, converted: dict[str, Path]) -> None:
    import gguf

    reader = gguf.GGUFReader(converted[name])
    written = {tensor.name: tuple(int(n) for n in tensor.shape[::-1]) for tensor in reader.tensors}
    spec = model_spec(TINY[name])
    assert gguf_parts(spec) == written
    assert sum(".nextn." in tensor for tensor in written) == mtp_written
    field = reader.get_field("general.architecture")
    assert field is not None
    assert field.contents() == spec.gguf_arch == arch
    assert not spec.gguf_extra


def test_kimi_k2_is_deepseek_v3_in_gguf() -> None:
    assert model_spec(TINY["kimi_k2"]).gguf_arch == "deepseek2"
    v3 = model_spec({**TINY["kimi_k2"], "model_type": "deepseek_v3"})
    assert gguf_parts(model_spec(TINY["kimi_k2"])) == gguf_parts(v3)


# --- what the engines need ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("DeepSeek-V3", 61 * 576), ("Kimi-K2.5", 61 * 576), ("DeepSeek-V2-Lite-Chat", 27 * 576),
        ("GLM-4.7-Flash", 47 * 576), ("DeepSeek-V3.2", 61 * (576 + 128)), ("GLM-5", 78 * (576 + 128)),
        ("GLM-5.2", 78 * 576 + 21 * 128),
    ],
)  # fmt: skip
def test_cache_elements_per_token(name: str, elements: int) -> None:
    spec = known.spec(known.find(name) or "")
    streams = [stream for layer in spec.layers for stream in layer.kind.cache]
    assert sum(stream.elements for stream in streams) == elements
    assert {stream.heads for stream in streams} == {0}  # whole on every rank
    assert sum(stream.kind == "latent" for stream in streams) == spec.num_layers
    assert (
        any(stream.kind == "index" for stream in streams)
        == spec.sparse_attention
        == ("5" in name[4:5] or "3.2" in name)
    )


def test_glm5_keeps_109824_bytes_per_token_at_f16() -> None:
    spec = known.spec("zai-org/GLM-5")
    assert 2 * sum(stream.elements for layer in spec.layers for stream in layer.kind.cache) == 109_824


def test_shared_layers_of_glm_5_2_have_no_indexer() -> None:
    spec = known.spec("zai-org/GLM-5.2")
    stored = {layer.index for layer in spec.layers if any("indexer" in group.name for group in layer.kind.tensors)}
    cached = {layer.index for layer in spec.layers if any(stream.kind == "index" for stream in layer.kind.cache)}
    assert stored == cached == {0, 1, *range(2, 78, 4)}  # the header: 0-2, 6, 10, ... 74, and the MTP layer 78
    assert any("indexer" in group.name for group in spec.mtp_layers[0].kind.tensors)


def test_the_schedule_of_indexers_equals_the_list() -> None:
    config = known.config("zai-org/GLM-5.2")
    types = config.pop("indexer_types")
    pattern = "".join(kind[0].upper() for kind in types)
    assert model_spec(config).layers == known.spec("zai-org/GLM-5.2").layers
    assert model_spec({**config, "index_topk_pattern": pattern}).layers == known.spec("zai-org/GLM-5.2").layers


# vLLM 0.33: fused_qkv_a_proj and the indexer are replicated ("no tensor parallel"), as MLA's latent is one head.
PARALLEL = {
    "self_attn.q_a_proj": "replicate", "self_attn.q_b_proj": "column", "self_attn.kv_a_proj_with_mqa": "replicate",
    "self_attn.kv_b_proj": "column", "self_attn.o_proj": "row", "self_attn.q_proj": "column",
    "indexer.wq_b": "replicate", "indexer.wk": "replicate", "indexer.weights_proj": "replicate",
    "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row", "mlp.gate.": "replicate",
    "shared_experts.gate_proj": "column", "shared_experts.up_proj": "column", "shared_experts.down_proj": "row",
    "experts.{e}.gate_proj": "expert", "experts.{e}.up_proj": "expert", "experts.{e}.down_proj": "expert_row",
    "norm": "replicate", "eh_proj": "replicate", "embed_tokens": "vocab", "lm_head": "vocab",
    "shared_head.head": "vocab",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_sharding_is_vllms(name: str) -> None:
    seen = set()
    for group, _ in model_spec(TINY[name]).groups(mtp=True):
        marks = [mark for mark in PARALLEL if mark in group.name]
        mark = max(marks, key=len)
        assert group.parallel == PARALLEL[mark], group.name
        seen.add(mark)
    assert {"self_attn.o_proj", "experts.{e}.down_proj", "shared_experts.down_proj", "norm"} <= seen


def test_numbers_of_the_router_and_the_attention() -> None:
    v3, v2 = known.spec("deepseek-ai/DeepSeek-V3"), known.spec("deepseek-ai/DeepSeek-V2-Lite-Chat")
    assert (v3.n_group, v3.topk_group, v3.top_k, v3.norm_topk, v3.shared_experts) == (8, 4, 8, True, 1)
    assert (v2.n_group, v2.topk_group, v2.top_k, v2.norm_topk, v2.shared_experts) == (1, 1, 6, False, 2)
    assert (v3.latent_attention, v3.sparse_attention, v3.head_dim, v3.max_context) == (True, False, 192, 163_840)
    assert (v3.moe_layers, v2.moe_layers) == (tuple(range(3, 61)), tuple(range(1, 27)))
    assert v3.expert_count_keys == ("n_routed_experts",)
    kimi = known.spec("moonshotai/Kimi-K2.5")
    assert kimi.expert_count_keys == ("text_config.n_routed_experts",)
    assert (kimi.quantization or {})["format"] == "pack-quantized"
    assert (kimi.model_type, kimi.dtype, kimi.max_context) == ("kimi_k25", "bfloat16", 262_144)


def test_pruning_takes_a_share_of_main_and_mtp_experts() -> None:
    spec = known.spec("zai-org/GLM-5")
    kept = spec.with_experts(192)
    expert = 3 * 6144 * 2048
    assert spec.parameters - kept.parameters == 75 * 64 * (expert + 6144 + 1)  # with the router's row and its bias
    assert spec.mtp_parameters - kept.mtp_parameters == 64 * (expert + 6144 + 1)


# --- broken configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "n_routed_experts", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "vocab_size",
     "moe_intermediate_size", "num_experts_per_tok", "num_hidden_layers", "first_k_dense_replace", "index_head_dim",
     "index_n_heads", "index_topk"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_a_missing_key_is_named(name: str, key: str) -> None:
    config = {k: v for k, v in TINY[name].items() if k != key}
    with pytest.raises(ReapcError, match=f"config.json: key '{key}' is missing"):
        model_spec(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("glm_moe_dsa", {"indexer_types": ["full"] * 3}, "indexer_types has 3 entries, and the model has 4 layers"),
        ("glm_moe_dsa", {"indexer_types": ["full", "half"] * 2}, r"indexer_types\[1\] = 'half': 'full' or 'shared'"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 4}, r"indexer_types\[0\] = 'shared': there is no layer before"),
        ("glm_moe_dsa", {"indexer_types": None, "index_topk_pattern": "FS"}, "index_topk_pattern has 2 entries"),
        ("glm_moe_dsa", {"indexer_types": 4}, "indexer_types = 4: list expected"),
        ("glm_moe_dsa", {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
         r"mlp_layer_types\[1\] = 'sparse' contradicts first_k_dense_replace = 2"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types has 2 entries"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "dense"], "first_k_dense_replace": None},
         r"mlp_layer_types\[2\] = 'dense' contradicts mlp_layer_types\[1\] = 'sparse'"),
        ("deepseek_v3", {"num_local_experts": 4}, "n_routed_experts = 8 and num_local_experts = 4 contradict"),
        ("deepseek_v3", {"n_routed_experts": 9}, "9 experts do not divide into n_group = 2"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 with 8 experts"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1"),
        ("deepseek_v3", {"hidden_size": "64"}, "hidden_size = '64': int expected"),
        ("deepseek_v3", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers = 'one': int expected"),
        ("deepseek_v32", {"q_lora_rank": None}, "key 'q_lora_rank' is missing"),
        ("kimi_k25", {"vision_config": None}, "key 'vision_config' is missing"),
        ("kimi_k25", {"vision_config": {**VISION, "merge_kernel_size": [2]}}, "vision_config: merge_kernel_size"),
        ("kimi_k25", {"text_config": {**V3, "model_type": "llama"}}, "text_config: model_type = 'llama'"),
        ("kimi_k25", {"text_config": {**V3, "kv_lora_rank": None}}, "text_config: key 'kv_lora_rank' is missing"),
        ("kimi_k25", {"text_config": None}, "key 'text_config' is missing"),
    ],
)  # fmt: skip
def test_a_broken_config_is_refused_by_key(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReapcError, match=message) as error:
        model_spec({**TINY[name], **changes})
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"first_k_dense_replace": 3}, "no layer of this deepseek_v3 model has experts"),
     ({"attention_bias": True}, "attention_bias = true")],
)  # fmt: skip
def test_what_cannot_be_done_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotBeDone, match=message):
        model_spec({**TINY["deepseek_v3"], **changes})


def test_a_missing_vision_key_is_named() -> None:
    vision = {k: v for k, v in VISION.items() if k != "vt_hidden_size"}
    with pytest.raises(ReapcError, match="vision_config: key 'vt_hidden_size' is missing"):
        model_spec({**TINY["kimi_k25"], "vision_config": vision})


def test_transformers_own_vision_keys_count_the_same() -> None:
    own = model_spec({**TINY["kimi_k25"], "vision_config": own_names(VISION)}).vision_parameters
    assert own == model_spec(TINY["kimi_k25"]).vision_parameters
