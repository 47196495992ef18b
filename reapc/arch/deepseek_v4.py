"""DeepSeek-V4: one latent for all heads, K and V at once. Every layer keeps a sliding window of it; most also keep
compressed entries, one for 4 or for 128 tokens (``compress_ratios``), and an indexer chooses among those of ratio 4.
Hyper-connections; the first layers choose experts by a table from token to experts (tid2eid). All layers share one
expert count, so pruning remaps the table: kept experts are renumbered, and an entry that names a dropped one gets the
kept expert of the highest value in its layer that the token does not have yet (prune/table.py).

Names, shapes and dtypes are those of the headers of V4-Flash and V4-Pro (github gogongxt/python, scripts/models/
deepseek_v4_*.md; no ``model.`` prefix). Experts are published as packed fp4 with a scale per 32, most other matrices in
FP8: ``quantization`` says so, the groups here are the weights that those hold. llama.cpp's converter leaves the MTP
layer out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.mla_family import natural
from reapc.arch.spec import CacheStream, GgufPart, LayerKind, LayerSpec, ModelSpec, Role, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("deepseek_v4",)
RATIOS = (0, 4, 128)  # what transformers, vLLM and llama.cpp know
INDEXED_RATIO = 4  # its windows overlap, so that its compressor is twice as wide; an indexer chooses among its entries


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a DeepSeek-V4 config; ReapcError names a key that is missing, wrong or contradicted."""
    experts, keys = expert_count(config, where, ("n_routed_experts", "num_local_experts", "num_experts"))
    hidden = read(config, "hidden_size", int, where)
    vocab = read(config, "vocab_size", int, where)
    count = read(config, "num_hidden_layers", int, where)
    heads = read(config, "num_attention_heads", int, where)
    head_dim = read(config, "head_dim", int, where)
    width = read(config, "moe_intermediate_size", int, where)
    top_k = read(config, "num_experts_per_tok", int, where)
    shared = natural(config, "n_shared_experts", where, 1)
    hashed = natural(config, "num_hash_layers", where)
    mtp = natural(config, "num_nextn_predict_layers", where, 0)
    if read(config, "num_key_value_heads", int, where, 1) != 1:
        raise ReapcError(f"{where}: num_key_value_heads = {config['num_key_value_heads']}: 1 expected")
    ratios = _ratios(config, where, count, mtp)

    def kind(ratio: int, by_table: bool) -> LayerKind:
        moe = [
            parts.router("ffn.gate.weight", hidden),
            _table(vocab, top_k) if by_table else parts.router_bias("ffn.gate.bias"),
            *parts.experts("ffn.experts", hidden, width, ("w1", "w3", "w2")),
            *(_shared(hidden, width * shared) if shared else []),
        ]
        return LayerKind(
            (*_attention(config, where, hidden, heads, head_dim, ratio), *moe),
            _cache(config, where, ratio),
            is_moe=True,
            recurrent_elements=_state(config, where, ratio),
            recurrent_dtype="float32" if ratio else "",
        )

    pairs = [(ratio, index < hashed) for index, ratio in enumerate(ratios)]
    kinds = {pair: kind(*pair) for pair in set(pairs)}
    tied = read(config, "tie_word_embeddings", bool, where, False)
    return ModelSpec(
        family="deepseek_v4",
        model_type=str(config["model_type"]),
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
        tied_embeddings=tied,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=parts.stack("layers", [kinds[pair] for pair in pairs[:count]]),
        outer=_outer(config, where, hidden, vocab, tied),
        gguf_arch="deepseek4",
        mtp_layers=tuple(
            LayerSpec(count + i, f"mtp.{i}", _without_gguf(kinds[pair])) for i, pair in enumerate(pairs[count:])
        ),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(config, where, i, hidden)),
        mtp_count_keys=("num_nextn_predict_layers",) if mtp else (),
        mtp_list_keys=("compress_ratios",) if mtp and len(config["compress_ratios"]) == count + mtp else (),
        shared_experts=shared,
        norm_topk=read(config, "norm_topk_prob", bool, where, True),
        latent_attention=True,
        # vLLM attends to latents through sparse MLA kernels alone (FlashMLA sparse, FlashInfer), the indexer through
        # DeepGEMM: compute capability 9.0 and up, as for DeepSeek-V3.2.
        sparse_attention=True,
        quantization=_quantization(config),
    )


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """quantization_config with what stands beside it: the dtype of the experts."""
    found: dict[str, Any] | None = config.get("quantization_config")
    beside = {"expert_dtype": config["expert_dtype"]} if config.get("expert_dtype") else {}
    return {**found, **beside} if found else None


