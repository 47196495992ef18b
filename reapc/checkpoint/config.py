"""The config of a checkpoint folder, with what ModelOpt writes in a file of its own beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reapc.arch import load_config
from reapc.errors import ReapcError
from reapc.formats.quantization import quantization_config

MODELOPT = "hf_quant_config.json"


def checkpoint_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``; where it states no quantization and ModelOpt's file does, with that as its
    quantization_config."""
    config = load_config(folder)
    path = folder / MODELOPT
    if quantization_config(config) or not path.is_file():
        return config
    try:
        found = json.loads(path.read_text())["quantization"]
        stated = {"quant_method": "modelopt", **found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReapcError(f"{path}: no readable 'quantization' table ({error})", hint="download it again") from error
    return {**config, "quantization_config": stated} if stated.get("quant_algo") else config
