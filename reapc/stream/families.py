"""Which families the streamed pass computes, and what is particular about them there.

A family stands here once its layers are known to take nothing from one another but the hidden states and what is named
below, and once a tiny model of it gave the same logits streamed as whole (tests/test_families.py). Others are refused
by name, never guessed. Needs no torch: a build asks before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone

# model_type on disk -> transformers' name of the same class.
TRANSFORMERS_TYPE = {"kimi_k2": "deepseek_v3"}


@dataclass(frozen=True)
class Particular:
    """``transposed``: fused experts are stored (experts, in, out). ``scaled_after``: the block multiplies the sum of
    its experts by ``routed_scaling_factor``, so that factor belongs to every gate weight. ``scaled_inputs``: the gate
    weight multiplies the expert's input (Llama-4): the weight recorded is then 1, and the norm that of what leaves the
    expert. ``carries``: layers hand the indices of their sparse attention on to the next (GLM-5.2's shared indexers).
    ``streams``: the config key that counts parallel residual streams (DeepSeek-V4's hyper-connections)."""

    transposed: bool = False
    scaled_after: bool = False
    scaled_inputs: bool = False
    carries: bool = False
    streams: str = ""


FAMILIES: dict[str, Particular] = {
    "deepseek": Particular(),
    "deepseek_v4": Particular(streams="hc_mult"),
    "ernie4_5_moe": Particular(),
    "gemma4": Particular(),
    "glm4_moe": Particular(),
    "glm4_moe_lite": Particular(),
    "glm_moe_dsa": Particular(carries=True),
    "gpt_oss": Particular(transposed=True),
    "granitemoe": Particular(),
    "kimi_k25": Particular(),
    "kimi_linear": Particular(),
    "llama4": Particular(transposed=True, scaled_inputs=True),
    "mimo_v2_flash": Particular(),
    "minimax_m2": Particular(),
    "minimax_m3": Particular(scaled_after=True),
    "mixtral": Particular(),
    "nemotron_h": Particular(),
    "olmoe": Particular(),
    "phimoe": Particular(),
    "qwen2_moe": Particular(),
    "qwen3_5_moe": Particular(),
    "qwen3_moe": Particular(),
    "qwen3_next": Particular(),
    "qwen3_vl_moe": Particular(transposed=True),
    "step3p7": Particular(scaled_after=True),
}
SUPPORTED = tuple(sorted(FAMILIES))


def check_family(spec: ModelSpec, where: str) -> None:
    """CannotBeDone unless models of this family can be observed and pruned."""
    if spec.family not in FAMILIES:
        raise CannotBeDone(
            f"{where}: {spec.model_type} models cannot be observed or pruned in this version",
            hint=f"families that can: {', '.join(SUPPORTED)}; `reapc plan` and `reapc fit` know more",
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that speaks of the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


# How scores become gate weights, by the key that says so; transformers' classes have one way each but for V2's.
_SIGMOID, _SOFTMAX = ("sigmoid",), ("softmax",)
_SCORING = {"deepseek_v2": _SOFTMAX, "deepseek_v4": ("sqrtsoftplus",)}
_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy")}
# Keys about routers that change nothing of the gate weight, or that the classes read.
_ROUTER_KEYS = {
    "moe_router_activation_func", "moe_router_dtype", "moe_router_scaling_factor", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "routed_scaling_factor", "scoring_func",
    "topk_method", "use_moe_router_bias", "use_routing_bias",
}  # fmt: skip
_ROUTER_WORDS = ("router", "routing", "scoring", "topk_method")


def check_router(config: dict[str, Any], where: str) -> None:
    """CannotBeDone where config.json says of a router what is not understood: the recorded gate weight would be a
    guess."""
    text = text_config(config)
    model_type = str(text.get("model_type", config.get("model_type")))
    wanted = {
        "scoring_func": _SCORING.get(model_type, _SIGMOID),
        "moe_router_activation_func": _SIGMOID,
        "topk_method": _METHODS.get(model_type, ("noaux_tc",)),
    }
    for key, value in text.items():
        if key in wanted and value is not None and value not in wanted[key]:
            raise CannotBeDone(
                f"{where}: config.json: {key} = {value!r}: the router of {model_type} is known with "
                f"{' or '.join(map(repr, wanted[key]))}",
                hint="how its scores become gate weights is not known in this version",
            )
        if key not in _ROUTER_KEYS and any(word in key for word in _ROUTER_WORDS) and value not in (None, False, 0):
            raise CannotBeDone(
                f"{where}: config.json: {key} = {value!r}: this router attribute is not known in this version",
                hint="what it does to the gate weights is not known, so scores would be a guess",
            )


def check_state(spec: ModelSpec, config: dict[str, Any], where: str) -> None:
    """CannotBeDone where layers share a state that the streamed pass does not carry, or a router is not understood."""
    check_router(config, where)
    text = text_config(config)
    if spec.family == "gemma4" and text.get("num_kv_shared_layers"):
        raise CannotBeDone(
            f"{where}: config.json: num_kv_shared_layers = {text['num_kv_shared_layers']}: layers that take keys and "
            "values of earlier ones cannot be streamed in this version"
        )
    if spec.family == "gemma4" and text.get("hidden_size_per_layer_input"):
        raise CannotBeDone(
            f"{where}: config.json: hidden_size_per_layer_input = {text['hidden_size_per_layer_input']}: per-layer "
            "embeddings cannot be streamed in this version"
        )


def streams(spec: ModelSpec, config: dict[str, Any]) -> int:
    """Parallel residual streams of every token between layers; 1 but for hyper-connections."""
    key = FAMILIES[spec.family].streams if spec.family in FAMILIES else ""
    return int(text_config(config)[key]) if key else 1


def carried_width(spec: ModelSpec, config: dict[str, Any]) -> int:
    """Indices that layers hand on for every token, at most (GLM-5.2: where some layers share another's indexer)."""
    text = text_config(config)
    if spec.family not in FAMILIES or not FAMILIES[spec.family].carries:
        return 0
    return int(text["index_topk"]) if "shared" in (text.get("indexer_types") or ()) else 0
