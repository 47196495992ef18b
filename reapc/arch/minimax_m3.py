"""MiniMax-M3: grouped-query attention whose later layers choose blocks of the cache by an indexer, sigmoid router with
a correction bias on the block, a shared expert, dense first layers.

Names as in the dump of MiniMax-M3 (facts/tensor-naming.json: prefix ``language_model.model.layers.``), the indexer's as
llama.cpp's converter reads them. The catalogue's config is the text model alone, so no vision tower is counted; MTP
modules are promised by the config and not stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, read_list, text_config
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import CacheStream, LayerKind, ModelSpec, TensorGroup

MODEL_TYPES = ("minimax_m3", "minimax_m3_vl")
PREFIX = "language_model.model."


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a MiniMax-M3 config; ReapcError names a key that is missing, wrong or contradicted."""
    text, where = text_config(config, where)
    nested = "text_config." if "text_config" in config else ""
    d = decoder(text, where, ("num_local_experts", "num_experts"), key_prefix=nested)
    width = read(text, "moe_intermediate_size", int, where, text.get("intermediate_size", 0))
    dense = read(text, "dense_intermediate_size", int, where)
    shared = d.number("n_shared_experts", 1)
    shared_width = read(text, "shared_intermediate_size", int, where, width)
    sparse_moe = [bool(value) for value in read_list(text, "moe_layer_freq", d.count, where)]
    sparse = read(text, "sparse_attention_config", dict, where)
    inside = f"{where}: sparse_attention_config"
    indexed = [bool(value) for value in read_list(sparse, "sparse_attention_freq", d.count, inside)]
    size = read(sparse, "sparse_index_dim", int, inside)
    heads = read(sparse, "sparse_num_index_heads", int, inside)

    def layer(is_moe: bool, has_indexer: bool) -> LayerKind:
        attention = d.attention(qk_norm=d.head_dim if text.get("use_qk_norm", True) else 0)
        if has_indexer:
            attention += _indexer(d.hidden, heads, size)
        moe = [
            parts.router("block_sparse_moe.gate.weight", d.hidden),
            parts.router_bias("block_sparse_moe.e_score_correction_bias"),
            *parts.experts("block_sparse_moe.experts", d.hidden, width, ("w1", "w3", "w2")),
            *parts.mlp("block_sparse_moe.shared_experts", d.hidden, shared_width * shared, "shared_expert", "_shexp"),
        ]
        made = d.layer(attention, moe if is_moe else parts.mlp("mlp", d.hidden, dense), is_moe=is_moe)
        return replace(made, cache=(*made.cache, CacheStream(size, kind="index"))) if has_indexer else made

    pairs = list(zip(sparse_moe, indexed, strict=True))
    kinds = {pair: layer(*pair) for pair in set(pairs)}
    return d.spec(
        family="minimax_m3",
        model_type=str(config["model_type"]),
        kinds=[kinds[pair] for pair in pairs],
        width=width,
        prefix=PREFIX,
        outer=parts.outer(d.hidden, d.vocab, d.tied, prefix=PREFIX, head="language_model.lm_head.weight"),
        dense_intermediate_size=dense,
        dtype=dtype_of({**config, **text}),
        gguf_arch="minimax-m3",
        shared_experts=shared,
        sparse_attention=True,  # blocks of the cache are chosen by an indexer: read like DSA, not run by us
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _indexer(hidden: int, heads: int, size: int) -> list[TensorGroup]:
    """Queries of a few heads and one key, with norms."""
    return [
        parts.linear("self_attn.index_q_proj", heads * size, hidden, "attention", gguf="indexer.q_proj"),
        parts.linear("self_attn.index_k_proj", size, hidden, "attention", gguf="indexer.k_proj"),
        parts.vector("self_attn.index_q_norm.weight", size, gguf="indexer.q_norm.weight"),
        parts.vector("self_attn.index_k_norm.weight", size, gguf="indexer.k_norm.weight"),
    ]
