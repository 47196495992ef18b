"""MiniMax-M3: grouped-query attention whose later layers attend to the blocks of the cache that an indexer chooses, a
sigmoid router with a correction bias on the block, a shared expert, dense first layers, a vision tower.

Names, shapes and dtypes are those of MiniMax-M3's headers (github gogongxt/python, scripts/models/minimax_m3.md). The
published config is ``minimax_m3_vl`` around a text_config; ``minimax_m3`` is that text_config alone (the catalogue's
copy). Where there is no vision_config, the class's default tower is counted, which is the published one. MTP modules
are promised by the config, and the checkpoint stores none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, read_list, text_config
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import CacheStream, LayerKind, ModelSpec, TensorGroup
from reapc.errors import CannotBeDone, ReapcError

MODEL_TYPES = ("minimax_m3", "minimax_m3_vl")
PREFIX = "language_model.model."


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a MiniMax-M3 config; ReapcError names a key that is missing, wrong or contradicted."""
    text, text_where = text_config(config, where)
    nested = "" if text is config else "text_config."
    d = decoder(text, text_where, ("num_local_experts", "num_experts"), key_prefix=nested, own_head_dim=True)
    d.refuse("attention_output_gate", "an output gate")
    width = read(text, "intermediate_size", int, text_where)  # as vLLM and the converter read it
    if read(text, "moe_intermediate_size", int, text_where, width) != width:
        other = text["moe_intermediate_size"]
        raise ReapcError(f"{text_where}: moe_intermediate_size = {other} contradicts intermediate_size = {width}")
    dense = read(text, "dense_intermediate_size", int, text_where)
    shared = d.number("n_shared_experts", 0)
    sparse = _flags(text, "moe_layer_freq", d.count, text_where)
    first = d.number("first_k_dense_replace", sparse.index(True) if True in sparse else d.count)
    if sparse != [i >= first for i in range(d.count)]:  # llama.cpp knows a number of leading layers only
        raise ReapcError(f"{text_where}: moe_layer_freq contradicts first_k_dense_replace = {first}")
    indexed = _indexed(d)
    moe = [
        parts.router("block_sparse_moe.gate.weight", d.hidden, "float32"),
        *([parts.router_bias("block_sparse_moe.e_score_correction_bias")] if d.flag("use_routing_bias", True) else []),
        *parts.experts("block_sparse_moe.experts", d.hidden, width, ("w1", "w3", "w2")),
    ]
    if shared:
        inner = read(text, "shared_intermediate_size", int, text_where) * shared
        moe += parts.mlp("block_sparse_moe.shared_experts", d.hidden, inner, "shared_expert", "_shexp")
    index, keys = _indexer(d) if True in indexed else ([], ())

    def layer(is_moe: bool, has_indexer: bool) -> LayerKind:
        attention = d.attention(qk_norm=d.head_dim if d.flag("use_qk_norm", True) else 0)
        if has_indexer:
            attention += index
        made = d.layer(attention, moe if is_moe else parts.mlp("mlp", d.hidden, dense), is_moe=is_moe)
        return replace(made, cache=(*made.cache, *keys)) if has_indexer else made

    pairs = list(zip(sparse, indexed, strict=True))
    kinds = {pair: layer(*pair) for pair in set(pairs)}
    vision = config.get("vision_config", {})
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
        vision_parameters=0 if vision is None else vision_parameters(vision, config, d.hidden, where),
        shared_experts=shared,
        # Blocks of an ordinary K and V cache are chosen, and vLLM has Triton kernels for that on any CUDA card beside
        # Blackwell's (minimax_m3/common: "other platforms fall back to Triton"): no limit as for DeepSeek's DSA.
        sparse_attention=False,
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _flags(config: dict[str, Any], key: str, count: int, where: str) -> list[bool]:
    """The list of 0 and 1 under ``key``, an entry for every layer."""
    values = read_list(config, key, count, where)
    for index, value in enumerate(values):
        if value not in (0, 1):
            raise ReapcError(f"{where}: {key}[{index}] = {value!r}: 0 or 1 expected")
    return [bool(value) for value in values]


def _sparse_config(d: Decoder) -> tuple[dict[str, Any], str]:
    return read(d.config, "sparse_attention_config", dict, d.where), f"{d.where}: sparse_attention_config"


def _indexed(d: Decoder) -> list[bool]:
    """For every layer, whether it has an indexer. CannotBeDone where one has values too (none published does)."""
    sparse, where = _sparse_config(d)
    indexed = _flags(sparse, "sparse_attention_freq", d.count, where)
    if "sparse_disable_index_value" in sparse:
        disabled = _flags(sparse, "sparse_disable_index_value", d.count, where)
        for layer, (has, none) in enumerate(zip(indexed, disabled, strict=True)):
            if has and not none:
                raise CannotBeDone(f"{where}: sparse_disable_index_value[{layer}] = 0: index values are not supported")
    return indexed


def _indexer(d: Decoder) -> tuple[list[TensorGroup], tuple[CacheStream, ...]]:
    """Queries of a few heads, which vLLM splits as it splits KV heads, and one key for all, with norms; and the keys
    that are kept. vLLM keeps them in bf16 unless told otherwise (indexer_kv_dtype), llama.cpp in the type of K."""
    sparse, where = _sparse_config(d)
    heads, size = read(sparse, "sparse_num_index_heads", int, where), read(sparse, "sparse_index_dim", int, where)
    if heads != d.kv_heads:  # vLLM: "sparse_num_index_heads == num_key_value_heads"
        raise ReapcError(f"{where}: sparse_num_index_heads = {heads} is not num_key_value_heads = {d.kv_heads}")
    groups = [
        parts.linear("self_attn.index_q_proj", heads * size, d.hidden, "attention", "kv", "indexer.q_proj"),
        parts.linear("self_attn.index_k_proj", size, d.hidden, "attention", gguf="indexer.k_proj"),
        parts.vector("self_attn.index_q_norm.weight", size, gguf="indexer.q_norm.weight"),
        parts.vector("self_attn.index_k_norm.weight", size, gguf="indexer.k_norm.weight"),
    ]
    return groups, (CacheStream(size, kind="index"),)


def vision_parameters(vision: dict[str, Any], config: dict[str, Any], hidden: int, where: str) -> int:
    """The tower (a patch convolution over space and time, blocks with biases), and two projections of two layers each,
    the second after patches are merged. Defaults are the class's, and the published tower's."""
    inside = f"{where}: vision_config"
    size = read(vision, "hidden_size", int, inside, 1280)
    inner = read(vision, "intermediate_size", int, inside, 5120)
    layers = read(vision, "num_hidden_layers", int, inside, 32)
    compression = read(vision, "img_token_compression_config", dict, inside, vision)
    merge = read(compression, "spatial_merge_size", int, inside, 2)
    frames = read(compression, "temporal_patch_size", int, inside, 2)
    patch = 3 * frames * read(vision, "patch_size", int, inside, 14) ** 2
    out = read(config, "projector_hidden_size", int, where, 6144)
    block = 4 * size * (size + 1) + 2 * size * inner + inner + size + 4 * size
    projector = out * (size + 1) + hidden * (out + 1)
    merger = out * (hidden * merge**2 + 1) + hidden * (out + 1)
    return patch * size + 2 * size + layers * block + projector + merger
