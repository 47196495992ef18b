"""Kimi-K3: Kimi-Linear's text model under ``language_model.``, with routed experts in a latent space, residuals mixed
across layers (attn_res_block_size), output gates on both attentions, and a vision tower.

Names, shapes and dtypes as in the dump of the checkpoint (github gogongxt/python scripts/models/kimi_k3.md). It stores
the routed experts as MXFP4 (weight_packed and weight_scale in place of weight, quantization_config of text_config) and
every other matrix in bfloat16, the latent projections included: vLLM loads those unquantized, so they have no linears.
Inferred: A_log has 128 entries for 96 heads; we take heads rounded up to a multiple of 128 (llama.cpp and vLLM read the
first 96). Biases of the vision tower are off in the one known config.
"""

from __future__ import annotations

from typing import Any

from reapc.arch import parts
from reapc.arch.config import around_text, read, text_config
from reapc.arch.kimi_linear import language_model, linear_config
from reapc.arch.linear_attention import kda
from reapc.arch.spec import GgufPart, ModelSpec, TensorGroup
from reapc.errors import ReapcError

MODEL_TYPES = ("kimi_k3",)
_A_LOG_MULTIPLE = 128


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a Kimi-K3 config; ReapcError names a key that is missing or wrong."""
    text, text_where = text_config(config, where)
    linear, linear_where = linear_config(text, text_where)
    hidden = read(text, "hidden_size", int, text_where)
    heads = read(linear, "num_heads", int, linear_where)
    mixer = kda(
        "self_attn", hidden, heads, read(linear, "head_dim", int, linear_where),
        read(linear, "short_conv_kernel_size", int, linear_where),
        full_rank_gate=read(linear, "use_full_rank_gate", bool, linear_where, False),
        a_log=(-(-heads // _A_LOG_MULTIPLE) * _A_LOG_MULTIPLE,), gguf_a=(heads,), fp32_conv=True,
    )  # fmt: skip
    mixed = read(text, "attn_res_block_size", int, text_where, 0) > 0
    prefix = "language_model.model."
    spec = language_model(
        text,
        text_where,
        family="kimi_k3",
        model_type=str(config["model_type"]),
        gguf_arch="kimi-k3",
        mixer=mixer,
        moe=_moe(text, hidden, text_where),
        mla_gate=read(text, "mla_use_output_gate", bool, text_where, False),
        before_attention=_residual("self_attention_res", hidden, "attn_res_score.weight") if mixed else [],
        before_mlp=_residual("mlp_res", hidden, "ffn_res_score.weight") if mixed else [],
        outer=tuple(_residual(f"{prefix}output_attn_res", hidden, "output_res_score.weight")) if mixed else (),
        prefix=prefix,
        head="language_model.lm_head.weight",
        key_prefix="" if text is config else "text_config.",
    )
    vision = config.get("vision_config")
    tower = vision_parameters(vision, f"{where}: vision_config") if vision else 0
    return around_text(spec, config, text, tower)


def _moe(config: dict[str, Any], hidden: int, where: str) -> list[TensorGroup]:
    """Router, latent projections and routed experts of one layer; the shared experts are outside the latent."""
    p = "block_sparse_moe"
    latent = read(config, "routed_expert_hidden_size", int, where, 0)
    groups = [parts.router(f"{p}.gate.weight", hidden), parts.router_bias(f"{p}.gate.e_score_correction_bias")]
    if latent:
        shapes = {"down": (latent, hidden), "up": (hidden, latent)}
        groups += [
            TensorGroup(
                f"{p}.routed_expert_{name}_proj.weight", shape, "other", "replicate", None, (),
                (GgufPart(f"ffn_routed_{name}.weight", shape),),
            )
            for name, shape in shapes.items()
        ]  # fmt: skip
        if read(config, "latent_moe_use_norm", bool, where, False):
            groups.append(parts.vector(f"{p}.routed_expert_norm.weight", latent, gguf="ffn_routed_norm.weight"))
    width = read(config, "moe_intermediate_size", int, where)
    return [*groups, *parts.experts(f"{p}.experts", latent or hidden, width, ("w1", "w3", "w2"))]


def _residual(name: str, hidden: int, gguf: str) -> list[TensorGroup]:
    """Norm and score vector of a residual mix; the converter stores their product."""
    part = (GgufPart(gguf, (hidden,)),)
    return [
        parts.vector(f"{name}_norm.weight", hidden),
        TensorGroup(f"{name}_proj.weight", (1, hidden), "other", "replicate", None, (), part),
    ]


def vision_parameters(config: dict[str, Any], where: str) -> int:
    """Parameters of vision_tower and mm_projector: no biases, RMS norms, positions of one frame."""
    for key in ("attn_bias", "linear_bias", "patch_embed_proj_bias"):
        if config.get(key):
            raise ReapcError(f"{where}: {key} = true: only a vision tower without biases is known")
    hidden = read(config, "vt_hidden_size", int, where)
    inner = read(config, "vt_intermediate_size", int, where)
    qkv = read(config, "qkv_hidden_size", int, where, hidden)
    merge = read(config, "merge_kernel_size", list, where)
    merged = read(config, "mm_hidden_size", int, where) * int(merge[0]) * int(merge[1])
    out = read(config, "text_hidden_size", int, where)
    positions = read(config, "init_pos_emb_height", int, where) * read(config, "init_pos_emb_width", int, where)
    block = 4 * qkv * hidden + 2 * hidden * inner + 2 * hidden
    patch = 3 * read(config, "patch_size", int, where) ** 2 * hidden
    tower = patch + positions * hidden + read(config, "vt_num_hidden_layers", int, where) * block + hidden
    return tower + merged * merged + out * merged + out
