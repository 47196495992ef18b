"""Kimi-Linear: Kimi delta attention in three layers of four, MLA without rope in the rest, DeepSeek-like experts.

Names as in the dump of Kimi-Linear-48B-A3B-Instruct (github gogongxt/python): ``block_sparse_moe`` with w1 (gate), w3
(up), w2 (down). ``kda_layers`` and ``full_attn_layers`` count layers from 1. ``language_model`` is Kimi-K3's too.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.linear_attention import Mixer, kda
from reapc.arch.spec import LayerKind, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("kimi_linear",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Kimi-Linear config; ReapcError names a key that is missing or wrong."""
    linear, linear_where = linear_config(config, where)
    hidden = read(config, "hidden_size", int, where)
    heads = read(linear, "num_heads", int, linear_where)
    mixer = kda(
        "self_attn", hidden, heads, read(linear, "head_dim", int, linear_where),
        read(linear, "short_conv_kernel_size", int, linear_where), full_rank_gate=False, a_log=(1, 1, heads, 1),
        gguf_a=(1, 1, heads, 1), fp32_conv=False,
    )  # fmt: skip
    routed = parts.experts(
        "block_sparse_moe.experts", hidden, read(config, "moe_intermediate_size", int, where), ("w1", "w3", "w2")
    )
    bias = parts.router_bias("block_sparse_moe.gate.e_score_correction_bias", dtype="")
    return language_model(
        config, where, family="kimi_linear", model_type=str(config["model_type"]), gguf_arch="kimi-linear",
        mixer=mixer, moe=[parts.router("block_sparse_moe.gate.weight", hidden), bias, *routed],
    )  # fmt: skip


def linear_config(config: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The sub-config of the delta attention, and its place for errors."""
    return read(config, "linear_attn_config", dict, where), f"{where}: linear_attn_config"


def full_layers(config: dict[str, Any], count: int, where: str) -> set[int]:
    """Layers (from 0) with MLA; the two lists have to name each of the ``count`` layers once."""
    linear, linear_where = linear_config(config, where)
    full = read(linear, "full_attn_layers", list, linear_where)
    delta = read(linear, "kda_layers", list, linear_where)
    named: list[Any] = [*full, *delta]
    if any(not isinstance(layer, int) for layer in named) or sorted(named) != list(range(1, count + 1)):
        raise ReapcError(
            f"{linear_where}: kda_layers ({len(delta)}) and full_attn_layers ({len(full)}) do not name each of the "
            f"{count} layers (num_hidden_layers) once, counted from 1"
        )
    return {layer - 1 for layer in full}


def language_model(
    config: dict[str, Any], where: str, *, family: str, model_type: str, gguf_arch: str, mixer: Mixer,
    moe: list[TensorGroup], mla_gate: bool = False, before_attention: list[TensorGroup] | None = None,
    before_mlp: list[TensorGroup] | None = None, outer: tuple[TensorGroup, ...] = (), prefix: str = "model.",
    head: str = "lm_head.weight", key_prefix: str = "",
) -> ModelSpec:  # fmt: skip
    """The text model of Kimi-Linear and Kimi-K3.

    ``mixer`` is the delta attention, ``moe`` what a MoE layer has beside its shared experts; ``mla_gate``: MLA has an
    output gate g_proj; ``before_attention`` and ``before_mlp`` are more tensors of every layer, ``outer`` more outside.
    """
    experts, keys = expert_count(config, where, ("num_experts", "num_local_experts"), key_prefix)
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    nope = read(config, "qk_nope_head_dim", int, where)
    rope = read(config, "qk_rope_head_dim", int, where)
    v_head_dim = read(config, "v_head_dim", int, where)
    kv_lora = read(config, "kv_lora_rank", int, where)
    q_lora = read(config, "q_lora_rank", int, where, 0)
    width = read(config, "moe_intermediate_size", int, where)
    dense = read(config, "intermediate_size", int, where)
    shared = read(config, "num_shared_experts", int, where, 0)
    count = read(config, "num_hidden_layers", int, where)
    vocab = read(config, "vocab_size", int, where)
    dense_lead = read(config, "first_k_dense_replace", int, where, 0)
    frequency = max(read(config, "moe_layer_freq", int, where, 1), 1)
    full = full_layers(config, count, where)
    tied = bool(config.get("tie_word_embeddings", False))

    attention = parts.mla("self_attn", hidden, heads, kv_lora, nope, rope, v_head_dim, q_lora or None)
    if mla_gate:
        gate = parts.linear("self_attn.g_proj", heads * v_head_dim, hidden, "attention", "column", "attn_gate")
        attention.append(gate)
    cache = (parts.mla_cache(kv_lora, rope),)
    before = [*(before_attention or ()), parts.vector("input_layernorm.weight", hidden, gguf="attn_norm.weight")]
    norm = [*(before_mlp or ()), parts.vector("post_attention_layernorm.weight", hidden, gguf="ffn_norm.weight")]
    sparse = [*norm, *moe]
    if shared:
        sparse += parts.mlp("block_sparse_moe.shared_experts", hidden, shared * width, "shared_expert", "_shexp")
    plain = [*norm, *parts.mlp("mlp", hidden, dense)]
    kinds = {
        (True, True): LayerKind((*before, *attention, *sparse), cache, is_moe=True),
        (True, False): LayerKind((*before, *attention, *plain), cache),
        (False, True): mixer.layer(before, sparse, is_moe=True),
        (False, False): mixer.layer(before, plain),
    }
    context = "max_position_embeddings" if "max_position_embeddings" in config else "model_max_length"
    return ModelSpec(
        family=family,
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=read(config, "num_key_value_heads", int, where, heads),
        head_dim=nope + rope,
        num_experts=experts,
        top_k=read(config, "num_experts_per_token", int, where),
        expert_intermediate_size=width,
        dense_intermediate_size=dense,
        max_context=read(config, context, int, where, 1048576),
        tied_embeddings=tied,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=parts.stack(
            f"{prefix}layers", (kinds[i in full, i >= dense_lead and i % frequency == 0] for i in range(count))
        ),
        outer=(*parts.outer(hidden, vocab, tied, prefix=prefix, head=head), *outer),
        gguf_arch=gguf_arch,
        shared_experts=shared,
        norm_topk=bool(config.get("moe_renormalize", True)),
        n_group=read(config, "num_expert_group", int, where, 1),
        topk_group=read(config, "topk_group", int, where, 1),
        latent_attention=True,
        quantization=config.get("quantization_config"),
    )
