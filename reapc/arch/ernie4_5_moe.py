"""ERNIE-4.5: softmax router with a correction bias in ``moe_statics`` (1, E), shared experts, dense first layers.

Keys have names of their own: moe_num_experts, moe_k, moe_layer_start_index, moe_layer_end_index, moe_layer_interval.
Router and bias are float32 (transformers keeps them so, vLLM too). An MTP block (model.mtp_*) is not described: its
config key is in no published text config that we have, and llama.cpp and transformers drop it.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import expert_count, read
from reapc.arch.gqa_family import Decoder, decoder
from reapc.arch.spec import GgufPart, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("ernie4_5_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of an ERNIE-4.5 MoE config; ReapcError names a key that is missing, wrong or contradicted."""
    tied = read(config, "tie_word_embeddings", bool, where, True)
    d = decoder(config, where, ("moe_num_experts", "num_experts", "num_local_experts"), tied=tied)
    d.refuse("use_bias", "a model with biases everywhere")
    top_k, _ = expert_count(config, where, ("moe_k", "num_experts_per_tok"))
    width, dense = d.number("moe_intermediate_size"), d.number("intermediate_size")
    shared = d.number("moe_num_shared_experts", 0)
    statics = TensorGroup(
        "mlp.moe_statics.e_score_correction_bias", (1,), "router", "replicate", 1, (),
        (GgufPart("exp_probs_b.bias", (), True, before=(1,)),), "float32",
    )  # fmt: skip
    moe = [
        parts.router("mlp.gate.weight", d.hidden, "float32"),
        statics,
        *parts.experts("mlp.experts", d.hidden, width),
        *(parts.mlp("mlp.shared_experts", d.hidden, width * shared, "shared_expert", "_shexp") if shared else []),
    ]
    sparse = d.layer(d.attention(), moe)
    plain = d.layer(d.attention(), parts.mlp("mlp", d.hidden, dense), is_moe=False)
    return d.spec(
        family="ernie4_5_moe",
        model_type=str(config["model_type"]),
        kinds=[sparse if has else plain for has in _sparse_layers(d)],
        width=width,
        top_k=top_k,
        dense_intermediate_size=dense,
        gguf_arch="ernie4_5-moe",
        shared_experts=shared,
    )


def _sparse_layers(d: Decoder) -> list[bool]:
    """Whether a layer has experts: from the start to the end index (-1: the last), every ``interval``-th one."""
    start, interval = d.number("moe_layer_start_index", 1), d.number("moe_layer_interval", 1)
    end = read(d.config, "moe_layer_end_index", int, d.where, -1)
    last = d.count - 1 if end == -1 else end
    if not start <= last < d.count:
        raise ReapcError(
            f"{d.where}: moe_layer_start_index = {start} and moe_layer_end_index = {end} contradict each other, or "
            f"num_hidden_layers = {d.count}"
        )
    if interval < 1:
        raise ReapcError(f"{d.where}: moe_layer_interval = {interval}: at least 1 expected")
    return [start <= i <= last and (i + 1) % interval == 0 for i in range(d.count)]
