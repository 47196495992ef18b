"""What a model is, in numbers: parameters by part, weights in a format, KV cache. Arithmetic over a ModelSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reapc.arch import ModelSpec
from reapc.engines import cache
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import gguf_sizes, weights
from reapc.planner.question import check_format, kept_counts

KV_BYTES = {"f16": (1, 2), "bf16": (1, 2), "fp8": (1, 1), "q8_0": (32, 34), "q4_0": (32, 18)}  # elements, bytes
DEFAULT_CONTEXT = 32768


@dataclass(frozen=True)
class Wanted:
    """What is to be shown. ``experts`` None: all; ``format`` None: the published one; ``context`` None: 32768, or
    what the model knows."""

    experts: int | None = None
    format: str | None = None
    mtp: bool = False
    kv_dtype: str = "f16"
    context: int | None = None


def published_format(spec: ModelSpec) -> str:
    """The format that the checkpoint is published in."""
    published = spec.quantization or {}
    match published.get("quant_method"):
        case "fp8":
            return "fp8-block" if published.get("weight_block_size") else "fp8"
        case "mxfp4":
            return "mxfp4:experts"
        case "compressed-tensors" if published.get("format") == "mxfp4-pack-quantized":
            return "mxfp4:experts"
        case "compressed-tensors" if published.get("format") == "pack-quantized":
            groups: list[dict[str, Any]] = list((published.get("config_groups") or {}).values())
            group: dict[str, Any] = (groups[0].get("weights") if groups else None) or {}
            return f"ct-w{group.get('num_bits', 4)}g{group.get('group_size', 32)}:experts"
    return "fp16" if spec.dtype == "float16" else "bf16"


def parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters by part. ``total`` is the main text model; ``mtp`` and ``vision`` stand beside it."""
    roles = spec.parameters_by_role()
    parts = {
        "routed_experts": roles.get("expert", 0),
        "shared_experts": roles.get("shared_expert", 0),
        "attention": roles.get("attention", 0),
        "dense_mlp": roles.get("dense_mlp", 0),
        "router": roles.get("router", 0),
        "embedding": roles.get("embedding", 0),
        "lm_head": roles.get("lm_head", 0),
        "norm": roles.get("norm", 0),
        "other": roles.get("other", 0),
    }
    mtp = spec.mtp_parameters
    return {
        "total": spec.parameters,
        "active": spec.active_parameters,
        **parts,
        "mtp": mtp,
        "vision": spec.vision_parameters,
        "on_disk": spec.parameters + mtp + spec.vision_parameters,
    }


def _weights(spec: ModelSpec, name: str, mtp: bool) -> dict[str, Any]:
    counted = spec.parameters + (spec.mtp_parameters if mtp else 0)
    engine, canonical = check_format(name)
    if engine == "llama.cpp":
        size = gguf_sizes.sizes(spec, canonical, True, mtp).tensors_bytes(spec.num_experts)
        vision = 0  # a file of its own (mmproj)
    else:
        fmt = weights.parse(canonical)
        assert fmt is not None
        if reason := weights.misfit(fmt, spec):
            raise CannotBeDone(f"{canonical}: {reason}", hint="`reapc formats` lists the others")
        size, vision = weights.checkpoint_bytes(fmt, spec, mtp=mtp), 2 * spec.vision_parameters
        counted += spec.vision_parameters
    return {"format": canonical, "bytes": size, "bits_per_weight": 8 * size / counted, "vision_bytes": vision}


def _kv(spec: ModelSpec, kv_dtype: str, context: int) -> dict[str, Any]:
    block, size = KV_BYTES[kv_dtype]
    state = sum(cache.state_bytes(layer.kind) for layer in spec.layers)
    return {
        "kind": cache.kv_kind(spec),
        "dtype": kv_dtype,
        "context": context,
        "bytes_per_token": _whole(cache.elements_per_token(spec) * size / block),
        "bytes": _whole(cache.sequence_elements(spec, context) * size / block),
        "state_bytes_per_sequence": state,
    }


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def inspect(name: str, spec: ModelSpec, wanted: Wanted) -> dict[str, Any]:
    """The JSON of ``reapc inspect``. ReapcError for an expert count or context that the model does not have,
    CannotBeDone for a format that its shapes do not admit."""
    count = spec.num_experts
    if wanted.experts is not None:
        try:
            kept_counts(spec, experts=wanted.experts)
        except ReapcError as error:
            raise ReapcError(error.message.replace("prune.experts =", "--experts"), hint=error.hint) from None
        spec = spec.with_experts(wanted.experts)
    context = wanted.context if wanted.context is not None else min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        raise ReapcError(
            f"--context {context}: the model knows {spec.max_context} positions", hint=f"at most {spec.max_context}"
        )
    return {
        "model": name,
        "family": spec.family,
        "parameters": parameters(spec),
        "experts": {
            "count": count,
            "kept": spec.num_experts,
            "top_k": spec.top_k,
            "shared": spec.shared_experts,
            "groups": spec.n_group,
            "moe_layers": len(spec.moe_layers),
        },
        "layers": spec.num_layers,
        "max_context": spec.max_context,
        "weights": _weights(spec, wanted.format or published_format(spec), wanted.mtp),
        "kv": _kv(spec, wanted.kv_dtype, context),
    }