def _ratios(config: dict[str, Any], where: str, count: int, mtp: int) -> list[int]:
    """The ratio of every layer, then of the MTP layers (0, where the list ends before them)."""
    ratios = list(read(config, "compress_ratios", list, where))
    if len(ratios) not in (count, count + mtp):
        layers = f"{count} layers" + (f" and {mtp} MTP layers" if mtp else "")
        raise ReapcError(f"{where}: compress_ratios has {len(ratios)} entries, and the model has {layers}")
    for index, ratio in enumerate(ratios):
        if isinstance(ratio, bool) or ratio not in RATIOS:
            expected = ", ".join(map(str, RATIOS))
            raise ReapcError(f"{where}: compress_ratios[{index}] = {ratio!r}: one of {expected} expected")
    return ratios + [0] * (count + mtp - len(ratios))


def _attention(
    config: dict[str, Any], where: str, hidden: int, heads: int, head_dim: int, ratio: int
) -> list[TensorGroup]:
    q_lora = read(config, "q_lora_rank", int, where)
    groups, o_lora = read(config, "o_groups", int, where), read(config, "o_lora_rank", int, where)
    if heads % groups:
        raise ReapcError(f"{where}: num_attention_heads = {heads} is not a multiple of o_groups = {groups}")
    streams = read(config, "hc_mult", int, where)
    found = [
        *_hyper_connection("hc_attn", streams, hidden),
        *_hyper_connection("hc_ffn", streams, hidden),
        parts.vector("attn_norm.weight", hidden, gguf="attn_norm.weight"),
        parts.vector("ffn_norm.weight", hidden, gguf="ffn_norm.weight"),
        parts.vector("attn.attn_sink", heads, "attention", "column", "attn_sinks.weight", "float32"),
        parts.linear("attn.wq_a", q_lora, hidden, "attention", gguf="attn_q_a"),
        parts.vector("attn.q_norm.weight", q_lora, gguf="attn_q_a_norm.weight"),
        parts.linear("attn.wq_b", heads * head_dim, q_lora, "attention", "column", "attn_q_b"),
        parts.linear("attn.wkv", head_dim, hidden, "attention", gguf="attn_kv"),
        parts.vector("attn.kv_norm.weight", head_dim, gguf="attn_kv_a_norm.weight"),
        parts.linear("attn.wo_a", groups * o_lora, heads * head_dim // groups, "attention", "column", "attn_output_a"),
        parts.linear("attn.wo_b", hidden, groups * o_lora, "attention", "row", "attn_output_b"),
    ]
    if ratio:
        wide = _width(ratio)
        found += _compressor("attn.compressor", "attn_compressor", hidden, head_dim, ratio, wide)
    if ratio == INDEXED_RATIO:
        size, index_heads = read(config, "index_head_dim", int, where), read(config, "index_n_heads", int, where)
        found += [
            parts.linear("attn.indexer.wq_b", index_heads * size, q_lora, "attention", gguf="indexer.attn_q_b"),
            _plain("attn.indexer.weights_proj", index_heads, hidden, "indexer.proj"),
            *_compressor("attn.indexer.compressor", "indexer_compressor", hidden, size, ratio, wide),
        ]
    return found


def _width(ratio: int) -> int:
    """Entries' widths that a compressor puts out for one token: its own window's, and the next one's where windows
    overlap."""
    return 2 if ratio == INDEXED_RATIO else 1


def _compressor(prefix: str, gguf: str, hidden: int, size: int, ratio: int, wide: int) -> list[TensorGroup]:
    """Pools ``ratio`` tokens into an entry of ``size``, with learned gates and positions. Whole on every rank, and in
    16 bit in every checkpoint and in vLLM (quant_config=None)."""
    return [
        _float(f"{prefix}.ape", (ratio, wide * size), f"{gguf}_ape.weight", "attention"),
        _plain(f"{prefix}.wkv", wide * size, hidden, f"{gguf}_kv"),
        _plain(f"{prefix}.wgate", wide * size, hidden, f"{gguf}_gate"),
        parts.vector(f"{prefix}.norm.weight", size, gguf=f"{gguf}_norm.weight"),
    ]


def _cache(config: dict[str, Any], where: str, ratio: int) -> tuple[CacheStream, ...]:
    """The window of latents, the compressed ones, and the indexer's keys of those; one head, whole on every rank."""
    size = read(config, "head_dim", int, where)
    streams = [CacheStream(size, window=read(config, "sliding_window", int, where), kind="latent")]
    if ratio:
        streams.append(CacheStream(size, stride=ratio, kind="latent"))
    if ratio == INDEXED_RATIO:
        streams.append(CacheStream(read(config, "index_head_dim", int, where), stride=ratio, kind="index"))
    return tuple(streams)


def _state(config: dict[str, Any], where: str, ratio: int) -> int:
    """What compressors keep of tokens whose window is still open: values and gates, in float32.

    vLLM's CompressorStateCache and llama.cpp's llama_dsv4_comp_state agree: ``ratio`` tokens, twice as many where
    windows overlap. Whole on every rank.
    """
    sizes = [read(config, "head_dim", int, where)] if ratio else []
    if ratio == INDEXED_RATIO:
        sizes.append(read(config, "index_head_dim", int, where))
    return sum(ratio * _width(ratio) * 2 * _width(ratio) * size for size in sizes)


def _hyper_connection(name: str, streams: int, hidden: int) -> list[TensorGroup]:
    """Mixes ``streams`` residual streams before and after a block: weights for what goes in, what comes out, and what
    passes by."""
    rows = streams * (streams + 2)
    return [
        _float(f"{name}_fn", (rows, streams * hidden), f"{name}_fn.weight"),
        _float(f"{name}_base", (rows,), f"{name}_base.weight"),
        _float(f"{name}_scale", (3,), f"{name}_scale.weight"),
    ]


def _hyper_head(config: dict[str, Any], where: str, prefix: str, hidden: int, gguf: bool) -> list[TensorGroup]:
    """Makes one stream of all before the final norm."""
    streams = read(config, "hc_mult", int, where)
    shapes = {"fn": (streams, streams * hidden), "base": (streams,), "scale": (1,)}
    return [
        _float(f"{prefix}hc_head_{name}", shape, f"output_hc_{name}.weight" if gguf else "")
        for name, shape in shapes.items()
    ]


def _table(vocab: int, top_k: int) -> TensorGroup:
    """Token to experts, in expert numbers."""
    part = (GgufPart("ffn_gate_tid2eid.weight", (vocab, top_k)),)
    shape = (vocab, top_k)
    return TensorGroup("ffn.gate.tid2eid", shape, "router", "replicate", None, (), part, "int64", names_experts=True)


def _shared(hidden: int, width: int) -> list[TensorGroup]:
    prefix = "ffn.shared_experts"
    return [
        parts.linear(f"{prefix}.w1", width, hidden, "shared_expert", "column", "ffn_gate_shexp"),
        parts.linear(f"{prefix}.w3", width, hidden, "shared_expert", "column", "ffn_up_shexp"),
        parts.linear(f"{prefix}.w2", hidden, width, "shared_expert", "row", "ffn_down_shexp"),
    ]


def _float(name: str, shape: tuple[int, ...], gguf: str, role: Role = "other") -> TensorGroup:
    """A small float32 tensor with its complete name, here and in GGUF."""
    return TensorGroup(name, shape, role, "replicate", None, (), (GgufPart(gguf, shape),) if gguf else (), "float32")


def _plain(name: str, out: int, inner: int, gguf: str) -> TensorGroup:
    """A matrix that no weight format of safetensors touches."""
    return replace(parts.linear(name, out, inner, "attention", gguf=gguf), linears=())


def _outer(config: dict[str, Any], where: str, hidden: int, vocab: int, tied: bool) -> tuple[TensorGroup, ...]:
    embedding, *others = parts.outer(hidden, vocab, tied, prefix="", head="head.weight")
    return (replace(embedding, name="embed.weight"), *others, *_hyper_head(config, where, "", hidden, True))


def _mtp_outer(config: dict[str, Any], where: str, index: int, hidden: int) -> list[TensorGroup]:
    """Beside its decoder layer; embedding and head are the main model's."""
    prefix = f"mtp.{index}"
    return [
        *(parts.linear(f"{prefix}.{name}", hidden, hidden, "other") for name in ("e_proj", "h_proj")),
        *(parts.vector(f"{prefix}.{name}.weight", hidden) for name in ("enorm", "hnorm", "norm")),
        *_hyper_head(config, where, f"{prefix}.", hidden, False),
    ]


def _without_gguf(kind: LayerKind) -> LayerKind:
    return replace(kind, tensors=tuple(replace(group, gguf=()) for group in kind.tensors))
