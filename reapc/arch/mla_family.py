"""DeepSeek's design, shared by its descendants: MLA, dense first layers, then experts beside shared experts.

A family says what differs: which layers are dense, which have an indexer (DSA), whether the router has a bias, what its
MTP layers store, and its name in llama.cpp. Names, shapes and dtypes are those of the safetensors headers dumped in
github gogongxt/python, scripts/models/*.md (facts/tensor-naming.json).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read, read_list
from reapc.arch.spec import CacheStream, LayerKind, LayerSpec, ModelSpec, Parallel, Role, TensorGroup
from reapc.errors import CannotBeDone, ReapcError

_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
_LAYER_TYPES = {"dense": True, "sparse": False}


class Family(NamedTuple):
    """What a family adds to the shared design.

    ``indexers``: for every layer, whether it has its own; None: no sparse attention. ``mtp_embeddings``: MTP layers
    store a copy of the embedding and a head. ``mtp_in_gguf``: the converter writes the MTP layers. ``prefix`` stands
    before every name on disk ("language_model."), ``key_prefix`` before the keys of the config ("text_config.").
    """

    name: str
    model_type: str
    gguf_arch: str
    indexers: list[bool] | None = None
    router_bias: bool = True
    mtp_embeddings: bool = True
    mtp_in_gguf: bool = False
    norm_dtype: str = ""
    prefix: str = ""
    key_prefix: str = ""


def natural(config: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """``config[key]``, an integer that may be 0, and missing only where there is a default."""
    value = config.get(key, default) if default is not None else config.get(key)
    if value is None and default is not None:
        return default
    return 0 if value == 0 and not isinstance(value, bool) else read({key: value}, key, int, where)


def dense_layers(config: dict[str, Any], where: str) -> list[bool]:
    """For every layer, whether its MLP is dense: ``mlp_layer_types`` or the first ``first_k_dense_replace`` layers.

    A list that contradicts the number is refused, and so is one with a dense layer behind a sparse one: vLLM and
    llama.cpp know a number of leading layers only.
    """
    count = read(config, "num_hidden_layers", int, where)
    types: list[Any] | None = None
    if config.get("mlp_layer_types") is not None:
        types = read_list(config, "mlp_layer_types", count, where)
        _check_words(types, "mlp_layer_types", tuple(_LAYER_TYPES), where)
    stated = types is None or config.get("first_k_dense_replace") is not None
    if types is None or stated:
        first = natural(config, "first_k_dense_replace", where)
    else:
        first = types.index("sparse") if "sparse" in types else count
    every = max(read(config, "moe_layer_freq", int, where, 1), 1)
    dense = [i < first or i % every != 0 for i in range(count)]
    if types is not None and [_LAYER_TYPES[kind] for kind in types] != dense:
        index = next(i for i, kind in enumerate(types) if _LAYER_TYPES[kind] != dense[i])
        other = f"first_k_dense_replace = {first}" if stated else f"mlp_layer_types[{first}] = 'sparse'"
        raise ReapcError(
            f"{where}: mlp_layer_types[{index}] = {types[index]!r} contradicts {other}",
            hint="dense layers come first, and both keys have to say how many",
        )
    return dense


def indexer_layers(config: dict[str, Any], where: str) -> list[bool]:
    """For every layer, whether it has its own indexer ("full") or uses the one before it ("shared").

    ``indexer_types``, else ``index_topk_pattern``, else the schedule of ``index_topk_freq`` and
    ``index_skip_topk_offset`` (the order and defaults of transformers' GlmMoeDsaConfig).
    """
    count = read(config, "num_hidden_layers", int, where)
    key = "indexer_types" if config.get("indexer_types") is not None else "index_topk_pattern"
    if config.get(key) is None:
        every = max(read(config, "index_topk_freq", int, where, 1), 1)
        offset = read(config, "index_skip_topk_offset", int, where, 2)
        return [max(i - offset + 1, 0) % every == 0 for i in range(count)]
    pattern = config[key]
    if isinstance(pattern, str):  # "FSSF"
        words = {"F": "full", "S": "shared"}
        config = {**config, key: [words.get(letter, letter) for letter in pattern]}
    types = read_list(config, key, count, where)
    _check_words(types, key, ("full", "shared"), where)
    if types[0] != "full":
        raise ReapcError(
            f"{where}: {key}[0] = {types[0]!r}: there is no layer before it to share with: 'full' expected"
        )
    return [kind == "full" for kind in types]


def _check_words(values: list[Any], key: str, words: tuple[str, ...], where: str) -> None:
    for index, value in enumerate(values):
        if value not in words:
            raise ReapcError(f"{where}: {key}[{index}] = {value!r}: {' or '.join(map(repr, words))} expected")


def indexer(config: dict[str, Any], where: str) -> list[TensorGroup]:
    """The indexer of sparse attention: queries from the q latent, one key for all its heads, a weight per head.

    Whole on every tensor-parallel rank. weights_proj stays in the model's dtype in every FP8 checkpoint published, and
    in vLLM (quant_config=None); the key's norm is a LayerNorm, with a bias.
    """
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "index_n_heads", int, where)
    size = read(config, "index_head_dim", int, where)
    read(config, "index_topk", int, where)
    q_lora = read(config, "q_lora_rank", int, where)  # its queries come from the q latent
    name = "self_attn.indexer"
    return [
        parts.linear(f"{name}.wq_b", heads * size, q_lora, "attention", gguf="indexer.attn_q_b"),
        parts.linear(f"{name}.wk", size, hidden, "attention", gguf="indexer.attn_k"),
        parts.vector(f"{name}.k_norm.weight", size, gguf="indexer.k_norm.weight"),
        parts.vector(f"{name}.k_norm.bias", size, gguf="indexer.k_norm.bias"),
        _unquantized(f"{name}.weights_proj", heads, hidden, "attention", "replicate", "indexer.proj"),
    ]


def build_family(config: dict[str, Any], where: str, family: Family) -> ModelSpec:
    """ModelSpec of a (text) config; ReapcError names a key that is missing, wrong or contradicted."""
    if config.get("attention_bias"):
        raise CannotBeDone(f"{where}: attention_bias = true: MLA with biases is not supported")
    experts, keys = expert_count(config, where, _EXPERT_KEYS, family.key_prefix)
    hidden = read(config, "hidden_size", int, where)
    vocab = read(config, "vocab_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    nope = read(config, "qk_nope_head_dim", int, where)
    rope = read(config, "qk_rope_head_dim", int, where)
    kv_lora = read(config, "kv_lora_rank", int, where)
    if "q_lora_rank" not in config:  # null is an answer (DeepSeek-V2-Lite), no key is none
        read(config, "q_lora_rank", int, where)
    q_lora = read(config, "q_lora_rank", int, where, 0) or None
    width = read(config, "moe_intermediate_size", int, where)
    dense_width = read(config, "intermediate_size", int, where)
    shared = natural(config, "n_shared_experts", where, 0)
    tied = bool(config.get("tie_word_embeddings", False))
    dense = dense_layers(config, where)
    indexers = family.indexers or [False] * len(dense)

    attention = [
        parts.vector("input_layernorm.weight", hidden, gguf="attn_norm.weight"),
        *parts.mla("self_attn", hidden, heads, kv_lora, nope, rope, read(config, "v_head_dim", int, where), q_lora),
        parts.vector("post_attention_layernorm.weight", hidden, gguf="ffn_norm.weight"),
    ]
    moe = [parts.router("mlp.gate.weight", hidden), *parts.experts("mlp.experts", hidden, width)]
    if family.router_bias:
        moe.insert(1, parts.router_bias("mlp.gate.e_score_correction_bias"))
    if shared:
        moe += parts.mlp("mlp.shared_experts", hidden, width * shared, "shared_expert", "_shexp")
    mlp = {True: parts.mlp("mlp", hidden, dense_width), False: moe}
    index: dict[bool, list[TensorGroup]] = {False: []}
    cache: dict[bool, tuple[CacheStream, ...]] = {False: (parts.mla_cache(kv_lora, rope),)}
    if family.indexers:
        index[True] = indexer(config, where)
        key = CacheStream(read(config, "index_head_dim", int, where), kind="index")
        cache[True] = (*cache[False], key)
    kinds = {
        (is_dense, has): LayerKind(
            _with_norms([*attention, *index[has], *mlp[is_dense]], family.norm_dtype), cache[has], is_moe=not is_dense
        )
        for is_dense in (True, False)
        for has in index
    }
    layers = parts.stack(f"{family.prefix}model.layers", [kinds[pair] for pair in zip(dense, indexers, strict=True)])
    # An MTP layer is a sparse one, with an indexer of its own where there are any (GLM-5.2 too, by its dump).
    mtp_layers, mtp_outer = _mtp(config, where, family, kinds[False, bool(family.indexers)], len(layers), hidden, vocab)
    outer = parts.outer(
        hidden, vocab, tied, prefix=f"{family.prefix}model.", head=f"{family.prefix}lm_head.weight"
    )  # fmt: skip
    return ModelSpec(
        family=family.name,
        model_type=family.model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=read(config, "num_key_value_heads", int, where, heads),
        head_dim=nope + rope,
        num_experts=experts,
        top_k=read(config, "num_experts_per_tok", int, where),
        expert_intermediate_size=width,
        dense_intermediate_size=dense_width,
        max_context=read(config, "max_position_embeddings", int, where, 4096),
        tied_embeddings=tied,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=layers,
        outer=_with_norms(outer, family.norm_dtype),
        gguf_arch=family.gguf_arch,
        mtp_layers=mtp_layers,
        mtp_outer=_with_norms(mtp_outer, family.norm_dtype),
        mtp_count_keys=(f"{family.key_prefix}num_nextn_predict_layers",) if mtp_layers else (),
        shared_experts=shared,
        norm_topk=bool(config.get("norm_topk_prob", family.router_bias)),  # transformers' defaults: V2 no, others yes
        n_group=read(config, "n_group", int, where, 1),
        topk_group=read(config, "topk_group", int, where, 1),
        latent_attention=True,
        sparse_attention=family.indexers is not None,
        quantization=config.get("quantization_config"),
    )


def _with_norms(groups: list[TensorGroup] | tuple[TensorGroup, ...], dtype: str) -> tuple[TensorGroup, ...]:
    """The groups, with norms stored in ``dtype`` where one is given."""
    return tuple(replace(group, dtype=dtype) if dtype and group.role == "norm" else group for group in groups)


def _mtp(
    config: dict[str, Any], where: str, family: Family, kind: LayerKind, start: int, hidden: int, vocab: int
) -> tuple[tuple[LayerSpec, ...], list[TensorGroup]]:
    """The MTP layers and what each keeps beside its decoder layer, from layer ``start`` on.

    eh_proj takes the embedding and the hidden state side by side; it is in bf16 in every FP8 checkpoint, and a plain
    linear layer in vLLM. Where the converter leaves the layers out (deepseek2 from DeepseekV3ForCausalLM), they have no
    GGUF parts.
    """
    count = natural(config, "num_nextn_predict_layers", where, 0)
    groups: list[TensorGroup] = []
    for layer in range(start, start + count):
        prefix, gguf = f"{family.prefix}model.layers.{layer}", f"blk.{layer}.nextn"
        groups += [
            _unquantized(f"{prefix}.eh_proj", hidden, 2 * hidden, "other", "replicate", f"{gguf}.eh_proj"),
            parts.vector(f"{prefix}.enorm.weight", hidden, gguf=f"{gguf}.enorm.weight"),
            parts.vector(f"{prefix}.hnorm.weight", hidden, gguf=f"{gguf}.hnorm.weight"),
            parts.vector(f"{prefix}.shared_head.norm.weight", hidden, gguf=f"{gguf}.shared_head_norm.weight"),
        ]
        if family.mtp_embeddings:
            head = f"{prefix}.shared_head.head"
            groups += [
                _unquantized(f"{prefix}.embed_tokens", vocab, hidden, "embedding", "vocab", f"{gguf}.embed_tokens"),
                _unquantized(head, vocab, hidden, "lm_head", "vocab", f"{gguf}.shared_head_head"),
            ]
    if not family.mtp_in_gguf:
        kind = replace(kind, tensors=tuple(replace(group, gguf=()) for group in kind.tensors))
        groups = [replace(group, gguf=()) for group in groups]
    return parts.stack(f"{family.prefix}model.layers", [kind] * count, start), groups


def _unquantized(name: str, rows: int, columns: int, role: Role, parallel: Parallel, gguf: str) -> TensorGroup:
    """A matrix that no weight format of safetensors touches (GGUF's own rules do)."""
    return replace(parts.linear(name, rows, columns, role, parallel, gguf), linears=())
