"""DeepSeek-V2, V3, R1 and V3.2, and Kimi-K2, which is V3 with other numbers.

V2 routes by softmax and has no router bias; the others by sigmoid with one (``topk_method`` "noaux_tc"). V3.2 adds an
indexer to every layer (DSA) and stores its norms in float32; its MTP layer goes into the GGUF, V3's does not. Kimi-K2's
checkpoint also holds ``rotary_emb.inv_freq`` (61 x 56 values), a leftover that no engine loads and that is not listed.
"""

from __future__ import annotations

from typing import Any

from reapc.arch.config import read
from reapc.arch.mla_family import Family, build_family
from reapc.arch.spec import ModelSpec

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")


def build(config: dict[str, Any], where: str) -> ModelSpec:
    """ModelSpec of a DeepSeek or Kimi-K2 config; ReapcError names a key that is missing or wrong."""
    return build_family(config, where, family(config, where))


def family(config: dict[str, Any], where: str) -> Family:
    """What this model type adds to the shared design."""
    model_type = read(config, "model_type", str, where)
    method = read(config, "topk_method", str, where, "greedy" if model_type == "deepseek_v2" else "noaux_tc")
    plain = Family("deepseek", model_type, "deepseek2", router_bias=method == "noaux_tc")
    if model_type != "deepseek_v32":
        return plain
    indexers = [True] * read(config, "num_hidden_layers", int, where)
    return plain._replace(gguf_arch="deepseek32", indexers=indexers, mtp_in_gguf=True, norm_dtype="float32")
