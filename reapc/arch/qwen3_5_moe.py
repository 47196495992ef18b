"""Qwen3.5 and Qwen3.6 MoE: Qwen3-Next's text model under ``model.language_model.`` with split input projections and
fused experts, a vision tower under ``model.visual.``, one MTP layer under ``mtp.``.

Names as in the dumps of Qwen3.5-35B-A3B and Qwen3.6-35B-A3B (github gogongxt/python). They differ in two points that
no key declares: Qwen3.5 stores the MTP layer's experts one by one, and A_log and linear_attn.norm in float32; Qwen3.6
fuses the former and stores bfloat16. Of the keys, ``mlp_only_layers`` tells them apart: Qwen3.5's configs have it (an
empty list), Qwen3.6's does not. That is an inference; parameters are the same either way.
"""

from __future__ import annotations

from typing import Any

from reapc.arch.config import around_text, read, text_config
from reapc.arch.qwen3_next import language_model
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("qwen3_5_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Qwen3.5-MoE config; ReapcError names a key that is missing or wrong."""
    text, text_where = text_config(config, where)
    first_generation = "mlp_only_layers" in text
    spec = language_model(
        text,
        text_where,
        family="qwen3_5_moe",
        model_type=str(config["model_type"]),
        gguf_arch="qwen35moe",
        norm_topk=True,  # the class always renormalizes
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        prefix="model.language_model.",
        key_prefix="" if text is config else "text_config.",
        fused_inputs=False,
        fused_experts=True,
        fused_mtp=not first_generation,
        fp32_decay=first_generation,
        recurrent_dtype=read(text, "mamba_ssm_dtype", str, text_where, ""),
    )
    vision = config.get("vision_config")
    tower = vision_parameters(vision, f"{where}: vision_config") if vision else 0
    return around_text(spec, config, text, tower)


def vision_parameters(config: dict[str, Any], where: str) -> int:
    """Parameters of the vision tower: a patch convolution, learned positions, blocks with biases, and the merger."""
    hidden = read(config, "hidden_size", int, where)
    inner = read(config, "intermediate_size", int, where)
    patch = read(config, "patch_size", int, where) ** 2 * read(config, "temporal_patch_size", int, where)
    merged = hidden * read(config, "spatial_merge_size", int, where) ** 2
    out = read(config, "out_hidden_size", int, where)
    block = 4 * hidden + hidden * (4 * hidden + 4) + hidden * (2 * inner + 1) + inner
    embed = hidden * (read(config, "in_channels", int, where) * patch + 1)
    positions = read(config, "num_position_embeddings", int, where) * hidden
    merger = 2 * hidden + merged * (merged + 1) + out * (merged + 1)
    return embed + positions + read(config, "depth", int, where) * block + merger
