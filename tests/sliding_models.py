"""Tiny models of the families with sliding or compressed attention, every flag set, and transformers' models of them
and of the catalogue's."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from reapc.arch import known
from reapc.arch.spec import ModelSpec

NAMES = ("gemma-4-26B-A4B", "Step-3.7-Flash", "MiMo-V2-Flash", "DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "MiniMax-M3")

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "vocab_size": 320, "num_hidden_layers": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16", "rope_theta": 10000.0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_ROPE = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "tie_word_embeddings": True,
    "audio_config": None,
    "text_config": {
        **{k: v for k, v in SMALL.items() if k not in ("num_experts_per_tok", "rope_theta")},
        "model_type": "gemma4_text", "num_experts": 6, "top_k_experts": 2, "enable_moe_block": True,
        "attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 8,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": GEMMA_ROPE, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    },
    "vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
        "position_embedding_size": 10, "standardize": True, "use_clipped_linears": True,
    },
}  # fmt: skip
STEP: dict[str, Any] = {
    "model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"],
    "text_config": {
        **{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "num_experts_per_tok")},
        "model_type": "step3p5", "num_attention_groups": 2, "moe_num_experts": 6, "moe_top_k": 2,
        "share_expert_dim": 48, "moe_layers_enum": "1,2,3", "sliding_window": 8, "num_nextn_predict_layers": 1,
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 16},
        "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING], "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0],
        "use_moe_router_bias": True, "use_head_wise_attn_gate": True,
    },
    "vision_config": {"width": 32, "layers": 2, "heads": 2, "patch_size": 4, "image_size": 12, "mlp_ratio": 1.5},
}  # fmt: skip
MIMO: dict[str, Any] = {
    **SMALL, "model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"], "head_dim": 24,
    "v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 24,
    "swa_v_head_dim": 16, "sliding_window": 8, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1],
    "n_routed_experts": 6, "n_shared_experts": None, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
    "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "layernorm_epsilon": 1e-5,
    "partial_rotary_factor": 0.334, "routed_scaling_factor": None, "scoring_func": "sigmoid",
}  # fmt: skip
V4: dict[str, Any] = {
    **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"], "num_key_value_heads": 1, "head_dim": 32, "q_lora_rank": 24,
    "o_groups": 2, "o_lora_rank": 16, "qk_rope_head_dim": 8, "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 1, "num_nextn_predict_layers": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    "hc_mult": 2, "hc_sinkhorn_iters": 2, "hc_eps": 1e-6, "n_routed_experts": 6, "n_shared_experts": 1,
    "sliding_window": 8, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "compress_rope_theta": 160000.0, "norm_topk_prob": True,
}  # fmt: skip
M3: dict[str, Any] = {
    "model_type": "minimax_m3_vl", "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "projector_hidden_size": 40,
    "text_config": {
        **{k: v for k, v in SMALL.items() if k != "moe_intermediate_size"}, "intermediate_size": 32, "rotary_dim": 8,
        "dense_intermediate_size": 96, "shared_intermediate_size": 48, "n_shared_experts": 1, "num_local_experts": 6,
        "moe_layer_freq": [0, 1, 1, 1], "routed_scaling_factor": 2.0, "num_nextn_predict_layers": 1,
        "sparse_attention_config": {
            "sparse_attention_freq": [0, 0, 1, 1], "sparse_disable_index_value": [0, 0, 1, 1], "sparse_index_dim": 24,
            "sparse_num_index_heads": 2, "sparse_topk_blocks": 2, "sparse_block_size": 4, "sparse_local_block": 1,
        },
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gemma4": GEMMA,
    "gemma4 with v_proj": {**GEMMA, "text_config": {**GEMMA["text_config"], "attention_k_eq_v": False}},
    "step3p7": STEP, "mimo_v2_flash": MIMO, "deepseek_v4": V4, "minimax_m3": M3,
}  # fmt: skip
# What transformers does not take from the published keys.
OWN: dict[str, dict[str, Any]] = {
    "mimo_v2_flash": {
        "layer_types": [FULL, SLIDING, SLIDING, FULL], "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]
    },
}  # fmt: skip
# What the converter asks for beside these. transformers 5.23 knows Step's and MiniMax's model_type, and renames their
# keys before the converter sees them; under another it reads them as published.
CONVERTERS_OWN: dict[str, dict[str, Any]] = {
    "mimo_v2_flash": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334}},
    "step3p7": {"model_type": "step3p7 as published"}, "minimax_m3": {"model_type": "minimax_m3_vl as published"},
}  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    return known.spec(known.find(name) or "")


def transformers_model(config: dict[str, Any]) -> Any:
    """transformers' model of ``config``, on the device that is current."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    kept = {k: v for k, v in deepcopy(config).items() if not k.startswith("_") and k != "quantization_config"}
    auto = AutoModelForImageTextToText if "text_config" in kept else AutoModelForCausalLM
    return auto.from_config(CONFIG_MAPPING[kept["model_type"]].from_dict(kept))


def published(name: str) -> dict[str, Any]:
    """The catalogue's config; where that is a flat copy, the text_config of a multimodal one as published."""
    config = known.config(known.find(name) or "")
    if name == "Step-3.7-Flash":
        other = {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128}
        text = {**config, "model_type": "step3p5", "attention_other_setting": other}
        return {"model_type": "step3p7", "text_config": {**text, "n_routed_experts": text.pop("num_experts")}}
    if name == "MiniMax-M3":
        return {"model_type": "minimax_m3_vl", "text_config": {**config, "model_type": "minimax_m3_vl_text"}}
    return config


def mended(tensors: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V4's tensors under four names that transformers 5.23 reads as published and saves otherwise; the headers
    of V4-Pro have them so."""
    pairs = {"model.": "", "embed_tokens": "embed", "hc_head.hc_": "hc_head_", ".attn.norm.": ".attn.kv_norm."}
    for old, new in pairs.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors
