"""Kimi-K2.5 and K2.6: Kimi-K2 as ``text_config`` under ``language_model.``, a MoonViT tower and a projector.

The experts are published as int4 (compressed-tensors, groups of 32), everything else in bf16; there is no MTP layer.
llama.cpp's converter writes the language model as deepseek2 and the rest into a file of its own.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import deepseek
from reapc.arch.config import around_text, read, text_config
from reapc.arch.mla_family import build_family
from reapc.arch.spec import ModelSpec
from reapc.errors import ReapcError

MODEL_TYPES = ("kimi_k25",)

_TEXT_TYPES = ("deepseek_v3", "kimi_k2")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Kimi-K2.5 config; ReapcError names a key that is missing or wrong."""
    read(config, "text_config", dict, where)
    text, text_where = text_config(config, where)
    if read(text, "model_type", str, text_where) not in _TEXT_TYPES:
        raise ReapcError(
            f"{text_where}: model_type = {text['model_type']!r}: {' or '.join(map(repr, _TEXT_TYPES))} expected"
        )
    family = deepseek.family(text, text_where)._replace(
        name="kimi_k25", model_type=str(config["model_type"]), prefix="language_model.", key_prefix="text_config."
    )
    spec = build_family(text, text_where, family)
    return around_text(spec, config, text, vision_parameters(config, where))


def vision_parameters(config: dict[str, Any], where: str) -> int:
    """Parameters of the vision tower and the projector.

    Tower: a patch embedding and a learned grid of positions, then blocks of two LayerNorms, fused q, k, v, an output
    projection and a two-layer MLP, all with biases, and a last LayerNorm. Projector: a LayerNorm, then two linear
    layers on patches merged side by side. Keys have the published names ("vt_hidden_size") or transformers' own.
    """
    vision, place = read(config, "vision_config", dict, where), f"{where}: vision_config"

    def number(published: str, own: str) -> int:
        return read(vision, own if published not in vision and own in vision else published, int, place)

    hidden = number("vt_hidden_size", "hidden_size")
    width = number("vt_intermediate_size", "intermediate_size")
    grid = number("init_pos_emb_height", "pos_emb_height") * number("init_pos_emb_width", "pos_emb_width")
    patch = read(vision, "patch_size", int, place)
    norm = 2 * hidden
    attention = (3 * hidden * hidden + 3 * hidden) + (hidden * hidden + hidden)
    mlp = (width * hidden + width) + (hidden * width + hidden)
    blocks = number("vt_num_hidden_layers", "num_hidden_layers") * (attention + mlp + 2 * norm)
    embedding = hidden * 3 * patch * patch + hidden + grid * hidden

    kernel = read(vision, "merge_kernel_size", list, place)
    if len(kernel) != 2 or not all(isinstance(side, int) and side > 0 for side in kernel):
        raise ReapcError(f"{place}: merge_kernel_size = {kernel!r}: two counts expected")
    merged = hidden * int(kernel[0]) * int(kernel[1])
    text = read(read(config, "text_config", dict, where), "hidden_size", int, f"{where}: text_config")
    projector = norm + (merged * merged + merged) + (text * merged + text)
    return embedding + blocks + norm + projector
