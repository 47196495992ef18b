"""Qwen3-MoE: softmax router with renormalized top-k, grouped-query attention with q and k norms, no shared expert.

Names on disk: ``model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`` (confirmed by the dump of
Qwen3-Coder-30B in facts/tensor-naming.json); the router is ``model.layers.L.mlp.gate.weight`` (E, hidden).
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import read
from reapc.arch.gqa_family import decoder, qwen_layers
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("qwen3_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen3-MoE config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_experts", "num_local_experts"))
    width = d.number("moe_intermediate_size")
    moe = [parts.router("mlp.gate.weight", d.hidden), *parts.experts("mlp.experts", d.hidden, width)]
    kinds, dense = qwen_layers(d, d.attention(bias=d.flag("attention_bias", False), qk_norm=d.head_dim), moe)
    return d.spec(
        family="qwen3_moe",
        model_type=str(config["model_type"]),
        kinds=kinds,
        width=width,
        dense_intermediate_size=dense,
        max_context=read(config, "max_position_embeddings", int, where, 32768),
        gguf_arch="qwen3moe",
        norm_topk=d.flag("norm_topk_prob", False),
    )
