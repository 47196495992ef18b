"""OLMoE: softmax router without renormalization (unless the config says so), q and k norms over all heads (whole on
every tensor-parallel rank in vLLM, which gathers q and k before them)."""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("olmoe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of an OLMoE config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_experts", "num_local_experts"), equal_heads=True)
    width = d.number("intermediate_size")
    attention = d.attention(
        bias=d.flag("attention_bias", False), qk_norm=d.heads * d.head_dim, k_norm=d.kv_heads * d.head_dim
    )
    moe = [parts.router("mlp.gate.weight", d.hidden), *parts.experts("mlp.experts", d.hidden, width)]
    return d.spec(
        family="olmoe",
        model_type=str(config["model_type"]),
        kinds=[d.layer(attention, moe)] * d.count,
        width=width,
        gguf_arch="olmoe",
        norm_topk=d.flag("norm_topk_prob", False),
    )
