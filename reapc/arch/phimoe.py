"""Phi-3.5-MoE: sparsemixer routing (top-2, weights that do not add up to 1), LayerNorms with biases, biases in
attention and head.

Rope scaling with factors becomes two vectors in GGUF (Phi3MiniModel in llama.cpp's conversion/phi.py).
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import read_list
from reapc.arch.gqa_family import Decoder, decoder, rope_parameters
from reapc.arch.spec import GgufPart, ModelSpec
from reapc.errors import ReapcError

MODEL_TYPES = ("phimoe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Phi-MoE config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_local_experts", "num_experts"))
    width = d.number("intermediate_size")
    moe = [
        parts.router("block_sparse_moe.gate.weight", d.hidden),
        *parts.experts("block_sparse_moe.experts", d.hidden, width, ("w1", "w3", "w2")),
    ]
    attention = d.attention(bias=d.flag("attention_bias", False))
    outer = [
        *parts.outer(d.hidden, d.vocab, d.tied),
        parts.vector("model.norm.bias", d.hidden, gguf="output_norm.bias"),
    ]
    if d.flag("lm_head_bias", False):
        outer.append(parts.vector("lm_head.bias", d.vocab, "lm_head", "vocab", "output.bias"))
    return d.spec(
        family="phimoe",
        model_type=str(config["model_type"]),
        kinds=[d.layer(attention, moe, norm_bias=True, window=d.window())] * d.count,
        width=width,
        outer=tuple(outer),
        gguf_arch="phimoe",
        gguf_extra=_rope_factors(d),
        norm_topk=False,
    )


def _rope_factors(d: Decoder) -> tuple[GgufPart, ...]:
    """One factor per pair of a head's elements, for long and for short contexts; none without ``long_factor``."""
    rope, where = rope_parameters(d.config, d.where), f"{d.where}: rope_scaling"
    if not rope.get("long_factor"):
        return ()
    found = []
    for name in ("long", "short"):
        size = len(read_list({**rope}, f"{name}_factor", len(rope["long_factor"]), where))
        if size != d.head_dim // 2:
            raise ReapcError(f"{where}: {name}_factor has {size} entries: {d.head_dim // 2} expected, half of head_dim")
        found.append(GgufPart(f"rope_factors_{name}.weight", (size,)))
    return tuple(found)
