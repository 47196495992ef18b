"""A GGUF file as ``reapc inspect`` shows it: parameters, experts, exact bytes and KV cache, from the headers alone."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from reapc.errors import ReapcError

_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
# Cache and state of these are not a plain product of heads and layers: no figure is better than a wrong one.
_PLAIN_KV = frozenset(
    {
        "llama", "qwen2moe", "qwen3moe", "qwen3vlmoe", "olmoe", "phimoe", "glm4moe", "granitemoe", "ernie4_5-moe",
        "minimax-m2", "deepseek2",
    }
)  # fmt: skip


def _shards(path: Path) -> list[Path]:
    match = _SHARD.match(path.name)
    if not match:
        return [path]
    paths = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]
    for shard in paths:
        if not shard.is_file():
            raise ReapcError(f"{shard}: this part of {path.name} is missing", hint="download all parts")
    return paths


def _role(name: str) -> str:
    part = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if part == "token_embd":
        return "embedding"
    if part == "output":
        return "lm_head"
    if part.endswith("_exps"):
        return "routed_experts"
    if part.endswith("_shexp"):
        return "shared_experts"
    if part in ("ffn_gate_inp", "exp_probs_b", "ffn_gate_tid2eid"):
        return "router"
    if part.startswith("ffn_") and "norm" not in part:
        return "dense_mlp"
    if part == "nextn":
        return "mtp"
    return "norm" if "norm" in name else "attention"


def inspect_gguf(path: Path, kv_dtype_bytes: tuple[int, int], context: int | None, kv_dtype: str) -> dict[str, Any]:
    """The JSON of ``reapc inspect`` for a GGUF. ``kv_dtype_bytes``: elements and bytes of a block. ReapcError where the
    file is not a readable GGUF."""
    import gguf

    tensors: list[tuple[str, tuple[int, ...], int]] = []
    fields: dict[str, Any] = {}
    for shard in _shards(path):
        try:
            reader = gguf.GGUFReader(shard)
            for field in reader.fields.values():
                if field.name not in fields and not field.name.startswith("tokenizer."):
                    fields[field.name] = field.contents()
            tensors += [(t.name, tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in reader.tensors]
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ReapcError(f"{shard}: not a readable GGUF file: {error}", hint="download it again") from error
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise ReapcError(f"{path}: general.architecture is missing", hint="is it a model file?")

    def number(key: str, default: int | None = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    blocks = number("block_count", 0)
    mtp_from = blocks - number("nextn_predict_layers", 0)
    roles: dict[str, int] = {}
    for name, shape, _ in tensors:
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        role = "mtp" if layer >= mtp_from >= 0 and layer >= 0 else _role(name)
        roles[role] = roles.get(role, 0) + prod(shape)
    experts, top_k = number("expert_count", 0), number("expert_used_count", 0)
    if not experts:
        raise ReapcError(f"{path}: no experts to prune: a dense model ({architecture})", exit_code=1)
    mtp = roles.pop("mtp", 0)
    total = sum(roles.values())
    routed = roles.get("routed_experts", 0)
    unused = roles.get("embedding", 0) if "lm_head" in roles else 0
    size = sum(n for _, _, n in tensors)
    names = ("routed_experts", "shared_experts", "attention", "dense_mlp", "router", "embedding", "lm_head", "norm")
    maximum = number("context_length", 32768)
    used = min(32768, maximum) if context is None else context
    file_type = fields.get("general.file_type")
    return {
        "model": str(path),
        "family": architecture,
        "parameters": {
            "total": total,
            "active": total - unused - routed // experts * (experts - top_k),
            **{name: roles.get(name, 0) for name in names},
            "other": 0,
            "mtp": mtp,
            "vision": 0,
            "on_disk": total + mtp,
        },
        "experts": {
            "count": experts,
            "kept": experts,
            "top_k": top_k,
            "shared": number("expert_shared_count", 0),
            "groups": number("expert_group_count", 1),
            "moe_layers": len({name.split(".")[1] for name, _, _ in tensors if ".ffn_down_exps." in name}),
        },
        "layers": blocks,
        "max_context": maximum,
        "weights": {
            "format": _type_name(file_type),
            "bytes": size,
            "bits_per_weight": 8 * size / (total + mtp),
            "vision_bytes": 0,
        },
        "kv": _kv(architecture, fields, mtp_from, kv_dtype_bytes, used, kv_dtype),
    }


def _type_name(file_type: Any) -> str:
    import gguf

    try:
        return gguf.LlamaFileType(int(file_type)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (TypeError, ValueError):
        return "mixed"


def _kv(
    architecture: str, fields: dict[str, Any], layers: int, block: tuple[int, int], context: int, kv_dtype: str
) -> dict[str, Any]:
    """Cache figures of architectures whose every layer keeps K and V (or one latent) of every token; else null."""

    def number(key: str) -> Any:
        return fields.get(f"{architecture}.{key}")

    result: dict[str, Any] = {
        "kind": None, "dtype": kv_dtype, "context": context, "bytes_per_token": None, "bytes": None,
        "state_bytes_per_sequence": None,
    }  # fmt: skip
    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    if architecture not in _PLAIN_KV or not isinstance(kv_heads, int):
        return result | {"note": f"the cache of {architecture} is not read from a GGUF; name the original model"}
    if number("attention.kv_lora_rank") and number("attention.key_length_mla"):
        kind, elements = "mla", number("attention.kv_lora_rank") + number("rope.dimension_count")
    else:
        width = number("embedding_length") // heads
        key, value = number("attention.key_length") or width, number("attention.value_length") or width
        kind, elements = "gqa", kv_heads * (key + value)
    per_token = layers * elements * block[1] / block[0]
    whole = int(per_token) if per_token == int(per_token) else per_token
    return result | {
        "kind": kind, "bytes_per_token": whole, "bytes": round(per_token * context), "state_bytes_per_sequence": 0,
    }  # fmt: skip
