"""Nemotron-H: every layer is one mixer behind one norm: Mamba2 (M), attention (*), experts (E) or an MLP (-).

Names as published: ``backbone.`` (transformers writes the same). Experts have no gate (relu squared), and in Super and
Ultra they work in a latent space (moe_latent_size) between fc1_latent_proj and fc2_latent_proj. The MTP head is a short
pattern of its own under ``mtp.``: the first of its layers has enorm, hnorm and eh_proj, the last final_layernorm (vLLM
nemotron_h_mtp.py and llama.cpp conversion/nemotron.py agree); llama.cpp folds it into one block.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.linear_attention import mamba2
from reapc.arch.spec import CacheStream, GgufPart, LayerKind, LayerSpec, ModelSpec, Parallel, Role, TensorGroup
from reapc.errors import CannotBeDone, ReapcError

MODEL_TYPES = ("nemotron_h",)

_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Nemotron-H config; ReapcError names a key that is missing or wrong."""
    pattern = layer_pattern(config, where, "hybrid_override_pattern", "layers_block_type")
    count = read(config, "num_hidden_layers", int, where, len(pattern))
    if count != len(pattern):
        key = "layers_block_type" if config.get("layers_block_type") is not None else "hybrid_override_pattern"
        raise ReapcError(f"{where}: {key} has {len(pattern)} entries, and num_hidden_layers = {count}")
    if "E" not in pattern:
        raise CannotBeDone(f"{where}: no experts to prune: no layer of this nemotron_h model has experts")
    experts, keys = expert_count(config, where, ("n_routed_experts", "num_local_experts", "num_experts"))
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    kv_heads = read(config, "num_key_value_heads", int, where, heads)
    head_dim = read(config, "head_dim", int, where, hidden // heads)
    vocab = read(config, "vocab_size", int, where)
    tied = bool(config.get("tie_word_embeddings", False))
    attention = parts.gqa(
        "mixer", hidden, heads, kv_heads, head_dim, bias=read(config, "attention_bias", bool, where, False)
    )
    cache = (parts.gqa_cache(kv_heads, head_dim),)
    moe = _moe(config, hidden, where)
    norm = [parts.vector("norm.weight", hidden, gguf="attn_norm.weight")]
    kinds = {
        "*": LayerKind((*norm, *attention), cache),
        "E": LayerKind((*norm, *moe), is_moe=True),
    }
    if "M" in pattern:
        kinds["M"] = mamba2(config, hidden, where).layer(norm)
    if "-" in pattern:
        width = read(config, "intermediate_size", int, where)
        kinds["-"] = LayerKind((*norm, *_mlp("mixer", hidden, width, _bias(config, where), "dense_mlp", "")))

    return ModelSpec(
        family="nemotron_h",
        model_type=str(config["model_type"]),
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=read(config, "num_experts_per_tok", int, where),
        expert_intermediate_size=read(config, "moe_intermediate_size", int, where),
        dense_intermediate_size=read(config, "intermediate_size", int, where, 0),
        max_context=read(config, "max_position_embeddings", int, where, 262144),
        tied_embeddings=tied,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=parts.stack("backbone.layers", (kinds[letter] for letter in pattern)),
        outer=_outer(hidden, vocab, tied),
        gguf_arch="nemotron_h_moe",
        mtp_layers=_mtp_layers(config, where, hidden, count, attention, cache, moe),
        mtp_count_keys=("num_nextn_predict_layers",) if config.get("num_nextn_predict_layers") else (),
        shared_experts=read(config, "n_shared_experts", int, where, 1),
        norm_topk=read(config, "norm_topk_prob", bool, where, True),
        n_group=read(config, "n_group", int, where, 1),
        topk_group=read(config, "topk_group", int, where, 1),
        quantization=config.get("quantization_config"),
    )


def layer_pattern(config: dict[str, Any], where: str, pattern_key: str, list_key: str) -> str:
    """The layers as letters, from the list of names (newer configs) or the pattern; both have to agree."""
    names = read(config, list_key, list, where, [])
    for name in names:
        if name not in _TYPES:
            raise ReapcError(f"{where}: {list_key}: {name!r}: one of {', '.join(_TYPES)} expected")
    listed = "".join(_TYPES[name] for name in names)
    pattern = read(config, pattern_key, str, where) if not listed else read(config, pattern_key, str, where, listed)
    for letter in pattern:
        if letter not in "M*E-":
            raise ReapcError(
                f"{where}: {pattern_key}: {letter!r}: M (Mamba2), * (attention), E (MoE) or - (MLP) expected"
            )
    if listed and listed != pattern:
        raise ReapcError(f"{where}: {list_key} and {pattern_key} contradict each other")
    return pattern


def _bias(config: dict[str, Any], where: str) -> bool:
    return read(config, "mlp_bias", bool, where, False)


def _mlp(prefix: str, hidden: int, width: int, bias: bool, role: Role, suffix: str) -> list[TensorGroup]:
    """up and down of an MLP without a gate."""
    groups = [
        parts.linear(f"{prefix}.up_proj", width, hidden, role, "column", f"ffn_up{suffix}"),
        parts.linear(f"{prefix}.down_proj", hidden, width, role, "row", f"ffn_down{suffix}"),
    ]
    if bias:
        groups += [
            parts.vector(f"{prefix}.up_proj.bias", width, role, "column", f"ffn_up{suffix}.bias"),
            parts.vector(f"{prefix}.down_proj.bias", hidden, role, "replicate", f"ffn_down{suffix}.bias"),
        ]
    return groups


def _moe(config: dict[str, Any], hidden: int, where: str) -> list[TensorGroup]:
    """Router, experts, shared expert and latent projections of one MoE layer."""
    width = read(config, "moe_intermediate_size", int, where)
    latent = read(config, "moe_latent_size", int, where, 0)
    bias = _bias(config, where)
    inner = latent or hidden

    def routed(name: str, shape: tuple[int, int], gguf: str, parallel: Parallel) -> TensorGroup:
        part = (GgufPart(f"{gguf}.weight", shape, True),)
        return TensorGroup(f"mixer.experts.{{e}}.{name}.weight", shape, "expert", parallel, None, (shape,), part)

    groups = [
        parts.router("mixer.gate.weight", hidden),
        parts.router_bias("mixer.gate.e_score_correction_bias"),
        routed("up_proj", (width, inner), "ffn_up_exps", "expert"),
        routed("down_proj", (inner, width), "ffn_down_exps", "expert_row"),
    ]
    if read(config, "n_shared_experts", int, where, 1):
        shared = read(config, "moe_shared_expert_intermediate_size", int, where)
        groups += _mlp("mixer.shared_experts", hidden, shared, bias, "shared_expert", "_shexp")
    if latent:
        pairs = (("fc1", latent, hidden, "down"), ("fc2", hidden, latent, "up"))
        for name, out, into, gguf in pairs:
            project, part = f"mixer.{name}_latent_proj", f"ffn_latent_{gguf}"
            groups.append(parts.linear(project, out, into, "other", "replicate", part))
            if bias:
                groups.append(parts.vector(f"{project}.bias", out, "other", "replicate", f"{part}.bias"))
    return groups


def _outer(hidden: int, vocab: int, tied: bool) -> tuple[TensorGroup, ...]:
    embedding, _, *head = parts.outer(hidden, vocab, tied)
    table = TensorGroup("backbone.embeddings.weight", embedding.shape, "embedding", "vocab", None, (), embedding.gguf)
    return (table, parts.vector("backbone.norm_f.weight", hidden, gguf="output_norm.weight"), *head)


def _mtp_layers(
    config: dict[str, Any], where: str, hidden: int, count: int, attention: list[TensorGroup],
    cache: tuple[CacheStream, ...], moe: list[TensorGroup],
) -> tuple[LayerSpec, ...]:  # fmt: skip
    """The MTP head's layers. All have the index ``count``: to llama.cpp they are one block, whose norm before the
    experts is called post_attention_norm."""
    predicted = read(config, "num_nextn_predict_layers", int, where, 0)
    if not predicted:
        return ()
    pattern = layer_pattern(config, where, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if predicted != 1 or pattern != "*E":
        raise ReapcError(
            f"{where}: num_nextn_predict_layers = {predicted} with the MTP pattern {pattern!r}: 1 with '*E' expected"
        )
    first = [
        parts.vector("enorm.weight", hidden, gguf="nextn.enorm.weight"),
        parts.vector("hnorm.weight", hidden, gguf="nextn.hnorm.weight"),
        parts.linear("eh_proj", hidden, 2 * hidden, "other", "column", "nextn.eh_proj"),
        parts.vector("norm.weight", hidden, gguf="attn_norm.weight"),
    ]
    second = [parts.vector("norm.weight", hidden, gguf="post_attention_norm.weight")]
    last = parts.vector("final_layernorm.weight", hidden, gguf="nextn.shared_head_norm.weight")
    return (
        LayerSpec(count, "mtp.layers.0", LayerKind((*first, *attention), cache)),
        LayerSpec(count, "mtp.layers.1", LayerKind((*second, *moe, last), is_moe=True)),
    )
