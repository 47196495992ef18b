"""Llama-4: top-1 sigmoid router that scales the expert's input, a shared expert, fused transposed experts, chunked
attention on the rope layers and full attention on every fourth. Its q and k norms have no weights.

The catalogue's configs are trimmed copies without ``vision_config``: ``VISION`` stands in for it.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import dtype_of, read, read_list
from reapc.arch.gqa_family import Decoder, decoder, rope_freqs
from reapc.arch.spec import ModelSpec
from reapc.errors import ReapcError

MODEL_TYPES = ("llama4",)
PREFIX = "language_model.model."
# The tower of the published Scout and Maverick, which are alike (their config.json; transformers' defaults differ).
VISION: dict[str, Any] = {
    "hidden_size": 1408, "num_hidden_layers": 34, "num_channels": 3, "intermediate_size": 5632, "image_size": 336,
    "patch_size": 14, "vision_output_dim": 4096, "projector_input_dim": 4096, "projector_output_dim": 4096,
}  # fmt: skip
_LAYER_TYPES = ("chunked_attention", "full_attention")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Llama-4 config; ReapcError names a key that is missing, wrong or contradicted."""
    text, text_where = read(config, "text_config", dict, where), f"{where}: text_config"
    tied = read(config, "tie_word_embeddings", bool, where, False)
    keys = ("num_local_experts", "num_experts")
    d = decoder(text, text_where, keys, tied=tied, key_prefix="text_config.", own_head_dim=True)
    width = d.number("intermediate_size")
    dense = read(text, "intermediate_size_mlp", int, text_where, 16384)
    attention = d.attention(bias=d.flag("attention_bias", False))
    moe = [
        parts.router("feed_forward.router.weight", d.hidden),
        *parts.fused_experts("feed_forward.experts", d.hidden, width, transposed=True),
        *parts.mlp("feed_forward.shared_expert", d.hidden, width, "shared_expert", "_shexp"),
    ]
    mlp = {True: moe, False: parts.mlp("feed_forward", d.hidden, dense)}
    chunk = d.number("attention_chunk_size", 0) or None
    kinds = {
        (sparse, full): d.layer(attention, mlp[sparse], is_moe=sparse, window=None if full else chunk)
        for sparse in (True, False)
        for full in (True, False)
    }
    vision = read(config, "vision_config", dict, where, VISION)
    return d.spec(
        family="llama4",
        model_type=str(config["model_type"]),
        kinds=[kinds[pair] for pair in zip(_sparse_layers(d), _full_attention(d), strict=True)],
        width=width,
        prefix=PREFIX,
        outer=parts.outer(d.hidden, d.vocab, tied, prefix=PREFIX, head="language_model.lm_head.weight"),
        dense_intermediate_size=dense,
        max_context=read(text, "max_position_embeddings", int, text_where, 131_072),
        dtype=dtype_of({**config, **text}),
        gguf_arch="llama4",
        gguf_extra=rope_freqs(d),
        shared_experts=1,
        norm_topk=False,
        vision_parameters=_vision(vision, f"{where}: vision_config", d.hidden),
        quantization=config.get("quantization_config") or text.get("quantization_config"),
    )


def _sparse_layers(d: Decoder) -> list[bool]:
    """Whether a layer has experts: every ``interleave_moe_layer_step``-th. A ``moe_layers`` that says otherwise is
    refused: transformers would follow it, vLLM and llama.cpp would not."""
    step = d.number("interleave_moe_layer_step", 1)
    if step < 1:
        raise ReapcError(f"{d.where}: interleave_moe_layer_step = {step}: at least 1 expected")
    layers = list(range(step - 1, d.count, step))
    listed = read(d.config, "moe_layers", list, d.where, [])
    if listed and listed != layers:
        raise ReapcError(f"{d.where}: moe_layers = {listed} contradicts interleave_moe_layer_step = {step}")
    return [i in layers for i in range(d.count)]


def _full_attention(d: Decoder) -> list[bool]:
    """Whether a layer attends to everything: ``layer_types``, else those that ``no_rope_layers`` marks with 0, else
    every ``no_rope_layer_interval``-th (the order and defaults of transformers' Llama4TextConfig)."""
    if d.config.get("layer_types") is not None:
        types = read_list(d.config, "layer_types", d.count, d.where)
        for i, kind in enumerate(types):
            if kind not in _LAYER_TYPES:
                words = " or ".join(map(repr, _LAYER_TYPES))
                raise ReapcError(f"{d.where}: layer_types[{i}] = {kind!r}: {words} expected")
        return [kind == "full_attention" for kind in types]
    if d.config.get("no_rope_layers"):
        return [not rope for rope in read_list(d.config, "no_rope_layers", d.count, d.where)]
    interval = max(d.number("no_rope_layer_interval", 4), 1)
    return [(i + 1) % interval == 0 for i in range(d.count)]


def _vision(config: dict[str, Any], where: str, text_hidden: int) -> int:
    """Patch projection, class token and positions, two norms, blocks with biases, the adapter and the projector.

    ``intermediate_size`` is the width of a block's MLP and of the shuffled patches that the adapter takes.
    """
    size = read(config, "hidden_size", int, where)
    inner = read(config, "intermediate_size", int, where)
    patch = read(config, "patch_size", int, where)
    pixels = read(config, "num_channels", int, where, 3) * patch**2
    positions = (read(config, "image_size", int, where) // patch) ** 2 + 1
    block = 4 * size * (size + 1) + 2 * size * inner + inner + size + 4 * size
    projected = read(config, "projector_output_dim", int, where)
    adapter = inner * read(config, "projector_input_dim", int, where) + projected**2
    projector = read(config, "vision_output_dim", int, where) * text_hidden
    outside = pixels * size + size + positions * size + 4 * size
    return outside + read(config, "num_hidden_layers", int, where) * block + adapter + projector
