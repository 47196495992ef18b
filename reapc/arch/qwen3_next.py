"""Qwen3-Next: gated delta net in three layers of four, gated full attention in the fourth, experts and a gated shared
expert in all, one MTP layer.

Names as in the dump of Qwen3-Next-80B-A3B-Instruct (github gogongxt/python): experts one by one, the MTP layer under
``mtp.`` although its config does not declare it. ``language_model`` is Qwen3.5's too.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read
from reapc.arch.linear_attention import gated_delta_net, layer_types
from reapc.arch.spec import GgufPart, LayerKind, LayerSpec, ModelSpec, TensorGroup

MODEL_TYPES = ("qwen3_next",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen3-Next config; ReapcError names a key that is missing or wrong."""
    return language_model(
        config, where, family="qwen3_next", model_type=str(config["model_type"]), gguf_arch="qwen3next",
        norm_topk=bool(config.get("norm_topk_prob", True)), tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


def language_model(
    config: dict[str, Any], where: str, *, family: str, model_type: str, gguf_arch: str, norm_topk: bool, tied: bool,
    prefix: str = "model.", key_prefix: str = "", fused_inputs: bool = True, fused_experts: bool = False,
    fused_mtp: bool = False, fp32_decay: bool = False, recurrent_dtype: str = "",
) -> ModelSpec:  # fmt: skip
    """The text model of Qwen3-Next and its descendants.

    ``prefix`` comes before its names on disk, ``key_prefix`` before its config keys. ``fused_inputs``: see
    ``gated_delta_net``; ``fused_experts`` and ``fused_mtp``: experts of the layers, and of the MTP layer, fused.
    """
    experts, keys = expert_count(config, where, ("num_experts", "num_local_experts"), key_prefix)
    hidden = read(config, "hidden_size", int, where)
    heads = read(config, "num_attention_heads", int, where)
    kv_heads = read(config, "num_key_value_heads", int, where, heads)
    head_dim = read(config, "head_dim", int, where, hidden // heads)
    width = read(config, "moe_intermediate_size", int, where)
    shared = read(config, "shared_expert_intermediate_size", int, where)
    dense = read(config, "intermediate_size", int, where, 0)
    count = read(config, "num_hidden_layers", int, where)
    vocab = read(config, "vocab_size", int, where)
    step = read(config, "decoder_sparse_step", int, where, 1)
    mtp_count = read(config, "mtp_num_hidden_layers", int, where, 1)
    dense_layers = set(config.get("mlp_only_layers") or [])
    full = layer_types(config, count, where)

    before = [parts.vector("input_layernorm.weight", hidden, gguf="attn_norm.weight")]
    norm = parts.vector("post_attention_layernorm.weight", hidden, gguf="post_attention_norm.weight")
    mixer = gated_delta_net(config, hidden, where, fused=fused_inputs, fp32=fp32_decay, recurrent_dtype=recurrent_dtype)
    bias = bool(config.get("attention_bias", False))
    attention = parts.gqa("self_attn", hidden, heads, kv_heads, head_dim, bias=bias, qk_norm=head_dim, gated=True)
    cache = (parts.gqa_cache(kv_heads, head_dim),)

    def moe(fused: bool) -> list[TensorGroup]:
        routed = parts.fused_experts if fused else parts.experts
        return [norm, parts.router("mlp.gate.weight", hidden), *routed("mlp.experts", hidden, width), *shared_expert]

    shared_expert = [*parts.mlp("mlp.shared_expert", hidden, shared, "shared_expert", "_shexp"), shared_gate(hidden)]
    plain = [norm, *parts.mlp("mlp", hidden, dense)]
    kinds = {
        (True, True): LayerKind((*before, *attention, *moe(fused_experts)), cache, is_moe=True),
        (True, False): LayerKind((*before, *attention, *plain), cache),
        (False, True): mixer.layer(before, moe(fused_experts), is_moe=True),
        (False, False): mixer.layer(before, plain),
    }
    mtp_kind = LayerKind((*before, *attention, *moe(fused_mtp)), cache, is_moe=True)
    return ModelSpec(
        family=family,
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=experts,
        top_k=read(config, "num_experts_per_tok", int, where),
        expert_intermediate_size=width,
        dense_intermediate_size=dense,
        max_context=read(config, "max_position_embeddings", int, where, 262144),
        tied_embeddings=tied,
        dtype=dtype_of(config),
        expert_count_keys=keys,
        layers=parts.stack(
            f"{prefix}layers",
            (kinds[full[i], i not in dense_layers and (i + 1) % step == 0] for i in range(count)),
        ),
        outer=parts.outer(hidden, vocab, tied, prefix=prefix),
        gguf_arch=gguf_arch,
        mtp_layers=tuple(LayerSpec(count + i, f"mtp.layers.{i}", mtp_kind) for i in range(mtp_count)),
        mtp_outer=mtp_outer(hidden, count) if mtp_count else (),
        mtp_count_keys=(f"{key_prefix}mtp_num_hidden_layers",) if mtp_count else (),
        shared_experts=1,
        norm_topk=norm_topk,
        quantization=config.get("quantization_config"),
    )


def shared_gate(hidden: int) -> TensorGroup:
    """The shared expert's sigmoid gate (1, hidden), never quantized."""
    return TensorGroup(
        "mlp.shared_expert_gate.weight", (1, hidden), "shared_expert", "replicate", None, (),
        (GgufPart("ffn_gate_inp_shexp.weight", (1, hidden)),),
    )  # fmt: skip


def mtp_outer(hidden: int, count: int) -> tuple[TensorGroup, ...]:
    """What the MTP head keeps outside its layer; embeddings and head are the main model's. The converter puts it into
    the block after the main model's ``count`` layers."""
    block = f"blk.{count}.nextn"
    return (
        parts.linear("mtp.fc", hidden, 2 * hidden, "other", "column", f"{block}.eh_proj"),
        parts.vector("mtp.pre_fc_norm_embedding.weight", hidden, gguf=f"{block}.enorm.weight"),
        parts.vector("mtp.pre_fc_norm_hidden.weight", hidden, gguf=f"{block}.hnorm.weight"),
        parts.vector("mtp.norm.weight", hidden, gguf=f"{block}.shared_head_norm.weight"),
    )
