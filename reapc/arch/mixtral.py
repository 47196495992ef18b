"""Mixtral: softmax over the top-k logits, experts w1 (gate), w3 (up), w2 (down) under ``block_sparse_moe``.

It is "llama" to llama.cpp, which keeps the cache of all tokens; a ``sliding_window`` is vLLM's alone.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.gqa_family import decoder, rope_freqs
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("mixtral",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Mixtral config; ReapcError names a key that is missing or wrong."""
    d = decoder(config, where, ("num_local_experts", "num_experts"))
    width = d.number("intermediate_size")
    moe = [
        parts.router("block_sparse_moe.gate.weight", d.hidden),
        *parts.experts("block_sparse_moe.experts", d.hidden, width, ("w1", "w3", "w2")),
    ]
    return d.spec(
        family="mixtral",
        model_type=str(config["model_type"]),
        kinds=[d.layer(d.attention(), moe, window=d.window())] * d.count,
        width=width,
        gguf_arch="llama",
        gguf_extra=rope_freqs(d),
    )
