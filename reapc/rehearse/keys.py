"""Which keys of a config.json are widths, heads, windows or layer numbers, over all families, and what they become.

Everything that is not named here stays as published: head sizes, rope, flags, router rules, state sizes. A list with an
entry for every layer needs no name, it is known by its length.
"""

from __future__ import annotations

# Widths become the smallest number of at least this many that shares the real one's factor of 256, 128, 64 or 32: what
# the block sizes of formats divide there, they divide here, and where they fall back they fall back.
HIDDEN, EXPERT, WIDE = 256, 256, 512
HEADS, KV_HEADS = 4, 2
WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp",
    "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
    "share_expert_dim", "moe_latent_size", "routed_expert_hidden_size", "q_lora_rank", "o_lora_rank",
)  # fmt: skip
# Keys that are the width of a dense MLP, where it is not the experts' own.
DENSE_WIDTHS = ("intermediate_size", "dense_intermediate_size", "intermediate_size_mlp")

# Counts with a number of their own; a smaller real one stays.
COUNTS = {
    "num_attention_heads": HEADS, "swa_num_attention_heads": HEADS, "num_sliding_attention_heads": 6,
    "linear_num_key_heads": 2, "mamba_num_heads": 8, "n_groups": 2, "o_groups": 2, "index_n_heads": 4,
    "sliding_window": 64, "sliding_window_size": 64, "index_topk": 64,
}  # fmt: skip
KV_COUNTS = ("num_key_value_heads", "num_attention_groups")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_top_k", "top_k_experts",
    "moe_topk",
)  # fmt: skip
LARGEST_TOP_K = 4

# Lists of layer numbers, by the number that the first layer has in them.
LAYER_NUMBERS = {
    "mlp_only_layers": 0, "moe_layers": 0, "moe_layers_enum": 0, "full_attn_layers": 1, "kda_layers": 1,
}  # fmt: skip
LAYER_PATTERNS = ("hybrid_override_pattern", "index_topk_pattern")  # strings with a letter for every layer
LAST_LAYER = ("moe_layer_end_index",)

# Sections of the text config whose keys are treated like the text config's own.
SECTIONS = ("sparse_attention_config", "linear_attn_config", "attention_other_setting")

# A vision tower's numbers, whatever the tower.
VISION_DEPTH = ("depth", "num_hidden_layers", "vt_num_hidden_layers", "layers")
VISION = {
    "hidden_size": 64, "width": 64, "vt_hidden_size": 64, "qkv_hidden_size": 96, "mm_hidden_size": 64,
    "intermediate_size": 256, "vt_intermediate_size": 256, "num_heads": 2, "heads": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vt_num_attention_heads": 2, "head_dim": 32, "global_head_dim": 32,
    "num_position_embeddings": 64, "position_embedding_size": 64, "init_pos_emb_height": 8, "init_pos_emb_width": 8,
    "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
}  # fmt: skip
VISION_TEXT = ("out_hidden_size", "text_hidden_size")  # the text model's hidden size, stated by the tower
OUTER = {"projector_hidden_size": 64}

# Experts: numbers that keep a plan's ratio are looked for from the first on, fewer where many layers have experts.
EXPERTS, FEWER_EXPERTS = 16, 10
SPREAD = 8
MANY_MOE_LAYERS = 5
MIXTRAL = 8  # llama-quantize takes any model with 8 experts for Mixtral

# Lists of a quantization_config that name modules layer by layer in some models.
MODULE_LISTS = ("modules_to_not_convert", "ignore")

BESIDE = ("expert_dtype",)  # what DeepSeek-V4 says of its packing beside quantization_config

DROPPED = ("quantization_config", "expert_dtype", "auto_map", "transformers_version")
