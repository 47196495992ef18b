"""GLM-4.7-Flash: DeepSeek-V3's design at 30B, with an MTP layer that stores an embedding and a head of its own.

llama.cpp's converter writes it as deepseek2, the MTP layer included.
"""

from __future__ import annotations

from typing import Any

from reapc.arch.mla_family import Family, build_family
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("glm4_moe_lite",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a GLM-4.7-Flash config; ReapcError names a key that is missing or wrong."""
    return build_family(
        config, where, Family("glm4_moe_lite", str(config["model_type"]), "deepseek2", mtp_in_gguf=True)
    )
