"""The format that a checkpoint is published in, read off its config's ``quantization_config``."""

from __future__ import annotations

from typing import Any

from reapc.arch.spec import ModelSpec
from reapc.errors import ReapcError
from reapc.formats import weights


def published_format(spec: ModelSpec) -> str | None:
    """The format that the checkpoint is published in; None where it is none that reapc knows (AWQ, ModelOpt ...)."""
    published = spec.quantization
    if not published:
        return "fp16" if spec.dtype == "float16" else "bf16"
    match published.get("quant_method"):
        case "fp8":
            return "fp8-block" if published.get("weight_block_size") else "fp8"
        case "mxfp4":
            return "mxfp4:experts"
        case "gptq" | "auto-round" as method:
            return _known(f"{method}-w{published.get('bits')}g{published.get('group_size')}")
        case "compressed-tensors":
            return _compressed_tensors(published)
        case "modelopt":
            return _modelopt(published)
    return None


def _compressed_tensors(published: dict[str, Any]) -> str | None:
    groups = list((published.get("config_groups") or {}).values())
    stored: dict[str, Any] = (groups[0].get("weights") if groups else None) or {}
    bits = stored.get("num_bits")
    only = ":experts" if any("self_attn" in name for name in published.get("ignore") or ()) else ""
    match published.get("format") or (groups[0].get("format") if groups else None):
        case "mxfp4-pack-quantized":
            return f"mxfp4{only}"
        case "nvfp4-pack-quantized":
            return f"nvfp4{only}"
        case "pack-quantized":
            return _known(f"ct-w{bits}g{stored.get('group_size')}{only}")
        case "float-quantized" if stored.get("strategy") in ("channel", "block", "tensor"):
            return ("fp8-block" if stored["strategy"] == "block" else "fp8") + only
        case "int-quantized" if bits == 8 and stored.get("strategy") == "channel":
            return f"int8{only}"
    return None


def _modelopt(published: dict[str, Any]) -> str | None:
    layers = {str((own or {}).get("quant_algo")) for own in (published.get("quantized_layers") or {}).values()}
    algorithms = layers or {str(published.get("quant_algo"))}
    kept = any(
        "self_attn" in name for name in (*(published.get("ignore") or ()), *(published.get("exclude_modules") or ()))
    )
    only = ":experts" if kept else ""
    if algorithms & {"NVFP4", "W4A16_NVFP4"}:
        return f"nvfp4{only}"
    return f"fp8{only}" if algorithms == {"FP8"} else None


def _known(name: str) -> str | None:
    try:
        return name if weights.parse(name) else None
    except ReapcError:
        return None
