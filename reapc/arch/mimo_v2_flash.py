"""MiMo-V2-Flash: sigmoid router with a correction bias, no shared expert; five of six layers slide over 128 tokens,
with attention sinks and KV heads of their own; K heads are wider than V heads.

Names as transformers 5.23 saves them, experts one by one; the router is float32 (dump of MiMo-V2.5, which shares the
design, github gogongxt/python; vLLM keeps it so). Three MTP layers are stored that no key declares: their number is
hard-coded in llama.cpp's converter ("count found in the safetensors"), their content is vLLM's mimo_v2_mtp.py. They are
dense and slide. ``num_nextn_predict_layers`` overrides the number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import read, read_list
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import LayerKind, LayerSpec, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("mimo_v2_flash",)
MTP_LAYERS = 3


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a MiMo-V2-Flash config; ReapcError names a key that is missing, wrong or contradicted."""
    d = decoder(config, where, ("n_routed_experts", "num_local_experts", "num_experts"), own_head_dim=True)
    d.refuse("n_shared_experts", "a shared expert of this family")
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    sliding, sparse = _flags(d, "hybrid_layer_pattern"), _flags(d, "moe_layer_freq")
    attention = {False: _full(d), True: _sliding(d)}
    moe = [
        parts.router("mlp.gate.weight", d.hidden, "float32"),
        parts.router_bias("mlp.gate.e_score_correction_bias"),
        *parts.experts("mlp.experts", d.hidden, width),
    ]

    def layer(slides: bool, is_moe: bool) -> LayerKind:
        groups, cache = attention[slides]
        return replace(
            d.layer(groups, moe if is_moe else parts.mlp("mlp", d.hidden, dense), is_moe=is_moe), cache=cache
        )

    pairs = list(zip(sliding, sparse, strict=True))
    kinds = {pair: layer(*pair) for pair in {*pairs, (True, False)}}
    mtp = d.number("num_nextn_predict_layers", MTP_LAYERS)
    draft = _mtp_kind(kinds[True, False])
    return d.spec(
        family="mimo_v2_flash",
        model_type=str(config["model_type"]),
        kinds=[kinds[pair] for pair in pairs],
        width=width,
        dense_intermediate_size=dense,
        gguf_arch="mimo2",
        mtp_layers=tuple(LayerSpec(d.count + i, f"model.mtp.layers.{i}", draft) for i in range(mtp)),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(i, d.count + i, d.hidden)),
        mtp_count_keys=("num_nextn_predict_layers",) if mtp else (),
        norm_topk=d.flag("norm_topk_prob", True),
        n_group=read(config, "n_group", int, where, 1),
        topk_group=read(config, "topk_group", int, where, 1),
    )


def _flags(d: Decoder, key: str) -> list[bool]:
    """The list of 0 and 1 under ``key``, an entry for every layer."""
    values = read_list(d.config, key, d.count, d.where)
    for index, value in enumerate(values):
        if value not in (0, 1):
            raise ReapcError(f"{d.where}: {key}[{index}] = {value!r}: 0 or 1 expected")
    return [bool(value) for value in values]


def _full(d: Decoder) -> tuple[list[TensorGroup], tuple[parts.CacheStream, ...]]:
    v_dim = read(d.config, "v_head_dim", int, d.where)
    return _attention(d, d.heads, d.kv_heads, d.head_dim, v_dim, d.flag("add_full_attention_sink_bias", False), None)


def _sliding(d: Decoder) -> tuple[list[TensorGroup], tuple[parts.CacheStream, ...]]:
    heads, kv_heads, k_dim, v_dim, window = (
        read(d.config, key, int, d.where)
        for key in (
            "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim", "sliding_window"
        )
    )  # fmt: skip
    return _attention(d, heads, kv_heads, k_dim, v_dim, d.flag("add_swa_attention_sink_bias", True), window)


def _attention(
    d: Decoder, heads: int, kv_heads: int, k_dim: int, v_dim: int, sinks: bool, window: int | None
) -> tuple[list[TensorGroup], tuple[parts.CacheStream, ...]]:
    """The groups and the cache of one kind of attention."""
    groups = parts.gqa(
        "self_attn", d.hidden, heads, kv_heads, k_dim, v_head_dim=v_dim, bias=d.flag("attention_bias", False),
        output_bias=False,
    )  # fmt: skip
    if sinks:
        name = "self_attn.attention_sink_bias"
        groups.append(parts.vector(name, heads, "attention", "column", "attn_sinks.weight"))
    return groups, (parts.gqa_cache(kv_heads, k_dim, v_dim, window),)


def _mtp_kind(kind: LayerKind) -> LayerKind:
    """A dense sliding layer, whose second norm has another name in MTP layers."""
    names = {"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"}
    return replace(
        kind, tensors=tuple(replace(group, name=names.get(group.name, group.name)) for group in kind.tensors)
    )


def _mtp_outer(index: int, block: int, hidden: int) -> list[TensorGroup]:
    """Beside its decoder layer: embedding and hidden state side by side through eh_proj, and three norms. Embedding and
    head are the main model's. eh_proj is in bf16 in the FP8 checkpoint, and a plain linear layer in vLLM."""
    prefix, gguf = f"model.mtp.layers.{index}", f"blk.{block}.nextn"
    eh_proj = parts.linear(f"{prefix}.eh_proj", hidden, 2 * hidden, "other", gguf=f"{gguf}.eh_proj")
    return [
        replace(eh_proj, linears=()),
        parts.vector(f"{prefix}.enorm.weight", hidden, gguf=f"{gguf}.enorm.weight"),
        parts.vector(f"{prefix}.hnorm.weight", hidden, gguf=f"{gguf}.hnorm.weight"),
        parts.vector(f"{prefix}.final_layernorm.weight", hidden, gguf=f"blk.{block}.layer_output_norm.weight"),
    ]
