"""What a model is, in numbers: parameters by part, weights in a format, KV cache. Arithmetic over a ModelSpec."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from reapc.arch import ModelSpec
from reapc.engines import cache
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import gguf, gguf_sizes, weights
from reapc.formats.published import published_format
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


def parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters by part. ``total`` is the main text model; ``mtp`` and ``vision`` stand beside it."""
    roles = spec.parameters_by_role()
    mtp = spec.mtp_parameters
    return {
        "total": spec.parameters,
        "active": spec.active_parameters,
        "routed_experts": roles.get("expert", 0),
        "shared_experts": roles.get("shared_expert", 0),
        "attention": roles.get("attention", 0),
        "dense_mlp": roles.get("dense_mlp", 0),
        "router": roles.get("router", 0),
        "embedding": roles.get("embedding", 0),
        "lm_head": roles.get("lm_head", 0),
        "norm": roles.get("norm", 0),
        "other": roles.get("other", 0),
        "mtp": mtp,
        "vision": spec.vision_parameters,
        "on_disk": spec.parameters + mtp + spec.vision_parameters,
    }


def _weights(spec: ModelSpec, wanted: Wanted, notes: list[str]) -> dict[str, Any]:
    name = wanted.format or published_format(spec)
    if name is None:
        method = (spec.quantization or {}).get("quant_method")
        notes.append(f"published with quant_method {method!r}, in a format that reapc does not know: sized as bf16")
        name = "bf16"
    elif wanted.format is None:
        notes += _differences(spec, name)
    counted = spec.parameters + (spec.mtp_parameters if wanted.mtp else 0)
    engine, canonical = check_format(name)
    if engine == "llama.cpp":
        size = gguf_sizes.sizes(spec, canonical, True, wanted.mtp).tensors_bytes(spec.num_experts)
        vision = 0
        if spec.vision_parameters:
            notes.append("llama.cpp keeps the vision tower in a file of its own (mmproj), which is not counted")
    else:
        fmt = weights.parse(canonical)
        assert fmt is not None
        if reason := weights.misfit(fmt, spec):
            raise CannotBeDone(f"{canonical}: {reason}", hint="`reapc formats` lists the others")
        size, vision = weights.checkpoint_bytes(fmt, spec, mtp=wanted.mtp), 2 * spec.vision_parameters
        counted += spec.vision_parameters
    return {"format": canonical, "bytes": size, "bits_per_weight": 8 * size / counted, "vision_bytes": vision}


def _differences(spec: ModelSpec, name: str) -> list[str]:
    """In what the checkpoint differs from the format that comes nearest to it."""
    if gguf.native_expert_type(spec) and not name.startswith("mxfp4"):
        return [f"published with 4-bit experts and the rest in {name}: sized as {name} throughout"]
    if spec.dtype == "float32" and not spec.quantization:
        return ["published in float32: sized as bf16"]
    return []


def _kv(spec: ModelSpec, kv_dtype: str, context: int) -> dict[str, Any]:
    block, size = KV_BYTES[kv_dtype]
    per_token = cache.elements_per_token(spec) * size / block
    return {
        "kind": cache.kv_kind(spec),
        "dtype": kv_dtype,
        "context": context,
        "bytes_per_token": int(per_token) if per_token == int(per_token) else per_token,
        "bytes": ceil(cache.sequence_elements(spec, context) * size / block),
        "state_bytes_per_sequence": sum(cache.state_bytes(layer.kind) for layer in spec.layers),
    }


def _context(spec: ModelSpec, asked: int | None) -> int:
    context = asked if asked is not None else min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        raise ReapcError(
            f"--context {context}: the model knows {spec.max_context} positions", hint=f"at most {spec.max_context}"
        )
    return context


def _kept(spec: ModelSpec, experts: int) -> ModelSpec:
    try:
        kept_counts(spec, experts=experts)
    except ReapcError as error:
        steps = f" in steps of {spec.n_group}, the router's groups" if spec.n_group > 1 else ""
        lowest = -(-spec.top_k // spec.n_group) * spec.n_group
        raise ReapcError(
            error.message.replace("prune.experts =", "--experts"),
            hint=f"{lowest} to {spec.num_experts} experts can be kept{steps}",
        ) from None
    return spec.with_experts(experts)


def _facts(name: str, spec: ModelSpec, count: int) -> dict[str, Any]:
    """What a checkpoint and a GGUF have in common. ``count``: experts before pruning."""
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
            "moe_layer_indices": list(spec.moe_layers),
        },
        "layers": spec.num_layers,
        "max_context": spec.max_context,
    }


def inspect(name: str, spec: ModelSpec, wanted: Wanted) -> dict[str, Any]:
    """The JSON of ``reapc inspect``. ReapcError for an expert count or context that the model does not have,
    CannotBeDone for a format that its shapes do not admit."""
    count, context, notes = spec.num_experts, _context(spec, wanted.context), list[str]()
    if wanted.experts is not None:
        spec = _kept(spec, wanted.experts)
    return {
        **_facts(name, spec, count),
        "weights": _weights(spec, wanted, notes),
        "kv": _kv(spec, wanted.kv_dtype, context),
        "notes": notes,
    }


def inspect_gguf(path: Path, wanted: Wanted) -> dict[str, Any]:
    """The same of a GGUF file, as it is: what its header says. ``kv`` holds nulls, and ``notes`` the reason, where it
    does not say what is cached. ReapcError for a file that is damaged, or for wishes that need a checkpoint."""
    if wanted.experts is not None or wanted.format is not None:
        raise ReapcError(
            f"{path}: --experts and --format need a checkpoint; a GGUF file is shown as it is",
            hint="name the model that it was made of",
        )
    from reapc.checkpoint.gguf_model import read_model

    model = read_model(path)
    spec, notes = model.spec, list[str]()
    kv = _kv(spec, wanted.kv_dtype, _context(spec, wanted.context))
    if model.cache_reason:
        notes.append(model.cache_reason)
        kv |= dict.fromkeys(("kind", "bytes_per_token", "bytes", "state_bytes_per_sequence"))
    if spec.mtp_layers:
        notes.append("the file holds MTP layers: its bytes count them")
    return {
        **_facts(str(path), spec, spec.num_experts),
        "weights": {
            "format": model.file_type,
            "bytes": model.tensor_bytes,
            "bits_per_weight": 8 * model.tensor_bytes / (spec.parameters + spec.mtp_parameters),
            "vision_bytes": 0,
        },
        "parts": model.parts,
        "kv": kv,
        "notes": notes,
    }
