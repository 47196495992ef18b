"""Tiny models with the flags of the real hybrid families, and the tensors that transformers does not save."""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]

# Tiny models with the flags of the real ones.
NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "full_attention_interval": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "vocab_size": 2048, "max_position_embeddings": 512, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN5: dict[str, Any] = {
    "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "tie_word_embeddings": False,
    "text_config": {
        **{k: v for k, v in NEXT.items() if k not in ("architectures", "full_attention_interval", "mlp_only_layers")},
        "model_type": "qwen3_5_moe_text", "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "model_type": "qwen3_5_moe_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "in_channels": 3, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    },
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "model_type": "kimi_linear", "architectures": ["KimiLinearForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 16, "mla_use_nope": True, "first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "num_expert_group": 1, "num_experts": 8, "num_experts_per_token": 2,
    "moe_intermediate_size": 16, "num_shared_experts": 2, "topk_group": 1, "routed_scaling_factor": 2.0,
    "vocab_size": 2048, "model_max_length": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    "linear_attn_config": {
        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4,
    },
}  # fmt: skip
KIMI3: dict[str, Any] = {
    "model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"], "eos_token_id": 2,
    "text_config": {
        **{k: v for k, v in LINEAR.items() if k not in ("model_max_length", "head_dim")}, "q_lora_rank": 24,
        "hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 2, "latent_moe_use_norm": True, "mla_use_output_gate": True,
        "routed_expert_hidden_size": 48, "max_position_embeddings": 512,
        "linear_attn_config": {**LINEAR["linear_attn_config"], "use_full_rank_gate": True, "gate_lower_bound": -5.0},
    },
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hidden_size": 64,
    "hybrid_override_pattern": "MEM*E-", "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 16, "conv_kernel": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40, "moe_latent_size": 32, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "vocab_size": 2048,
    "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5, "use_conv_bias": True, "tie_word_embeddings": False,
    "chunk_size": 16, "expand": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu", "time_step_limit": [0.0, 1e4],
}  # fmt: skip


def shapes(text: str, **repeat: int) -> Shapes:
    """Lines of "name: 8 x 64"; {e} in a name stands for ``repeat['e']`` tensors."""
    found: Shapes = {}
    for line in text.strip().splitlines():
        name, dims = (part.strip() for part in line.split(":"))
        for e in range(repeat["e"] if "{e}" in name else 1):
            found[name.replace("{e}", str(e))] = tuple(int(d) for d in dims.split(" x "))
    return found


# Tensors that no transformers class saves, as the published checkpoints name them, at the tiny sizes. Qwen3-Next's:
# dump of its headers, github gogongxt/python; Nemotron's: 270 tensors in Nemotron-3.5's headers.
QWEN_MTP = """
    mtp.fc.weight: 64 x 128
    mtp.norm.weight: 64
    mtp.pre_fc_norm_embedding.weight: 64
    mtp.pre_fc_norm_hidden.weight: 64
    mtp.layers.0.input_layernorm.weight: 64
    mtp.layers.0.post_attention_layernorm.weight: 64
    mtp.layers.0.self_attn.q_proj.weight: 256 x 64
    mtp.layers.0.self_attn.k_proj.weight: 64 x 64
    mtp.layers.0.self_attn.v_proj.weight: 64 x 64
    mtp.layers.0.self_attn.o_proj.weight: 64 x 128
    mtp.layers.0.self_attn.q_norm.weight: 32
    mtp.layers.0.self_attn.k_norm.weight: 32
    mtp.layers.0.mlp.gate.weight: 8 x 64
    mtp.layers.0.mlp.shared_expert.gate_proj.weight: 40 x 64
    mtp.layers.0.mlp.shared_expert.up_proj.weight: 40 x 64
    mtp.layers.0.mlp.shared_expert.down_proj.weight: 64 x 40
    mtp.layers.0.mlp.shared_expert_gate.weight: 1 x 64
"""
SINGLE = """
    mtp.layers.0.mlp.experts.{e}.gate_proj.weight: 16 x 64
    mtp.layers.0.mlp.experts.{e}.up_proj.weight: 16 x 64
    mtp.layers.0.mlp.experts.{e}.down_proj.weight: 64 x 16
"""
FUSED = """
    mtp.layers.0.mlp.experts.gate_up_proj: 8 x 32 x 64
    mtp.layers.0.mlp.experts.down_proj: 8 x 64 x 16
"""
NEMOTRON_MTP = """
    mtp.layers.0.enorm.weight: 64
    mtp.layers.0.hnorm.weight: 64
    mtp.layers.0.eh_proj.weight: 64 x 128
    mtp.layers.0.norm.weight: 64
    mtp.layers.0.mixer.q_proj.weight: 64 x 64
    mtp.layers.0.mixer.k_proj.weight: 32 x 64
    mtp.layers.0.mixer.v_proj.weight: 32 x 64
    mtp.layers.0.mixer.o_proj.weight: 64 x 64
    mtp.layers.1.norm.weight: 64
    mtp.layers.1.mixer.gate.weight: 8 x 64
    mtp.layers.1.mixer.gate.e_score_correction_bias: 8
    mtp.layers.1.mixer.fc1_latent_proj.weight: 32 x 64
    mtp.layers.1.mixer.fc2_latent_proj.weight: 64 x 32
    mtp.layers.1.mixer.experts.{e}.up_proj.weight: 24 x 32
    mtp.layers.1.mixer.experts.{e}.down_proj.weight: 32 x 24
    mtp.layers.1.mixer.shared_experts.up_proj.weight: 40 x 64
    mtp.layers.1.mixer.shared_experts.down_proj.weight: 64 x 40
    mtp.layers.1.final_layernorm.weight: 64
"""


