"""DeepSeek-V4: one latent of all heads, a sliding window of it on every layer, and compressed entries of it (one per 4
or per 128 tokens, ``compress_ratios``); an indexer on the ratio-4 layers; hyper-connections; the first layers choose
experts by a table from token to experts (tid2eid).

Names as published (no ``model.`` prefix; facts/tensor-naming.json) and as llama.cpp's converter reads them; shapes as
transformers 5.23 builds them. Which small tensors are stored in float32 (hyper-connections, sinks, position biases) is
taken from transformers, not from a checkpoint. Expert matrices are published as packed fp4, the other linears in FP8:
``quantization`` says so, the groups here are the weights that they stand for. The converter writes no MTP layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.spec import CacheStream, GgufPart, LayerKind, LayerSpec, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("deepseek_v4",)
INDEXED_RATIO = 4  # its compressor overlaps, so that it is twice as wide, and an indexer chooses among its entries


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a DeepSeek-V4 config; ReapcError names a key that is missing, wrong or contradicted."""
    experts, keys = expert_count(config, where, ("n_routed_experts", "num_experts"))
    hidden = read(config, "hidden_size", int, where)
    vocab = read(config, "vocab_size", int, where)
    count = read(config, "num_hidden_layers", int, where)
    width = read(config, "moe_intermediate_size", int, where)
    top_k = read(config, "num_experts_per_tok", int, where)
    shared = read(config, "n_shared_experts", int, where, 1)
    head_dim = read(config, "head_dim", int, where)
    hashed = read(config, "num_hash_layers", int, where, 0)
    mtp = read(config, "num_nextn_predict_layers", int, where, 0)
    ratios = list(read(config, "compress_ratios", list, where))
    if len(ratios) not in (count, count + mtp):
        raise ReapcError(f"{where}: compress_ratios has {len(ratios)} entries, and the model has {count} layers")
    for index, ratio in enumerate(ratios):
        if not isinstance(ratio, int) or ratio < 0:
            raise ReapcError(f"{where}: compress_ratios[{index}] = {ratio!r}: 0 or a number of tokens expected")
    ratios += [0] * (count + mtp - len(ratios))

    def kind(ratio: int, by_table: bool) -> LayerKind:
        moe = [
            parts.router("ffn.gate.weight", hidden),
            _table(vocab, top_k) if by_table else parts.router_bias("ffn.gate.bias"),
            *parts.experts("ffn.experts", hidden, width, ("w1", "w3", "w2")),
            *_shared(hidden, width * shared),
        ]
        return LayerKind(
            (*_attention(config, where, hidden, head_dim, ratio), *moe), _cache(config, where, ratio), True
        )

    pairs = [(ratio, index < hashed) for index, ratio in enumerate(ratios)]
    kinds = {pair: kind(*pair) for pair in set(pairs)}
    heads = read(config, "num_attention_heads", int, where)
    return ModelSpec(
        family="deepseek_v4",
        model_type="deepseek_v4",
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=head_dim,
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=width,
        dense_intermediate_size=0,
        max_context=read(config, "max_position_embeddings", int, where, 4096),
        tied_embeddings=False,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=parts.stack("layers", [kinds[pair] for pair in pairs[:count]]),
        outer=_outer(config, where, hidden, vocab),
        gguf_arch="deepseek4",
        mtp_layers=tuple(
            LayerSpec(count + i, f"mtp.{i}", _without_gguf(kinds[pair])) for i, pair in enumerate(pairs[count:])
        ),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(config, where, i, hidden)),
        shared_experts=shared,
        norm_topk=bool(config.get("norm_topk_prob", True)),
        latent_attention=True,
        sparse_attention=True,  # compressed entries are chosen by an indexer: vLLM has kernels for that from 9.0 on
        quantization=config.get("quantization_config"),
    )


def _float(name: str, shape: tuple[int, ...], gguf: str, role: Any = "attention") -> TensorGroup:
    """A small float32 tensor with its complete name."""
    return TensorGroup(name, shape, role, "replicate", None, (), (GgufPart(gguf, shape),) if gguf else (), "float32")


def _plain(name: str, out: int, inner: int, gguf: str) -> TensorGroup:
    """A matrix that stays in the model's dtype."""
    return replace(parts.linear(name, out, inner, "attention", "replicate", gguf), linears=())


def _hyper(prefix: str, name: str, mult: int, hidden: int) -> list[TensorGroup]:
    """A hyper-connection: mixes ``mult`` residual streams before and after a block."""
    rows = mult * (mult + 2)
    return [
        _float(f"{prefix}_fn", (rows, mult * hidden), f"{name}_fn.weight", "other"),
        _float(f"{prefix}_base", (rows,), f"{name}_base.weight", "other"),
        _float(f"{prefix}_scale", (3,), f"{name}_scale.weight", "other"),
    ]


