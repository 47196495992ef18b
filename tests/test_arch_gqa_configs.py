"""Broken configs of the plain grouped-query families: the key at fault is named."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from gqa_models import TINY

from reapc.arch import model_spec
from reapc.errors import CannotBeDone, ReapcError

EXPERTS = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_moe dense", "qwen3_vl_moe", "olmoe"), "num_experts"),
    "glm4_moe": "n_routed_experts", "ernie4_5_moe": "moe_num_experts",
}  # fmt: skip
ALWAYS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_experts_per_tok")
NEEDED = {
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size", "num_key_value_heads"),
    "qwen3_moe": ("moe_intermediate_size", "num_key_value_heads"), "qwen3_moe dense": ("intermediate_size",),
    "qwen3_vl_moe": ("moe_intermediate_size", "num_key_value_heads"),
    "glm4_moe": ("moe_intermediate_size", "intermediate_size", "first_k_dense_replace", "num_key_value_heads"),
    "minimax_m2": ("intermediate_size", "head_dim", "num_key_value_heads"),
    "mixtral": ("intermediate_size", "num_key_value_heads"), "phimoe": ("intermediate_size", "num_key_value_heads"),
    "olmoe": ("intermediate_size",), "granitemoe": ("intermediate_size",),
    "ernie4_5_moe": ("moe_intermediate_size", "intermediate_size", "moe_k"),
    "gpt_oss": ("intermediate_size", "head_dim", "sliding_window", "num_key_value_heads"),
    "llama4": ("intermediate_size", "head_dim", "num_key_value_heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_key_is_named(name: str) -> None:
    always = tuple(key for key in ALWAYS if (name, key) != ("ernie4_5_moe", "num_experts_per_tok"))
    for key in (*always, *NEEDED[name], EXPERTS.get(name, "num_local_experts")):
        config = deepcopy(TINY[name])
        part = config.get("text_config", config)
        del part[key]
        if key == "moe_k":
            del part["num_experts_per_tok"]  # its other name
        place = r"config\.json: text_config" if part is not config else r"config\.json"
        with pytest.raises(ReapcError, match=f"^{place}: key '{key}' is missing") as error:
            model_spec(config)
        assert error.value.exit_code == 2


def test_a_missing_part_is_named() -> None:
    for name in ("qwen3_vl_moe", "llama4"):
        config = deepcopy(TINY[name])
        del config["vision_config"]["hidden_size"]
        with pytest.raises(ReapcError, match=r"config\.json: vision_config: key 'hidden_size' is missing"):
            model_spec(config)
        del config["text_config"]
        with pytest.raises(ReapcError, match=r"config\.json: key 'text_config' is missing"):
            model_spec(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts = 6 and num_local_experts = 8 contradict each other"),
        ("qwen3_moe", {"num_attention_heads": 3}, "num_attention_heads = 3 is not a multiple of num_key_value_heads"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok = 7 with 6 experts"),
        ("qwen3_moe", {"hidden_size": "64"}, "hidden_size = '64': int expected"),
        ("qwen3_moe", {"hidden_size": -64}, "hidden_size = -64: a count of at least 1 is expected"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: at least 1 expected"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers names layer 3, and the model has 3 layers"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers = '0': list expected"),
        ("qwen3_moe", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': bool expected"),
        ("granitemoe", {"hidden_size": 66}, "hidden_size = 66 is not a multiple of num_attention_heads = 4"),
        ("glm4_moe", {"n_group": 4}, "6 experts do not divide into n_group = 4 groups"),
        ("glm4_moe", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1: 0 or more expected"),
        ("glm4_moe", {"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types.0. = 'sparse' contradicts first_k_dense"),
        ("minimax_m2", {"attn_type_list": [1]}, "attn_type_list has 1 entries, and the model has 3 layers"),
        ("mixtral", {"sliding_window": -1}, "sliding_window = -1: 0 or more expected"),
        ("phimoe", {"rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0]}}, "short_factor has 1 entries"),
        ("phimoe", {"rope_scaling": {"long_factor": [1.0] * 8}}, "rope_scaling: key 'short_factor' is missing"),
        ("phimoe", {"rope_scaling": {"long_factor": [1.0], "short_factor": [1.0]}}, "8 expected, half of head_dim"),
        ("ernie4_5_moe", {"moe_layer_end_index": 0}, "index = 1 and moe_layer_end_index = 0 contradict"),
        ("ernie4_5_moe", {"moe_layer_end_index": 3}, "or num_hidden_layers = 3"),
        ("ernie4_5_moe", {"moe_k": 3}, "moe_k = 3 and num_experts_per_tok = 2 contradict each other"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval = 0: at least 1 expected"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, and the model has 3 layers"),
        ("gpt_oss", {"layer_types": ["full_attention", "odd", "full_attention"]}, r"layer_types\[1\] = 'odd'"),
        ("gpt_oss", {"experts_per_token": 4}, "num_experts_per_tok = 2 and experts_per_token = 4 contradict"),
        ("llama4", {"moe_layers": [0, 2]}, r"moe_layers = \[0, 2\] contradicts interleave_moe_layer_step = 2"),
        ("llama4", {"no_rope_layers": [1, 1]}, "no_rope_layers has 2 entries, and the model has 4 layers"),
        ("llama4", {"layer_types": ["sliding_attention"] * 4}, r"layer_types\[0\] = 'sliding_attention'"),
        ("llama4", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step = 0: at least 1 expected"),
    ],
)  # fmt: skip
def test_a_broken_config_is_refused_by_key(name: str, changes: dict[str, Any], message: str) -> None:
    config = deepcopy(TINY[name])
    config.get("text_config", config).update(changes)
    with pytest.raises(ReapcError, match=message) as error:
        model_spec(config)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer of this qwen3_moe model has experts"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "no layer of this glm4_moe model has experts"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias = True: a model with biases everywhere is not supported"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list: layers of linear attention"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size = 64: a shared expert"),
    ],
)
def test_what_cannot_be_done_is_said(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotBeDone, match=message):
        model_spec({**deepcopy(TINY[name]), **changes})
