"""Configs of Gemma-4, Step-3.7, MiMo-V2, DeepSeek-V4 and MiniMax-M3 that are trimmed, broken or not supported."""

from __future__ import annotations

from typing import Any

import pytest
from sliding_models import FULL, TINY, published, spec_of
from specs import changed

from reapc.arch.config import model_spec
from reapc.errors import CannotBeDone, ReapcError


def test_a_flat_copy_is_its_published_model() -> None:
    """Sliding heads, attention of MTP layers and towers of the trimmed copies are those of the nested configs."""
    for name in ("Step-3.7-Flash", "MiniMax-M3"):
        flat, nested = spec_of(name), model_spec(published(name))
        assert (flat.layers, flat.mtp_layers, flat.vision_parameters) == (
            nested.layers, nested.mtp_layers, nested.vision_parameters
        )  # fmt: skip
        assert all(key.startswith("text_config.") for key in nested.expert_count_keys)
        assert model_spec({**published(name), "vision_config": None}).vision_parameters == 0


REQUIRED = {
    "gemma4": "text_config/hidden_size text_config/num_experts text_config/top_k_experts text_config/layer_types "
              "text_config/global_head_dim text_config/sliding_window text_config/moe_intermediate_size "
              "vision_config/position_embedding_size",
    "step3p7": "text_config/moe_num_experts text_config/layer_types text_config/sliding_window "
               "text_config/share_expert_dim text_config/head_dim",
    "mimo_v2_flash": "hybrid_layer_pattern moe_layer_freq swa_num_key_value_heads swa_head_dim v_head_dim "
                     "sliding_window n_routed_experts intermediate_size",
    "deepseek_v4": "compress_ratios num_hash_layers head_dim o_groups o_lora_rank q_lora_rank hc_mult sliding_window "
                   "index_head_dim index_n_heads n_routed_experts vocab_size",
    "minimax_m3": "text_config/moe_layer_freq text_config/sparse_attention_config text_config/dense_intermediate_size "
                  "text_config/sparse_attention_config/sparse_attention_freq text_config/shared_intermediate_size "
                  "text_config/sparse_attention_config/sparse_index_dim text_config/num_local_experts",
}  # fmt: skip


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, keys in REQUIRED.items() for path in keys.split()])
def test_a_missing_key_is_named(name: str, path: str) -> None:
    *outer, key = path.split("/")
    where = "".join(f": {step}" for step in outer)
    with pytest.raises(ReapcError, match=f"config.json{where}: key '{key}' is missing") as error:
        model_spec(changed(TINY[name], path.replace("/", "."), None))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("gemma4", "text_config/layer_types", [FULL] * 3, "layer_types has 3 entries, and the model has 4 layers"),
        ("gemma4", "text_config/layer_types", [FULL] * 3 + ["linear"], r"layer_types\[3\] = 'linear': 'sliding_att"),
        ("step3p7", "text_config/layer_types", [FULL] * 6, "layer_types has 6 entries, and the model has 4 layers"),
        ("step3p7", "text_config/first_k_dense_replace", 2, "moe_layers_enum contradicts first_k_dense_replace = 2"),
        ("step3p7", "text_config/moe_layers_enum", "1,x", "moe_layers_enum = '1,x': numbers of layers"),
        ("step3p7", "text_config/num_key_value_heads", 4, "num_key_value_heads = 4 and num_attention_groups = 2 con"),
        ("step3p7", "text_config/n_routed_experts", 8, "moe_num_experts = 6 and n_routed_experts = 8 contradict"),
        ("step3p7", "text_config/attention_other_setting/num_attention_heads", 5,
         "num_attention_heads = 5 is not a multiple"),
        ("mimo_v2_flash", "hybrid_layer_pattern", [0, 1, 1], "hybrid_layer_pattern has 3 entries"),
        ("mimo_v2_flash", "moe_layer_freq", [0, 1, 1, 1, 1],
         "moe_layer_freq has 5 entries, and the model has 4 layers"),
        ("mimo_v2_flash", "moe_layer_freq", [0, 1, 1, "s"], r"moe_layer_freq\[3\] = 's': 0 or 1 expected"),
        ("deepseek_v4", "compress_ratios", [0, 4, 128],
         "compress_ratios has 3 entries, and the model has 4 layers and 1"),
        ("deepseek_v4", "compress_ratios", [0, 4, 128, 8], r"compress_ratios\[3\] = 8: one of 0, 4, 128 expected"),
        ("deepseek_v4", "compress_ratios", "[0, 4]", r"compress_ratios = '\[0, 4\]': list expected"),
        ("deepseek_v4", "o_groups", 3, "num_attention_heads = 4 is not a multiple of o_groups = 3"),
        ("deepseek_v4", "num_key_value_heads", 2, "num_key_value_heads = 2: 1 expected"),
        ("deepseek_v4", "num_experts_per_tok", 7, "num_experts_per_tok = 7 with 6 experts"),
        ("minimax_m3", "text_config/moe_layer_freq", [0, 1], "text_config: moe_layer_freq has 2 entries"),
        ("minimax_m3", "text_config/moe_layer_freq", [0, 1, 0, 1],
         "moe_layer_freq contradicts first_k_dense_replace = 1"),
        ("minimax_m3", "text_config/first_k_dense_replace", 2, "moe_layer_freq contradicts first_k_dense_replace = 2"),
        ("minimax_m3", "text_config/moe_intermediate_size", 40,
         "moe_intermediate_size = 40 contradicts intermediate_size"),
        ("minimax_m3", "text_config/sparse_attention_config/sparse_attention_freq", [1],
         "sparse_attention_freq has 1 entries"),
        ("minimax_m3", "text_config/sparse_attention_config/sparse_num_index_heads", 4,
         "sparse_num_index_heads = 4 is not num_key_value_heads"),
    ],
)  # fmt: skip
def test_a_broken_config_is_refused_by_key(name: str, path: str, value: Any, message: str) -> None:
    with pytest.raises(ReapcError, match=message) as error:
        model_spec(changed(TINY[name], path.replace("/", "."), value))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("gemma4", "text_config/enable_moe_block", False, "no experts to prune: this gemma4 model is dense"),
        ("gemma4", "text_config/num_kv_shared_layers", 2, "num_kv_shared_layers = 2: a cache that layers share"),
        ("gemma4", "text_config/hidden_size_per_layer_input", 16, "hidden_size_per_layer_input = 16"),
        ("gemma4", "audio_config", {"hidden_size": 8}, "an audio tower is not supported"),
        ("mimo_v2_flash", "n_shared_experts", 1, "n_shared_experts = 1: a shared expert"),
        ("mimo_v2_flash", "moe_layer_freq", [0, 0, 0, 0], "no layer of this mimo_v2_flash model has experts"),
        ("minimax_m3", "text_config/attention_output_gate", True, "attention_output_gate = True: an output gate"),
        ("minimax_m3", "text_config/sparse_attention_config/sparse_disable_index_value", [0, 0, 0, 1],
         r"sparse_disable_index_value\[2\] = 0: index values"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(name: str, path: str, value: Any, message: str) -> None:
    with pytest.raises(CannotBeDone, match=message) as error:
        model_spec(changed(TINY[name], path.replace("/", "."), value))
    assert error.value.exit_code == 1
