"""Step-3.7-Flash: sigmoid router with a bias, a shared expert, a gate for every attention head, three of four layers
sliding with more heads than the others, dense MTP layers behind the main ones, a vision tower.

Names as published (transformers' conversion_mapping; TensorRT-LLM's test of the real checkpoints: text under
``model.layers``, MTP layers 45 to 47). ``step3p7`` is the multimodal config around a ``step3p5`` text_config; a flat
one is a trimmed copy (the catalogue's). What such a copy lacks is filled in here: heads of sliding layers, 96 for 64
in the published configs (``attention_other_setting``); the attention of MTP layers, sliding there (``layer_types`` has
48 entries); and, as the class does for any config without one, the default vision tower. With these, the numbers are
those of Step-3.5-Flash's card, the same text model: a head of 0.81B, which is one MTP layer, and 11B active.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, expert_count, read, text_config
from reapc.arch.gemma4 import layer_types
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import GgufPart, LayerKind, ModelSpec, Parallel, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("step3p7",)
FIRST_MOE_LAYER = 3  # the class's default
# Lists that published configs go on with for the MTP layers (transformers' Step3p7TextConfig cuts just these).
PER_LAYER = (
    "layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared", "rope_theta", "partial_rotary_factors",
)  # fmt: skip


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Step-3.7 config; ReapcError names a key that is missing, wrong or contradicted."""
    text, text_where = text_config(config, where)
    trimmed = text is config
    nested = "" if trimmed else "text_config."
    kv_heads, _ = expert_count(text, text_where, ("num_key_value_heads", "num_attention_groups"))
    d = decoder(
        {**text, "num_key_value_heads": kv_heads}, text_where,
        ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"),
        key_prefix=nested, own_head_dim=True,
    )  # fmt: skip
    top_k, _ = expert_count(text, text_where, ("num_experts_per_tok", "moe_top_k"))
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    mtp = d.number("num_nextn_predict_layers", 0)
    types = _layer_types(d, mtp)
    window = read(text, "sliding_window", int, text_where) if "sliding_attention" in types else None
    shapes = {"full_attention": (d.heads, d.kv_heads, None), "sliding_attention": (*_sliding(d, trimmed), window)}

    def layer(name: str, is_moe: bool) -> LayerKind:
        heads, kv_heads, window = shapes[name]
        norm = d.head_dim if d.flag("use_qk_norm", True) else 0
        attention = parts.gqa("self_attn", d.hidden, heads, kv_heads, d.head_dim, qk_norm=norm)
        if d.flag("use_head_wise_attn_gate", True):
            # One row for a head, too few for the kernels of weight formats.
            gate = parts.linear("self_attn.g_proj", heads, d.hidden, "attention", "column", "attn_gate")
            attention.append(replace(gate, linears=()))
        made = d.layer(attention, _moe(d, width) if is_moe else parts.mlp("mlp", d.hidden, dense), is_moe=is_moe)
        return replace(made, cache=(parts.gqa_cache(kv_heads, d.head_dim, window=window),))

    pairs = list(zip(types, _moe_layers(d) + [False] * mtp, strict=True))
    kinds = {pair: layer(*pair) for pair in set(pairs)}
    vision = config.get("vision_config", {})
    return d.spec(
        family="step3p7",
        model_type=str(config["model_type"]),
        kinds=[kinds[pair] for pair in pairs[: d.count]],
        width=width,
        top_k=top_k,
        dense_intermediate_size=dense,
        dtype=dtype_of({**config, **text}),
        gguf_arch="step35",
        mtp_layers=parts.stack("model.layers", [kinds[pair] for pair in pairs[d.count :]], d.count),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(d.count + i, d.hidden, d.vocab)),
        mtp_count_keys=(f"{nested}num_nextn_predict_layers",) if mtp else (),
        mtp_list_keys=tuple(f"{nested}{key}" for key in PER_LAYER if mtp and _length(text, key) == d.count + mtp),
        vision_parameters=0 if vision is None else vision_parameters(vision, d.hidden, f"{where}: vision_config"),
        shared_experts=1,
        norm_topk=d.flag("norm_expert_weight", True),
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _length(config: dict[str, Any], key: str) -> int:
    """Entries of the list under ``key``; -1 where there is none."""
    value = config.get(key)
    return len(value) if isinstance(value, list) else -1


def _layer_types(d: Decoder, mtp: int) -> list[str]:
    """Attention of every layer, then of the MTP layers; where the list ends before them, they slide."""
    types = read(d.config, "layer_types", list, d.where)
    length = d.count + mtp if len(types) == d.count + mtp else d.count
    return layer_types(d.config, "layer_types", length, d.where) + ["sliding_attention"] * (d.count + mtp - length)


