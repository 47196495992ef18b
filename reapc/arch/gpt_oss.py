"""gpt-oss: attention with biases and sinks, every second layer sliding; softmax over the chosen top-k; experts, all
with biases, in fused tensors.

Published checkpoints store the experts as MXFP4: ``gate_up_proj_blocks`` uint8 (E, 2 width, hidden/32, 16) and
``gate_up_proj_scales`` uint8 (E, 2 width, hidden/32), down likewise (headers of gpt-oss-20b, github gogongxt/python).
What is described here is the 16 bit tensor that those hold, as transformers saves it dequantized: gate_up_proj
(E, hidden, 2 width) with gate and up interleaved, and down_proj (E, width, hidden). ``quantization`` says the rest.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import expert_count, read, read_list
from reapc.arch.gqa_family import decoder
from reapc.arch.spec import GgufPart, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("gpt_oss",)

_LAYER_TYPES = ("sliding_attention", "full_attention")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a gpt-oss config; ReapcError names a key that is missing, wrong or contradicted."""
    d = decoder(config, where, ("num_local_experts", "num_experts"), own_head_dim=True)
    top_k, _ = expert_count(config, where, ("num_experts_per_tok", "experts_per_token"))
    width = d.number("intermediate_size")
    types = layer_types(config, where)
    window = d.number("sliding_window") if _LAYER_TYPES[0] in types else None
    attention = [
        *d.attention(bias=d.flag("attention_bias", True)),
        parts.vector("self_attn.sinks", d.heads, "attention", "column", "attn_sinks.weight"),
    ]
    moe = [
        parts.router("mlp.router.weight", d.hidden),
        parts.router_bias("mlp.router.bias", "", "ffn_gate_inp.bias"),
        *parts.fused_experts("mlp.experts", d.hidden, width, transposed=True),
        *expert_biases("mlp.experts", d.hidden, width),
    ]
    norms = ("attn_norm", "post_attention_norm")
    windows = zip(_LAYER_TYPES, (window, None), strict=True)
    kinds = {kind: d.layer(attention, moe, norms=norms, window=tokens) for kind, tokens in windows}
    return d.spec(
        family="gpt_oss",
        model_type=str(config["model_type"]),
        kinds=[kinds[kind] for kind in types],
        width=width,
        top_k=top_k,
        max_context=read(config, "max_position_embeddings", int, where, 131_072),
        gguf_arch="gpt-oss",
    )


def layer_types(config: dict[str, Any], where: str) -> list[str]:
    """ "sliding_attention" or "full_attention" for each layer; without the key they alternate, sliding first."""
    count = read(config, "num_hidden_layers", int, where)
    if config.get("layer_types") is None:
        return [_LAYER_TYPES[i % 2] for i in range(count)]
    types = read_list(config, "layer_types", count, where)
    for i, kind in enumerate(types):
        if kind not in _LAYER_TYPES:
            raise ReapcError(f"{where}: layer_types[{i}] = {kind!r}: {' or '.join(map(repr, _LAYER_TYPES))} expected")
    return types


def expert_biases(prefix: str, hidden: int, width: int) -> list[TensorGroup]:
    """gate_up_proj_bias (E, 2 width) and down_proj_bias (E, hidden). Each rank that holds a slice of an expert's down
    matrix keeps its whole bias."""
    gate_up = tuple(GgufPart(f"ffn_{name}_exps.bias", (width,), True) for name in ("gate", "up"))
    down = (GgufPart("ffn_down_exps.bias", (hidden,), True),)
    return [
        TensorGroup(f"{prefix}.gate_up_proj_bias", (2 * width,), "expert", "expert", 0, (), gate_up),
        TensorGroup(f"{prefix}.down_proj_bias", (hidden,), "expert", "replicate", 0, (), down),
    ]
