"""Small Qwen3-MoE configs for planning tests."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from reapc.arch import ModelSpec, load_config, model_spec
from reapc.recipe import Recipe, make_recipe

DATA = Path(__file__).parent / "data"
DEMO: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_experts": 24, "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "vocab_size": 2048, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "norm_topk_prob": True,
}  # fmt: skip


def demo_spec(**changes: Any) -> ModelSpec:
    return model_spec({**DEMO, **changes})


def qwen30b() -> ModelSpec:
    return model_spec(load_config(DATA / "Qwen__Qwen3-30B-A3B.json"))


def recipe_of(target: Any, **sections: Any) -> Recipe:
    return make_recipe({"model": {"source": "some/model"}, "target": target, **sections}, Path("recipe.toml"))


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with the key (dotted where nested) set, or removed where the value is None."""
    config = deepcopy(config)
    *parents, last = key.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner.pop(last, None)
    if value is not None:
        inner[last] = value
    return config
