"""MiniMax-M2.x: sigmoid router whose correction bias sits on the block, q and k norms over all heads, no shared expert.

Names and dtypes as in the headers of MiniMax-M2.7 (github gogongxt/python, scripts/models/minimax_m2.7.md): router and
bias in float32, and no MTP layer although the config promises three modules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import read_list
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import ModelSpec, Parallel
from reapc.errors import CannotBeDone

MODEL_TYPES = ("minimax_m2",)

# vLLM splits these two norms with their heads (MiniMaxText01RMSNormTP).
_SPLIT: dict[str, Parallel] = {"self_attn.q_norm.weight": "column", "self_attn.k_norm.weight": "kv"}


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a MiniMax-M2 config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_local_experts", "num_experts"), own_head_dim=True)
    d.refuse("shared_intermediate_size", "a shared expert")
    if config.get("qk_norm_type", "per_layer") != "per_layer":
        raise CannotBeDone(f"{where}: qk_norm_type = {config['qk_norm_type']!r}: only 'per_layer' is supported")
    if config.get("attn_type_list") is not None and set(read_list(config, "attn_type_list", d.count, where)) != {1}:
        raise CannotBeDone(f"{where}: attn_type_list: layers of linear attention (0) are not supported")
    width = d.number("intermediate_size")
    q, k = (d.heads * d.head_dim, d.kv_heads * d.head_dim) if d.flag("use_qk_norm", True) else (0, None)
    attention = [
        replace(group, parallel=_SPLIT.get(group.name, group.parallel)) for group in d.attention(qk_norm=q, k_norm=k)
    ]
    block = "block_sparse_moe"
    moe = [
        parts.router(f"{block}.gate.weight", d.hidden, "float32"),
        *([parts.router_bias(f"{block}.e_score_correction_bias")] if d.flag("use_routing_bias", True) else []),
        *parts.experts(f"{block}.experts", d.hidden, width, ("w1", "w3", "w2")),
    ]
    return d.spec(
        family="minimax_m2",
        model_type=str(config["model_type"]),
        kinds=[d.layer(attention, moe)] * d.count,
        width=width,
        gguf_arch="minimax-m2",
    )