def k3_tensors() -> Shapes:
    """The tiny Kimi-K3, by the dump of the real one's headers (experts before MXFP4 packing)."""
    text = "lm_head.weight: 2048 x 64\n"
    for name, dims in (("embed_tokens", "2048 x 64"), ("norm", "64"), ("output_attn_res_norm", "64")):
        text += f"model.{name}.weight: {dims}\n"
    text += "model.output_attn_res_proj.weight: 1 x 64\n"
    for i in range(4):
        p, a, m = (f"model.layers.{i}.{part}" for part in ("", "self_attn.", "block_sparse_moe."))
        for name in ("input_layernorm", "post_attention_layernorm", "mlp_res_norm", "self_attention_res_norm"):
            text += f"{p}{name}.weight: 64\n"
        text += f"{p}mlp_res_proj.weight: 1 x 64\n{p}self_attention_res_proj.weight: 1 x 64\n"
        text += f"{a}g_proj.weight: 64 x 64\n{a}o_proj.weight: 64 x 64\n"
        if i == 3:
            text += f"{a}q_a_proj.weight: 24 x 64\n{a}q_a_layernorm.weight: 24\n{a}q_b_proj.weight: 96 x 24\n"
            text += f"{a}kv_a_proj_with_mqa.weight: 40 x 64\n{a}kv_a_layernorm.weight: 32\n"
            text += f"{a}kv_b_proj.weight: 128 x 32\n"
        else:
            for n in "qkv":
                text += f"{a}{n}_proj.weight: 64 x 64\n{a}{n}_conv1d.weight: 64 x 1 x 4\n"
            text += f"{a}A_log: 128\n{a}dt_bias: 64\n{a}b_proj.weight: 4 x 64\n{a}o_norm.weight: 16\n"
            text += f"{a}f_a_proj.weight: 16 x 64\n{a}f_b_proj.weight: 64 x 16\n"
        if i == 0:
            text += (
                f"{p}mlp.gate_proj.weight: 96 x 64\n{p}mlp.up_proj.weight: 96 x 64\n{p}mlp.down_proj.weight: 64 x 96\n"
            )
            continue
        text += f"{m}gate.weight: 8 x 64\n{m}gate.e_score_correction_bias: 8\n{m}routed_expert_norm.weight: 48\n"
        text += f"{m}routed_expert_down_proj.weight: 48 x 64\n{m}routed_expert_up_proj.weight: 64 x 48\n"
        text += f"{m}experts.{{e}}.w1.weight: 16 x 48\n{m}experts.{{e}}.w3.weight: 16 x 48\n"
        text += f"{m}experts.{{e}}.w2.weight: 48 x 16\n{m}shared_experts.down_proj.weight: 64 x 32\n"
        text += f"{m}shared_experts.gate_proj.weight: 32 x 64\n{m}shared_experts.up_proj.weight: 32 x 64\n"
    return {f"language_model.{name}": shape for name, shape in shapes(text, e=8).items()}


# name -> (config, what transformers does not save)
TINY: dict[str, tuple[dict[str, Any], Shapes]] = {
    "qwen3next": (NEXT, shapes(QWEN_MTP + SINGLE.lstrip("\n"), e=8)),
    "qwen35moe": (QWEN5, shapes(QWEN_MTP + FUSED.lstrip("\n"), e=8)),
    "kimi-linear": (LINEAR, {}),
    "kimi-k3": (KIMI3, k3_tensors()),
    "nemotron_h_moe": (NEMOTRON, shapes(NEMOTRON_MTP, e=8)),
}


def fuse_experts(tensors: dict[str, Any], count: int) -> dict[str, Any]:
    """Experts as Qwen3.5 publishes them: transformers saves them one by one."""
    import torch

    tensors = dict(tensors)
    for prefix in {key.split(".experts.")[0] for key in tensors if ".experts." in key}:
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.experts.{e}.{n}_proj.weight") for e in range(count)])
            for n in ("gate", "up", "down")
        )
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{prefix}.experts.down_proj"] = down
    return tensors
