"""Gemma-4 MoE: a dense MLP and experts side by side in every layer, sliding attention on five layers of six.

Full-attention layers have heads and KV heads of their own and, with ``attention_k_eq_v``, no v_proj (the cache keeps K
and V all the same: the norms differ). The router scales its input (``router.scale``) and each expert's share
(``router.per_expert_scale``). Embedding and head are tied. Names as transformers 5.23 saves them.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, read_list, text_config
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import GgufPart, LayerKind, ModelSpec, TensorGroup
from reapc.errors import CannotBeDone, ReapcError

MODEL_TYPES = ("gemma4",)
PREFIX = "model.language_model."
LAYER_TYPES = ("sliding_attention", "full_attention")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Gemma-4 config; ReapcError names a key that is missing or wrong. CannotBeDone for the variants
    whose layers share a cache or take per-layer inputs (the small dense models)."""
    text, text_where = text_config(config, where)
    d = decoder(text, text_where, ("num_experts", "num_local_experts"), tied=True, key_prefix="text_config.")
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input", "use_double_wide_mlp"):
        if text.get(key):
            raise CannotBeDone(f"{text_where}: {key} = {text[key]!r} is not supported")
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    types = read_list(text, "layer_types", d.count, text_where)
    for index, value in enumerate(types):
        if value not in LAYER_TYPES:
            raise ReapcError(f"{text_where}: layer_types[{index}] = {value!r}: {' or '.join(LAYER_TYPES)} expected")
    equal = bool(text.get("attention_k_eq_v", False))
    wide = read(text, "global_head_dim", int, text_where, d.head_dim)
    wide_kv = read(text, "num_global_key_value_heads", int, text_where, d.kv_heads) if equal else d.kv_heads
    window = read(text, "sliding_window", int, text_where)
    kinds = {
        "sliding_attention": _layer(d, width, dense, d.kv_heads, d.head_dim, window, False),
        "full_attention": _layer(d, width, dense, wide_kv, wide, None, equal),
    }
    vision = config.get("vision_config")
    return d.spec(
        family="gemma4",
        model_type="gemma4",
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


def _layer(
    d: Decoder, width: int, dense: int, kv_heads: int, head_dim: int, window: int | None, k_eq_v: bool
) -> LayerKind:
    hidden = d.hidden

    def norm(name: str, gguf: str) -> TensorGroup:
        return parts.vector(f"{name}.weight", hidden, gguf=f"{gguf}.weight")

    attention = parts.gqa("self_attn", hidden, d.heads, kv_heads, head_dim, qk_norm=head_dim)
    if k_eq_v:
        attention = [group for group in attention if group.name != "self_attn.v_proj.weight"]
    gate_up, down = parts.fused_experts("experts", hidden, width)
    gate_up = TensorGroup(
        gate_up.name, gate_up.shape, "expert", "expert", 0, gate_up.linears,
        (GgufPart("ffn_gate_up_exps.weight", (2 * width, hidden), True),),
    )  # fmt: skip
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
        gate_up,
        down,
        norm("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        parts.vector("layer_scalar", 1, "other", gguf="layer_output_scale.weight"),
    ]
    return LayerKind(tuple(tensors), (parts.gqa_cache(kv_heads, head_dim, window=window),), is_moe=True)


def _vision(config: dict[str, Any], hidden: int, where: str) -> int:
    """The tower: patch projection, two tables of positions, blocks with gated MLPs and norms, and the projection into
    the text model; ``standardize`` adds two vectors."""
    size = read(config, "hidden_size", int, where)
    inner = read(config, "intermediate_size", int, where)
    head_dim = read(config, "head_dim", int, where)
    heads = read(config, "num_attention_heads", int, where)
    kv_heads = read(config, "num_key_value_heads", int, where, heads)
    patch = 3 * read(config, "patch_size", int, where) ** 2
    attention = 2 * size * heads * head_dim + 2 * size * kv_heads * head_dim + 2 * head_dim
    block = attention + 3 * size * inner + 4 * size
    positions = 2 * read(config, "position_embedding_size", int, where) * size
    outside = patch * size + positions + (2 * size if config.get("standardize") else 0) + size * hidden
    return outside + read(config, "num_hidden_layers", int, where) * block
