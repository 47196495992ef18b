"""What may be quantized: a checkpoint in 16 or 32 bit, not one that is quantized already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reapc.errors import ReapcError
from reapc.formats.quantization import quantization_config


def refuse_quantized(config: dict[str, Any], where: Path) -> None:
    """ReapcError when the checkpoint is quantized already: rounding twice loses more than either bit width says."""
    found = quantization_config(config)
    if not found:
        return
    bits = f", {found['bits']} bits" if "bits" in found else ""
    raise ReapcError(
        f"{where / 'config.json'}: quantization_config: this checkpoint is quantized already "
        f"({found.get('quant_method', 'unknown method')}{bits})",
        hint="quantize from its 16 bit original",
    )
