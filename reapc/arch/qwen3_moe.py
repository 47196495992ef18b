"""Qwen3-MoE: softmax router with renormalized top-k, grouped-query attention with q and k norms, no shared expert.

Names on disk: ``model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`` (confirmed by the dump of
Qwen3-Coder-30B in facts/tensor-naming.json); the router is ``model.layers.L.mlp.gate.weight`` (E, hidden).
"""

from __future__ import annotations

from typing import Any

from reapc.arch.config import read
from reapc.arch.spec import LayerSpec, ModelSpec, TensorSpec

MODEL_TYPES = ("qwen3_moe",)
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen3-MoE config; ReapcError names a key that is missing or wrong."""
    keys = tuple(key for key in EXPERT_COUNT_KEYS if key in config)
    experts = read(config, keys[0] if keys else EXPERT_COUNT_KEYS[0], int, where)
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    kv_heads = read(config, "num_key_value_heads", int, where, heads)
    head_dim = read(config, "head_dim", int, where, hidden // heads)
    width = read(config, "moe_intermediate_size", int, where)
    dense = read(config, "intermediate_size", int, where, 0)
    count = read(config, "num_hidden_layers", int, where)
    vocab = read(config, "vocab_size", int, where)
    step = read(config, "decoder_sparse_step", int, where, 1)
    dense_layers = set(config.get("mlp_only_layers") or [])
    bias = bool(config.get("attention_bias", False))

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        q, kv = heads * head_dim, kv_heads * head_dim
        tensors = [
            TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), "norm", index),
            TensorSpec(f"{attention}.q_proj.weight", (q, hidden), "attention", index),
            TensorSpec(f"{attention}.k_proj.weight", (kv, hidden), "attention", index),
            TensorSpec(f"{attention}.v_proj.weight", (kv, hidden), "attention", index),
            TensorSpec(f"{attention}.o_proj.weight", (hidden, q), "attention", index),
            TensorSpec(f"{attention}.q_norm.weight", (head_dim,), "norm", index),
            TensorSpec(f"{attention}.k_norm.weight", (head_dim,), "norm", index),
            TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm", index),
        ]
        if bias:
            for name, size in (("q", q), ("k", kv), ("v", kv), ("o", hidden)):
                tensors.append(TensorSpec(f"{attention}.{name}_proj.bias", (size,), "attention", index))
        is_moe = index not in dense_layers and experts > 0 and (index + 1) % step == 0
        if is_moe:
            tensors.append(TensorSpec(f"{prefix}.mlp.gate.weight", (experts, hidden), "router", index))
            for e in range(experts):
                for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                    tensors.append(
                        TensorSpec(f"{prefix}.mlp.experts.{e}.{name}_proj.weight", shape, "expert", index, e)
                    )
        else:
            for name, shape in (("gate", (dense, hidden)), ("up", (dense, hidden)), ("down", (hidden, dense))):
                tensors.append(TensorSpec(f"{prefix}.mlp.{name}_proj.weight", shape, "dense_mlp", index))
        return LayerSpec(index, is_moe, kv_heads, head_dim, tuple(tensors))

    tied = bool(config.get("tie_word_embeddings", False))
    outer = [
        TensorSpec("model.embed_tokens.weight", (vocab, hidden), "embedding"),
        TensorSpec("model.norm.weight", (hidden,), "norm"),
    ]
    if not tied:
        outer.append(TensorSpec("lm_head.weight", (vocab, hidden), "lm_head"))
    return ModelSpec(
        family="qwen3_moe",
        model_type=str(config["model_type"]),
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=count,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=read(config, "num_experts_per_tok", int, where),
        expert_intermediate_size=width,
        dense_intermediate_size=dense,
        max_context=read(config, "max_position_embeddings", int, where, 32768),
        tied_embeddings=tied,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        expert_count_keys=keys,
        layers=tuple(layer(i) for i in range(count)),
        outer_tensors=tuple(outer),
        gguf_arch="qwen3moe",
        norm_topk=bool(config.get("norm_topk_prob", False)),
        quantization=config.get("quantization_config"),
    )