def _sliding(d: Decoder, trimmed: bool) -> tuple[int, int]:
    """Heads and KV heads of sliding layers."""
    other = read(d.config, "attention_other_setting", dict, d.where, {})
    inside = f"{d.where}: attention_other_setting"
    published = d.heads * 3 // 2 if trimmed else d.heads
    heads = read(d.config, "num_sliding_attention_heads", int, d.where, published)
    heads = read(other, "num_attention_heads", int, inside, heads)
    kv_heads = read(other, "num_attention_groups", int, inside, d.kv_heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ReapcError(
            f"{inside}: num_attention_heads = {heads} is not a multiple of num_attention_groups = {kv_heads}"
        )
    if read(other, "head_dim", int, inside, d.head_dim) != d.head_dim:
        raise ReapcError(f"{inside}: head_dim = {other['head_dim']} contradicts head_dim = {d.head_dim}")
    return heads, kv_heads


def _moe_layers(d: Decoder) -> list[bool]:
    """Which layers have experts: those of ``moe_layers_enum`` ("3,4,5" or a list), or all from
    ``first_k_dense_replace`` on. Keys that contradict each other are refused."""
    first = d.number("first_k_dense_replace", FIRST_MOE_LAYER)
    listed = d.config.get("moe_layers_enum")
    if listed is None:
        return [i >= first for i in range(d.count)]
    items = listed.split(",") if isinstance(listed, str) else listed
    if not isinstance(items, list) or not all(str(item).strip().isdecimal() for item in items):
        raise ReapcError(f"{d.where}: moe_layers_enum = {listed!r}: numbers of layers, as '3,4,5', expected")
    chosen = {int(str(item)) for item in items}
    found = [i in chosen for i in range(d.count)]
    if d.config.get("first_k_dense_replace") is not None and found != [i >= first for i in range(d.count)]:
        raise ReapcError(f"{d.where}: moe_layers_enum contradicts first_k_dense_replace = {first}")
    return found


def _moe(d: Decoder, width: int) -> list[TensorGroup]:
    """Experts in one tensor a projection (E, out, in), the router with its bias, the shared expert."""

    def fused(name: str, out: int, inner: int, gguf: str, parallel: Parallel = "expert") -> TensorGroup:
        part = GgufPart(f"{gguf}.weight", (out, inner), True)
        return TensorGroup(f"moe.{name}.weight", (out, inner), "expert", parallel, 0, ((out, inner),), (part,))

    return [
        parts.router("moe.gate.weight", d.hidden),
        *([parts.router_bias("moe.router_bias")] if d.flag("use_moe_router_bias", True) else []),
        fused("gate_proj", width, d.hidden, "ffn_gate_exps"),
        fused("up_proj", width, d.hidden, "ffn_up_exps"),
        fused("down_proj", d.hidden, width, "ffn_down_exps", "expert_row"),
        *parts.mlp("share_expert", d.hidden, d.number("share_expert_dim"), "shared_expert", "_shexp"),
    ]


def _mtp_outer(layer: int, hidden: int, vocab: int) -> list[TensorGroup]:
    """Beside its decoder layer: embedding and hidden state side by side through eh_proj, norms, and a head of its own
    (vLLM's step3p5_mtp.py; the embedding is the main model's)."""
    prefix, gguf = f"model.layers.{layer}", f"blk.{layer}.nextn"
    head = f"{prefix}.transformer.shared_head"
    matrices = [
        parts.linear(f"{prefix}.eh_proj", hidden, 2 * hidden, "other", gguf=f"{gguf}.eh_proj"),
        parts.linear(f"{head}.output", vocab, hidden, "lm_head", "vocab", f"{gguf}.shared_head_head"),
    ]
    return [
        *(replace(group, linears=()) for group in matrices),
        parts.vector(f"{prefix}.enorm.weight", hidden, gguf=f"{gguf}.enorm.weight"),
        parts.vector(f"{prefix}.hnorm.weight", hidden, gguf=f"{gguf}.hnorm.weight"),
        parts.vector(f"{head}.norm.weight", hidden, gguf=f"{gguf}.shared_head_norm.weight"),
    ]


def vision_parameters(config: dict[str, Any], hidden: int, where: str) -> int:
    """The tower (a patch convolution, learned positions, blocks with biases and two scales, two convolutions that
    double the width) and the projector. Keys as published (width, layers) or the class's; its defaults are the
    published tower's."""
    width = read(config, "width", int, where, read(config, "hidden_size", int, where, 1536))
    layers = read(config, "layers", int, where, read(config, "num_hidden_layers", int, where, 47))
    patch = read(config, "patch_size", int, where, 14)
    image = read(config, "image_size", int, where, 728)
    inner = int(width * read(config, "mlp_ratio", float, where, 8960 / 1536))
    block = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width + 2 * width
    embed = 3 * patch**2 * width + (image // patch) ** 2 * width + 2 * width
    down = 9 * width * 2 * width + 2 * width + 9 * 2 * width * 4 * width + 4 * width
    return embed + layers * block + down + 4 * width * hidden
