"""Granite-MoE: experts in two tensors, ``input_linear`` (E, 2 width, hidden), ``output_linear`` (E, hidden, width);
softmax over the top-k logits. Its multipliers (embedding, attention, residual, logits) change no size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("granitemoe",)

_NAMES = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Granite-MoE config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_local_experts", "num_experts"), equal_heads=True)
    width = d.number("intermediate_size")
    block = "block_sparse_moe"
    moe = [parts.router(f"{block}.router.layer.weight", d.hidden)]
    for group in parts.fused_experts(block, d.hidden, width):
        moe.append(replace(group, name=f"{block}.{_NAMES[group.name.removeprefix(f'{block}.')]}"))
    return d.spec(
        family="granitemoe",
        model_type=str(config["model_type"]),
        kinds=[d.layer(d.attention(bias=d.flag("attention_bias", False)), moe)] * d.count,
        width=width,
        gguf_arch="granitemoe",
    )
