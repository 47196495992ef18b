"""Gemma-4 MoE: a dense MLP and experts side by side in every layer, sliding attention on five layers of six.

Full-attention layers have a head size of their own and, with ``attention_k_eq_v``, KV heads of their own and no v_proj
(the cache keeps K and V all the same, as only K is rotated; vLLM loads k_proj once more in v_proj's place, which is not
counted here). The router scales its input (``router.scale``) and each expert's share (``router.per_expert_scale``).
Embedding and head are tied. Names as transformers 5.23 saves them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, read_list, text_config
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import GgufPart, LayerKind, ModelSpec, TensorGroup
from reapc.errors import CannotBeDone, ReapcError

MODEL_TYPES = ("gemma4",)
PREFIX = "model.language_model."


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Gemma-4 config; ReapcError names a key that is missing or wrong. CannotBeDone for dense models,
    and for layers that share a cache or take per-layer inputs (the small ones)."""
    text, text_where = text_config(config, where)
    if not read(text, "enable_moe_block", bool, text_where, False):
        raise CannotBeDone(
            f"{text_where}: enable_moe_block is not true: no experts to prune: this gemma4 model is dense",
            hint="reapc works on Mixture-of-Experts checkpoints",
        )
    tied = read({**config, **text}, "tie_word_embeddings", bool, text_where, True)
    nested = "" if text is config else "text_config."
    d = decoder(text, text_where, ("num_experts", "num_local_experts"), tied=tied, key_prefix=nested, own_head_dim=True)
    d.refuse("num_kv_shared_layers", "a cache that layers share")
    d.refuse("hidden_size_per_layer_input", "an input per layer")
    d.refuse("use_double_wide_mlp", "a double-wide MLP")
    if config.get("audio_config"):
        raise CannotBeDone(f"{where}: audio_config: an audio tower is not supported")
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    equal = d.flag("attention_k_eq_v", False)
    wide = read(text, "global_head_dim", int, text_where)
    # transformers reads the KV heads of full layers only where K and V are one matrix.
    wide_kv = read(text, "num_global_key_value_heads", int, text_where, d.kv_heads) if equal else d.kv_heads
    window = read(text, "sliding_window", int, text_where)
    kinds = {
        "sliding_attention": _layer(d, width, dense, d.kv_heads, d.head_dim, window, False),
        "full_attention": _layer(d, width, dense, wide_kv, wide, None, equal),
    }
    types = layer_types(text, "layer_types", d.count, text_where)
    if types[-1] != "full_attention":  # transformers would turn it into one
        raise ReapcError(f"{text_where}: the last of layer_types is {types[-1]!r}: 'full_attention' expected")
    vision = config.get("vision_config")
    return d.spec(
        family="gemma4",
        model_type=str(config["model_type"]),
        kinds=[kinds[name] for name in types],
        width=width,
        prefix=PREFIX,
        top_k=read(text, "top_k_experts", int, text_where),
        dense_intermediate_size=dense,
        dtype=dtype_of({**config, **text}),
        gguf_arch="gemma4",
        gguf_extra=(GgufPart("rope_freqs.weight", (wide // 2,)),),
        vision_parameters=_vision(vision, d.hidden, f"{where}: vision_config") if vision else 0,
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def layer_types(config: dict[str, Any], key: str, count: int, where: str) -> list[str]:
    """ "sliding_attention" or "full_attention" for each of ``count`` layers."""
    types = read_list(config, key, count, where)
    for index, value in enumerate(types):
        if value not in ("sliding_attention", "full_attention"):
            raise ReapcError(f"{where}: {key}[{index}] = {value!r}: 'sliding_attention' or 'full_attention' expected")
    return types


def _layer(
    d: Decoder, width: int, dense: int, kv_heads: int, head_dim: int, window: int | None, k_eq_v: bool
) -> LayerKind:
    hidden = d.hidden

    def norm(name: str, gguf: str) -> TensorGroup:
        return parts.vector(f"{name}.weight", hidden, gguf=f"{gguf}.weight")

    attention = parts.gqa(
        "self_attn", hidden, d.heads, kv_heads, head_dim, qk_norm=head_dim, bias=d.flag("attention_bias", False)
    )
    if k_eq_v:
        attention = [group for group in attention if not group.name.startswith("self_attn.v_proj.")]
    gate_up, down = parts.fused_experts("experts", hidden, width)
    fused = GgufPart("ffn_gate_up_exps.weight", (2 * width, hidden), True)  # the converter leaves them fused
    tensors = [
        norm("input_layernorm", "attn_norm"),
        *attention,
        norm("post_attention_layernorm", "post_attention_norm"),
        norm("pre_feedforward_layernorm", "ffn_norm"),
        *parts.mlp("mlp", hidden, dense),
        norm("post_feedforward_layernorm_1", "post_ffw_norm_1"),
        norm("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
        parts.router("router.proj.weight", hidden),
        parts.vector("router.scale", hidden, "router", gguf="ffn_gate_inp.scale"),
        TensorGroup(
            "router.per_expert_scale", (), "router", "replicate", 0, (), (GgufPart("ffn_down_exps.scale", (), True),)
        ),
        replace(gate_up, gguf=(fused,)),
        down,
        norm("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        parts.vector("layer_scalar", 1, "other", gguf="layer_output_scale.weight"),
    ]
    return LayerKind(tuple(tensors), (parts.gqa_cache(kv_heads, head_dim, window=window),), is_moe=True)


def _vision(config: dict[str, Any], hidden: int, where: str) -> int:
    """The tower: patch projection, two tables of positions, blocks with gated MLPs and norms, and the projection into
    the text model; ``standardize`` adds two vectors, clipped linears four numbers each."""
    size = read(config, "hidden_size", int, where)
    inner = read(config, "intermediate_size", int, where)
    head_dim = read(config, "head_dim", int, where)
    heads = read(config, "num_attention_heads", int, where)
    kv_heads = read(config, "num_key_value_heads", int, where, heads)
    patch = 3 * read(config, "patch_size", int, where) ** 2
    attention = 2 * size * heads * head_dim + 2 * size * kv_heads * head_dim + 2 * head_dim
    clips = 7 * 4 if read(config, "use_clipped_linears", bool, where, False) else 0
    block = attention + 3 * size * inner + 4 * size + clips
    positions = 2 * read(config, "position_embedding_size", int, where) * size
    standard = 2 * size if read(config, "standardize", bool, where, False) else 0
    blocks = read(config, "num_hidden_layers", int, where) * block
    return patch * size + positions + standard + size * hidden + blocks
