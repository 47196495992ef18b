"""GLM-4.5, 4.6 and 4.7: sigmoid router with a correction bias, a shared expert, dense first layers, an MTP layer that
stores its own embedding and head.

Names, shapes and dtypes as in the headers of GLM-4.5-FP8 (github gogongxt/python, scripts/models/glm_4.5_fp8.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reapc.arch import parts
from reapc.arch.gqa_family import decoder
from reapc.arch.mla_family import dense_layers
from reapc.arch.spec import ModelSpec, TensorGroup

MODEL_TYPES = ("glm4_moe",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a GLM-4.x MoE config; ReapcError names a key that is missing, wrong or contradicted."""
    d = decoder(config, where, ("n_routed_experts", "num_local_experts", "num_experts"))
    width, dense_width = d.number("moe_intermediate_size"), d.number("intermediate_size")
    shared, mtp = d.number("n_shared_experts", 1), d.number("num_nextn_predict_layers", 0)
    attention = d.attention(
        bias=d.flag("attention_bias", False),
        output_bias=False,
        qk_norm=d.head_dim if d.flag("use_qk_norm", False) else 0,
    )
    moe = [
        parts.router("mlp.gate.weight", d.hidden),
        parts.router_bias("mlp.gate.e_score_correction_bias"),
        *parts.experts("mlp.experts", d.hidden, width),
        *(parts.mlp("mlp.shared_experts", d.hidden, width * shared, "shared_expert", "_shexp") if shared else []),
    ]
    norms = ("attn_norm", "post_attention_norm")
    sparse = d.layer(attention, moe, norms=norms)
    plain = d.layer(attention, parts.mlp("mlp", d.hidden, dense_width), is_moe=False, norms=norms)
    return d.spec(
        family="glm4_moe",
        model_type=str(config["model_type"]),
        kinds=[plain if is_dense else sparse for is_dense in dense_layers(config, where)],
        width=width,
        dense_intermediate_size=dense_width,
        gguf_arch="glm4moe",
        mtp_layers=parts.stack("model.layers", [sparse] * mtp, d.count),
        mtp_outer=tuple(group for i in range(mtp) for group in _mtp_outer(d.count + i, d.hidden, d.vocab)),
        mtp_count_keys=("num_nextn_predict_layers",) if mtp else (),
        shared_experts=shared,
        norm_topk=d.flag("norm_topk_prob", True),
        n_group=d.number("n_group", 1),
        topk_group=d.number("topk_group", 1),
    )


def _mtp_outer(layer: int, hidden: int, vocab: int) -> list[TensorGroup]:
    """What an MTP layer keeps beside its decoder layer. No weight format touches it, though GLM-4.5-FP8 stores the
    head in FP8 (eh_proj and the embedding in bf16)."""
    prefix, gguf = f"model.layers.{layer}", f"blk.{layer}.nextn"
    matrices = [
        parts.linear(f"{prefix}.eh_proj", hidden, 2 * hidden, "other", "replicate", f"{gguf}.eh_proj"),
        parts.linear(f"{prefix}.embed_tokens", vocab, hidden, "embedding", "vocab", f"{gguf}.embed_tokens"),
        parts.linear(f"{prefix}.shared_head.head", vocab, hidden, "lm_head", "vocab", f"{gguf}.shared_head_head"),
    ]
    return [
        *(replace(group, linears=()) for group in matrices),
        parts.vector(f"{prefix}.enorm.weight", hidden, gguf=f"{gguf}.enorm.weight"),
        parts.vector(f"{prefix}.hnorm.weight", hidden, gguf=f"{gguf}.hnorm.weight"),
        parts.vector(f"{prefix}.shared_head.norm.weight", hidden, gguf=f"{gguf}.shared_head_norm.weight"),
    ]
