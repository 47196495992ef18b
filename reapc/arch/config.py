"""Reads config.json and finds the family that knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from reapc.arch.spec import ModelSpec
from reapc.errors import CannotBeDone, ReapcError

T = TypeVar("T")
_REQUIRED = object()


def read(config: dict[str, Any], key: str, kind: type[T], where: str, default: Any = _REQUIRED) -> T:
    """``config[key]`` as ``kind``; a missing or mistyped key is an error that names file and key."""
    value = config.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ReapcError(
                f"{where}: key {key!r} is missing", hint="is this the config.json of a complete checkpoint?"
            )
        return default  # type: ignore[no-any-return]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ReapcError(f"{where}: {key} = {value!r}: {kind.__name__} expected")
    return value


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
    from reapc.arch import qwen3_moe

    families = [qwen3_moe]
    model_type = config.get("model_type")
    for family in families:
        if model_type in family.MODEL_TYPES:
            spec: ModelSpec = family.build(config, where)
            check_moe(spec, where)
            return spec
    if not any("expert" in key for key in _all_keys(config)):
        raise CannotBeDone(
            f"{where}: no experts to prune: model_type {model_type!r} is a dense model",
            hint="reapc works on Mixture-of-Experts checkpoints",
        )
    known = ", ".join(name for family in families for name in family.MODEL_TYPES)
    raise CannotBeDone(f"{where}: model_type {model_type!r} is not supported yet", hint=f"supported: {known}")


def check_moe(spec: ModelSpec, where: str) -> None:
    """Refuses a config without a MoE layer, or whose top-k is larger than its expert count."""
    if not spec.moe_layers:
        raise CannotBeDone(f"{where}: no experts to prune: no layer of this {spec.model_type} model has experts")
    if not 1 <= spec.top_k <= spec.num_experts:
        raise ReapcError(
            f"{where}: num_experts_per_tok = {spec.top_k} with {spec.num_experts} experts: 1 to "
            f"{spec.num_experts} expected"
        )


def _all_keys(config: dict[str, Any]) -> list[str]:
    keys = list(config)
    for value in config.values():
        if isinstance(value, dict):
            keys += list(value)
    return keys