def _attention(config: dict[str, Any], where: str, hidden: int, head_dim: int, ratio: int) -> list[TensorGroup]:
    heads = read(config, "num_attention_heads", int, where)
    q_lora = read(config, "q_lora_rank", int, where)
    groups, o_lora = read(config, "o_groups", int, where), read(config, "o_lora_rank", int, where)
    mult = read(config, "hc_mult", int, where)
    found = [
        *_hyper("hc_attn", "hc_attn", mult, hidden),
        *_hyper("hc_ffn", "hc_ffn", mult, hidden),
        parts.vector("attn_norm.weight", hidden, gguf="attn_norm.weight"),
        parts.vector("ffn_norm.weight", hidden, gguf="ffn_norm.weight"),
        parts.vector("attn.attn_sink", heads, "attention", "column", "attn_sinks.weight", "float32"),
        parts.linear("attn.wq_a", q_lora, hidden, "attention", "replicate", "attn_q_a"),
        parts.vector("attn.q_norm.weight", q_lora, gguf="attn_q_a_norm.weight"),
        parts.linear("attn.wq_b", heads * head_dim, q_lora, "attention", "column", "attn_q_b"),
        parts.linear("attn.wkv", head_dim, hidden, "attention", "replicate", "attn_kv"),
        parts.vector("attn.kv_norm.weight", head_dim, gguf="attn_kv_a_norm.weight"),
        parts.linear("attn.wo_a", groups * o_lora, heads * head_dim // groups, "attention", "column", "attn_output_a"),
        parts.linear("attn.wo_b", hidden, groups * o_lora, "attention", "row", "attn_output_b"),
    ]
    if not ratio:
        return found
    wide = 2 if ratio == INDEXED_RATIO else 1
    found += _compressor("attn.compressor", "attn_compressor", hidden, head_dim, ratio, wide)
    if ratio == INDEXED_RATIO:
        size, index_heads = read(config, "index_head_dim", int, where), read(config, "index_n_heads", int, where)
        found += [
            parts.linear("attn.indexer.wq_b", index_heads * size, q_lora, "attention", gguf="indexer.attn_q_b"),
            _plain("attn.indexer.weights_proj", index_heads, hidden, "indexer.proj"),
            *_compressor("attn.indexer.compressor", "indexer_compressor", hidden, size, ratio, wide),
        ]
    return found


def _compressor(prefix: str, gguf: str, hidden: int, size: int, ratio: int, wide: int) -> list[TensorGroup]:
    """Pools ``ratio`` tokens into an entry of ``size``, with learned gates and positions."""
    return [
        _float(f"{prefix}.ape", (ratio, wide * size), f"{gguf}_ape.weight"),
        _plain(f"{prefix}.wkv", wide * size, hidden, f"{gguf}_kv"),
        _plain(f"{prefix}.wgate", wide * size, hidden, f"{gguf}_gate"),
        parts.vector(f"{prefix}.norm.weight", size, gguf=f"{gguf}_norm.weight"),
    ]


def _cache(config: dict[str, Any], where: str, ratio: int) -> tuple[CacheStream, ...]:
    """The window of latents, the compressed ones, and the indexer's keys of those."""
    size = read(config, "head_dim", int, where)
    streams = [CacheStream(size, window=read(config, "sliding_window", int, where), kind="latent")]
    if ratio:
        streams.append(CacheStream(size, stride=ratio, kind="latent"))
    if ratio == INDEXED_RATIO:
        streams.append(CacheStream(read(config, "index_head_dim", int, where), stride=ratio, kind="index"))
    return tuple(streams)


def _table(vocab: int, top_k: int) -> TensorGroup:
    """Token to experts: expert numbers, so a prune must remap it (or leave the layer whole)."""
    part = (GgufPart("ffn_gate_tid2eid.weight", (vocab, top_k)),)
    return TensorGroup("ffn.gate.tid2eid", (vocab, top_k), "router", "replicate", None, (), part, "int64")


def _shared(hidden: int, width: int) -> list[TensorGroup]:
    prefix, role = "ffn.shared_experts", "shared_expert"
    return [
        parts.linear(f"{prefix}.w1", width, hidden, role, "column", "ffn_gate_shexp"),  # type: ignore[arg-type]
        parts.linear(f"{prefix}.w3", width, hidden, role, "column", "ffn_up_shexp"),  # type: ignore[arg-type]
        parts.linear(f"{prefix}.w2", hidden, width, role, "row", "ffn_down_shexp"),  # type: ignore[arg-type]
    ]


def _hyper_head(config: dict[str, Any], where: str, prefix: str, hidden: int, gguf: bool) -> list[TensorGroup]:
    mult = read(config, "hc_mult", int, where)
    shapes = {"fn": (mult, mult * hidden), "base": (mult,), "scale": (1,)}
    return [
        _float(f"{prefix}hc_head_{name}", shape, f"output_hc_{name}.weight" if gguf else "", "other")
        for name, shape in shapes.items()
    ]


def _outer(config: dict[str, Any], where: str, hidden: int, vocab: int) -> tuple[TensorGroup, ...]:
    embedding, norm, head = parts.outer(hidden, vocab, False, prefix="", head="head.weight")
    return (
        replace(embedding, name="embed.weight"),
        norm,
        head,
        *_hyper_head(config, where, "", hidden, True),
    )


def _mtp_outer(config: dict[str, Any], where: str, index: int, hidden: int) -> list[TensorGroup]:
    prefix = f"mtp.{index}"
    return [
        *(replace(_plain(f"{prefix}.{name}", hidden, hidden, ""), role="other") for name in ("e_proj", "h_proj")),
        *(parts.vector(f"{prefix}.{name}.weight", hidden) for name in ("enorm", "hnorm", "norm")),
        *_hyper_head(config, where, f"{prefix}.", hidden, False),
    ]


def _without_gguf(kind: LayerKind) -> LayerKind:
    return replace(kind, tensors=tuple(replace(group, gguf=()) for group in kind.tensors))
