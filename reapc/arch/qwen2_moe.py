"""Qwen2-MoE (and Qwen1.5-MoE): softmax router without renormalization, biases on q, k and v, a gated shared expert.

Names as in transformers' class and vLLM's loader: ``mlp.experts.E``, ``mlp.shared_expert``, ``mlp.shared_expert_gate``.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.gqa_family import decoder, qwen_layers
from reapc.arch.qwen3_next import shared_gate
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("qwen2_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen2-MoE config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_experts", "num_local_experts"))
    width, shared = d.number("moe_intermediate_size"), d.number("shared_expert_intermediate_size")
    moe = [
        parts.router("mlp.gate.weight", d.hidden),
        *parts.experts("mlp.experts", d.hidden, width),
        *parts.mlp("mlp.shared_expert", d.hidden, shared, "shared_expert", "_shexp"),
        shared_gate(d.hidden),
    ]
    kinds, dense = qwen_layers(d, d.attention(bias=d.flag("qkv_bias", True), output_bias=False), moe)
    return d.spec(
        family="qwen2_moe",
        model_type=str(config["model_type"]),
        kinds=kinds,
        width=width,
        dense_intermediate_size=dense,
        gguf_arch="qwen2moe",
        shared_experts=1,
        norm_topk=d.flag("norm_topk_prob", False),
    )
