"""MiMo-V2-Flash: sigmoid router with a correction bias, no shared expert, five of six layers sliding over 128 tokens
with attention sinks and KV heads of their own; K heads are wider than V heads.

Names as transformers 5.23 saves them, experts one by one. The published checkpoint has three MTP layers under
``model.mtp.layers`` (llama.cpp's converter hard-codes the number); the config does not declare them, so they are not
counted here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import read, read_list
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import LayerKind, ModelSpec

MODEL_TYPES = ("mimo_v2_flash",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a MiMo-V2-Flash config; ReapcError names a key that is missing, wrong or contradicted."""
    d = decoder(config, where, ("n_routed_experts", "num_local_experts", "num_experts"))
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    shared = d.number("n_shared_experts", 0)
    sliding = [bool(value) for value in read_list(config, "hybrid_layer_pattern", d.count, where)]
    sparse = [bool(value) for value in read_list(config, "moe_layer_freq", d.count, where)]
    v_dim = read(config, "v_head_dim", int, where, d.head_dim)
    sinks = {True: d.flag("add_swa_attention_sink_bias", True), False: d.flag("add_full_attention_sink_bias", False)}
    shapes = {
        False: (d.heads, d.kv_heads, d.head_dim, v_dim, None),
        True: (
            read(config, "swa_num_attention_heads", int, where, d.heads),
            read(config, "swa_num_key_value_heads", int, where, d.kv_heads),
            read(config, "swa_head_dim", int, where, d.head_dim),
            read(config, "swa_v_head_dim", int, where, v_dim),
            read(config, "sliding_window", int, where),
        ),
    }

    def layer(slides: bool, is_moe: bool) -> LayerKind:
        heads, kv_heads, k_dim, v_head, window = shapes[slides]
        attention = parts.gqa(
            "self_attn", d.hidden, heads, kv_heads, k_dim, v_head_dim=v_head, bias=d.flag("attention_bias", False),
            output_bias=False,
        )  # fmt: skip
        if sinks[slides]:
            attention.append(
                parts.vector("self_attn.attention_sink_bias", heads, "attention", "column", "attn_sinks.weight")
            )
        moe = [
            parts.router("mlp.gate.weight", d.hidden),
            parts.router_bias("mlp.gate.e_score_correction_bias"),
            *parts.experts("mlp.experts", d.hidden, width),
            *(parts.mlp("mlp.shared_experts", d.hidden, width * shared, "shared_expert", "_shexp") if shared else []),
        ]
        made = d.layer(attention, moe if is_moe else parts.mlp("mlp", d.hidden, dense), is_moe=is_moe)
        return replace(made, cache=(parts.gqa_cache(kv_heads, k_dim, v_head, window),))

    pairs = list(zip(sliding, sparse, strict=True))
    kinds = {pair: layer(*pair) for pair in set(pairs)}
    return d.spec(
        family="mimo_v2_flash",
        model_type="mimo_v2_flash",
        kinds=[kinds[pair] for pair in pairs],
        width=width,
        dense_intermediate_size=dense,
        gguf_arch="mimo2",
        shared_experts=shared,
        norm_topk=d.flag("norm_topk_prob", True),
        n_group=d.number("n_group", 1),
        topk_group=d.number("topk_group", 1),
    )
