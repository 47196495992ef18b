"""Reads config.json and finds the family that knows it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from reapc.arch.spec import ModelSpec
from reapc.errors import CannotBeDone, ReapcError

T = TypeVar("T")
_REQUIRED = object()

# What configs call the number of routed experts; the older and the newer of a family may both be there.
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
# model_type -> module in reapc/arch: a family is imported when a config asks for it.
FAMILIES = {
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek_v32": "deepseek",
    "deepseek_v4": "deepseek_v4",
    "ernie4_5_moe": "ernie4_5_moe",
    "gemma4": "gemma4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt_oss": "gpt_oss",
    "granitemoe": "granitemoe",
    "kimi_k2": "deepseek",
    "kimi_k25": "kimi_k25",
    "kimi_k3": "kimi_k3",
    "kimi_linear": "kimi_linear",
    "llama4": "llama4",
    "mimo_v2_flash": "mimo_v2_flash",
    "minimax_m2": "minimax_m2",
    "minimax_m3": "minimax_m3",
    "minimax_m3_vl": "minimax_m3",
    "mixtral": "mixtral",
    "nemotron_h": "nemotron_h",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "step3p7": "step3p7",
}


def read(config: dict[str, Any], key: str, kind: type[T], where: str, default: Any = _REQUIRED) -> T:
    """``config[key]`` as ``kind``; a missing or mistyped key is an error that names file and key."""
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ReapcError(
                f"{where}: key {key!r} is missing", hint="is this the config.json of a complete checkpoint?"
            )
        return default  # type: ignore[no-any-return]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ReapcError(f"{where}: {key} = {value!r}: {kind.__name__} expected")
    if kind is int and default is _REQUIRED and value < 1:  # type: ignore[operator]
        raise ReapcError(f"{where}: {key} = {value}: a count of at least 1 is expected")
    return value


def read_list(config: dict[str, Any], key: str, length: int, where: str) -> list[Any]:
    """A per-layer list under ``key``: ``length`` entries, or an error that names both numbers."""
    value = read(config, key, list, where)
    if len(value) != length:
        raise ReapcError(f"{where}: {key} has {len(value)} entries, and the model has {length} layers")
    return value


def expert_count(
    config: dict[str, Any], where: str, keys: tuple[str, ...], prefix: str = ""
) -> tuple[int, tuple[str, ...]]:
    """The routed experts of a layer and the keys that state them, ``prefix`` ("text_config.") before each.

    Keys that contradict each other are refused.
    """
    found = tuple(key for key in keys if config.get(key) is not None)
    counts = {key: read(config, key, int, where) for key in found or keys[:1]}
    if len(set(counts.values())) > 1:
        raise ReapcError(f"{where}: {' and '.join(f'{k} = {v}' for k, v in counts.items())} contradict each other")
    return next(iter(counts.values())), tuple(prefix + key for key in found)


def dtype_of(config: dict[str, Any]) -> str:
    """The model's own dtype; transformers 5 writes ``dtype``, older ones ``torch_dtype``."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def text_config(config: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The language model's part of a multimodal config, and its place for errors; the config itself where flat."""
    if "text_config" not in config:
        return config, where
    return read(config, "text_config", dict, where), f"{where}: text_config"


def around_text(spec: ModelSpec, config: dict[str, Any], text: dict[str, Any], vision_parameters: int) -> ModelSpec:
    """The text model's spec with what a multimodal config says around it: dtype, quantization, the vision tower."""
    return replace(
        spec,
        dtype=dtype_of({**config, **text}),
        vision_parameters=vision_parameters,
        quantization=config.get("quantization_config") or spec.quantization,
    )


def load_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder (or the file itself)."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ReapcError(
            f"{file}: no such file", hint="a checkpoint folder holds config.json and safetensors"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReapcError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ReapcError(f"{file}: a JSON object is expected")
    return config


def model_spec(config: dict[str, Any], where: str = "config.json") -> ModelSpec:
    """The ModelSpec of ``config``; dense and unknown models are refused by name."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        spec: ModelSpec = importlib.import_module(f"reapc.arch.{FAMILIES[model_type]}").build(config, where)
        check_moe(spec, where)
        return replace(spec, expert_count_keys=_every_count(config, spec, where))
    if not any("expert" in key for key in _all_keys(config)):
        raise CannotBeDone(
            f"{where}: no experts to prune: model_type {model_type!r} is a dense model",
            hint="reapc works on Mixture-of-Experts checkpoints",
        )
    raise CannotBeDone(
        f"{where}: model_type {model_type!r} is not supported yet", hint=f"supported: {', '.join(FAMILIES)}"
    )


def _every_count(config: dict[str, Any], spec: ModelSpec, where: str) -> tuple[str, ...]:
    """The keys that count experts: the family's own, then whatever else a config names so; ReapcError where one has
    another value, for each engine reads the one that it knows."""
    text = config.get("text_config")
    sections = (("", config), ("text_config.", text if isinstance(text, dict) else {}))
    found = {
        prefix + key: section[key]
        for prefix, section in sections
        for key in EXPERT_COUNTS
        if section.get(key) is not None
    }
    wrong = [key for key, value in found.items() if value != spec.num_experts]
    if wrong:
        right = spec.expert_count_keys[0]
        raise ReapcError(
            f"{where}: {right} = {spec.num_experts} and {wrong[0]} = {found[wrong[0]]!r} contradict each other",
            hint="both count the routed experts of a layer: remove the wrong one",
        )
    return tuple(dict.fromkeys((*spec.expert_count_keys, *found)))


def check_moe(spec: ModelSpec, where: str) -> None:
    """Refuses a config without a MoE layer, or whose numbers contradict each other."""
    if not spec.moe_layers:
        raise CannotBeDone(f"{where}: no experts to prune: no layer of this {spec.model_type} model has experts")
    if not 1 <= spec.top_k <= spec.num_experts:
        raise ReapcError(
            f"{where}: num_experts_per_tok = {spec.top_k} with {spec.num_experts} experts: 1 to "
            f"{spec.num_experts} expected"
        )
    for what, value in (
        ("num_key_value_heads", spec.num_kv_heads), ("head_dim", spec.head_dim), ("n_group", spec.n_group),
        ("topk_group", spec.topk_group), ("max_position_embeddings", spec.max_context),
    ):  # fmt: skip
        if value < 1:
            raise ReapcError(f"{where}: {what} = {value}: at least 1 expected")
    if spec.n_group > 1 and spec.num_experts % spec.n_group:
        raise ReapcError(f"{where}: {spec.num_experts} experts do not divide into n_group = {spec.n_group} groups")
    if spec.num_heads % spec.num_kv_heads:
        raise ReapcError(
            f"{where}: num_attention_heads = {spec.num_heads} is not a multiple of num_key_value_heads = "
            f"{spec.num_kv_heads}"
        )


def _all_keys(config: dict[str, Any]) -> list[str]:
    keys = list(config)
    for value in config.values():
        if isinstance(value, dict):
            keys += list(value)
    return keys
