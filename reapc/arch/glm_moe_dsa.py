"""GLM-5, 5.1 and 5.2: DeepSeek-V3.2's design with sparse attention (DSA).

GLM-5.2 shares indexers: a layer of ``indexer_types`` "shared" takes the tokens that the last "full" layer chose, stores
no indexer and keeps no index keys (21 of 78 layers are full; the MTP layer has one too). The MTP layer stores neither
an embedding nor a head.
"""

from __future__ import annotations

from typing import Any

from reapc.arch.mla_family import Family, build_family, indexer_layers
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("glm_moe_dsa",)


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a GLM-5 config; ReapcError names a key that is missing, wrong or contradicted."""
    family = Family(
        "glm_moe_dsa", str(config["model_type"]), "glm-dsa", indexers=indexer_layers(config, where),
        mtp_embeddings=False, mtp_in_gguf=True,
    )  # fmt: skip
    return build_family(config, where, family)
