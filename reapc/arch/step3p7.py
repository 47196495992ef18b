"""Step-3.7-Flash: sigmoid router with a bias, a shared expert, head-wise attention gates, sliding layers, MTP.

Names on disk as transformers 5.23 reads them (its conversion mapping): ``moe.gate``, ``moe.router_bias``,
``moe.gate_proj`` (E, width, hidden) and so on, ``share_expert``. The catalogue's config is a trimmed copy: sliding
layers have as many heads as the others unless ``attention_other_setting`` says otherwise, and what an MTP layer holds
(attention, a dense MLP, eh_proj, two norms, a head of its own) is read from transformers and llama.cpp's converter, not
from a checkpoint. The vision tower is not counted: the copy has no ``vision_config``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, text_config
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import GgufPart, LayerKind, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("step3p7",)
LAYER_TYPES = ("sliding_attention", "full_attention")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Step-3.7 config; ReapcError names a key that is missing, wrong or contradicted."""
    text, where = text_config(config, where)
    text = {**text, "num_key_value_heads": text.get("num_key_value_heads") or text.get("num_attention_groups")}
    nested = "text_config." if "text_config" in config else ""
    d = decoder(text, where, ("moe_num_experts", "n_routed_experts", "num_experts"), key_prefix=nested)
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    shared = d.number("share_expert_dim", width)
    mtp = d.number("num_nextn_predict_layers", 0)
    types = _layer_types(text, d.count, mtp, where)
    sparse = _moe_layers(text, d.count, where)
    window = read(text, "sliding_window", int, where)
    other = text.get("attention_other_setting") or {}
    sliding_heads = int(other.get("num_attention_heads") or text.get("num_sliding_attention_heads") or d.heads)
    sliding_kv = int(other.get("num_attention_groups") or d.kv_heads)

    def layer(kind: str, is_moe: bool) -> LayerKind:
        heads, kv_heads = (sliding_heads, sliding_kv) if kind == "sliding_attention" else (d.heads, d.kv_heads)
        attention = [
            *parts.gqa("self_attn", d.hidden, heads, kv_heads, d.head_dim, qk_norm=d.head_dim),
            _small("self_attn.g_proj", heads, d.hidden, "attn_gate"),
        ]
        mlp = _moe(d, width, shared) if is_moe else parts.mlp("mlp", d.hidden, dense)
        made = d.layer(attention, mlp, is_moe=is_moe)
        cache = parts.gqa_cache(kv_heads, d.head_dim, window=window if kind == "sliding_attention" else None)
        return replace(made, cache=(cache,))

    pairs = list(zip(types[: d.count], sparse, strict=True))
    kinds = {pair: layer(*pair) for pair in {*pairs, *((kind, False) for kind in types[d.count :])}}
    return d.spec(
        family="step3p7",
        model_type="step3p7",
        kinds=[kinds[pair] for pair in pairs],
        width=width,
        top_k=read(text, "num_experts_per_tok", int, where, text.get("moe_top_k", 8)),
        dense_intermediate_size=dense,
        dtype=dtype_of({**config, **text}),
        gguf_arch="step35",
        mtp_layers=parts.stack("model.layers", [kinds[kind, False] for kind in types[d.count :]], d.count),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(d.count + i, d.hidden, d.vocab)),
        shared_experts=1,
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _layer_types(text: dict[str, Any], count: int, mtp: int, where: str) -> list[str]:
    """Attention of every layer, then of the MTP layers (full where the list ends before them)."""
    types = list(read(text, "layer_types", list, where))
    if len(types) not in (count, count + mtp):
        raise ReapcError(f"{where}: layer_types has {len(types)} entries, and the model has {count} layers")
    for index, value in enumerate(types):
        if value not in LAYER_TYPES:
            raise ReapcError(f"{where}: layer_types[{index}] = {value!r}: {' or '.join(LAYER_TYPES)} expected")
    return types + ["full_attention"] * (count + mtp - len(types))


def _moe_layers(text: dict[str, Any], count: int, where: str) -> list[bool]:
    """Which layers have experts: ``moe_layers_enum`` ("3,4,5"), or all after ``first_k_dense_replace`` (3)."""
    listed = text.get("moe_layers_enum")
    if listed:
        chosen = {int(i) for i in (listed.split(",") if isinstance(listed, str) else listed)}
        return [i in chosen for i in range(count)]
    first = read(text, "first_k_dense_replace", int, where, 3)
    return [i >= first for i in range(count)]


def _small(name: str, rows: int, columns: int, gguf: str) -> TensorGroup:
    """A gate of a few rows (one per head), which no weight format of safetensors touches."""
    return replace(parts.linear(name, rows, columns, "attention", "column", gguf), linears=())


def _moe(d: Decoder, width: int, shared: int) -> list[TensorGroup]:
    def fused(name: str, out: int, inner: int, gguf: str, row: bool = False) -> TensorGroup:
        return TensorGroup(
            f"moe.{name}.weight", (out, inner), "expert", "expert_row" if row else "expert", 0, ((out, inner),),
            (GgufPart(f"{gguf}.weight", (out, inner), True),),
        )  # fmt: skip

    return [
        parts.router("moe.gate.weight", d.hidden),
        parts.router_bias("moe.router_bias"),
        fused("gate_proj", width, d.hidden, "ffn_gate_exps"),
        fused("up_proj", width, d.hidden, "ffn_up_exps"),
        fused("down_proj", d.hidden, width, "ffn_down_exps", row=True),
        *parts.mlp("share_expert", d.hidden, shared, "shared_expert", "_shexp"),
    ]


def _mtp_outer(layer: int, hidden: int, vocab: int) -> list[TensorGroup]:
    prefix, gguf = f"model.layers.{layer}", f"blk.{layer}.nextn"
    head = f"{prefix}.transformer.shared_head"
    matrices = [
        parts.linear(f"{prefix}.eh_proj", hidden, 2 * hidden, "other", "replicate", f"{gguf}.eh_proj"),
        parts.linear(f"{head}.output", vocab, hidden, "lm_head", "vocab", f"{gguf}.shared_head_head"),
    ]
    return [
        *(replace(group, linears=()) for group in matrices),
        parts.vector(f"{prefix}.enorm.weight", hidden, gguf=f"{gguf}.enorm.weight"),
        parts.vector(f"{prefix}.hnorm.weight", hidden, gguf=f"{gguf}.hnorm.weight"),
        parts.vector(f"{head}.norm.weight", hidden, gguf=f"{gguf}.shared_head_norm.weight"),
    ]
