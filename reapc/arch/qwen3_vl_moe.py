"""Qwen3-VL-MoE: Qwen3-MoE's text model under ``model.language_model.`` with fused, transposed experts, and a vision
tower with deepstack mergers under ``model.visual.``.

Shapes as in the headers of the published checkpoints (github gogongxt/python, scripts/models/qwen3_vl_*.md):
gate_up_proj (E, hidden, 2 width), down_proj (E, width, hidden). transformers 5.23 reads those and saves the others.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read
from reapc.arch.gqa_family import decoder, qwen_layers
from reapc.arch.qwen3_5_moe import vision_parameters
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("qwen3_vl_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen3-VL-MoE config; ReapcError names a key that is missing or wrong."""
    text, text_where = read(config, "text_config", dict, where), f"{where}: text_config"
    # The text part may say otherwise (its class's default is true): transformers asks the whole.
    tied = read(config, "tie_word_embeddings", bool, where, False)
    d = decoder(text, text_where, ("num_experts", "num_local_experts"), tied=tied, key_prefix="text_config.")
    width = d.number("moe_intermediate_size")
    moe = [
        parts.router("mlp.gate.weight", d.hidden),
        *parts.fused_experts("mlp.experts", d.hidden, width, transposed=True),
    ]
    kinds, dense = qwen_layers(d, d.attention(bias=d.flag("attention_bias", False), qk_norm=d.head_dim), moe)
    vision = read(config, "vision_config", dict, where, {})
    return d.spec(
        family="qwen3_vl_moe",
        model_type=str(config["model_type"]),
        kinds=kinds,
        width=width,
        prefix="model.language_model.",
        dense_intermediate_size=dense,
        max_context=read(text, "max_position_embeddings", int, text_where, 128_000),
        dtype=dtype_of({**config, **text}),
        gguf_arch="qwen3vlmoe",
        norm_topk=d.flag("norm_topk_prob", True),  # transformers' class always does
        vision_parameters=_vision(vision, f"{where}: vision_config") if vision else 0,
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _vision(config: dict[str, Any], where: str) -> int:
    """The tower of Qwen3.5, and one merger more per deepstack layer, whose norm is over the merged patches."""
    merged = read(config, "hidden_size", int, where) * read(config, "spatial_merge_size", int, where) ** 2
    out = read(config, "out_hidden_size", int, where)
    merger = 2 * merged + merged * (merged + 1) + out * (merged + 1)
    return vision_parameters(config, where) + len(read(config, "deepstack_visual_indexes", list, where, [])) * merger
