"""A small Mixture-of-Experts model held whole by transformers: its layers, their experts, and what reaches them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from reapc.errors import ReapcError

Kept = Mapping[int, list[int]]
PER_EXPERT = ("weight", "e_score_correction_bias")  # of a router
BATCH = 8  # sequences that run at once


class Seen(NamedTuple):
    """Of a layer on a sample: ``inputs`` (tokens, hidden), ``logits`` of the router before any softmax, sigmoid or bias
    (tokens, experts), ``gates`` that the experts' outputs are multiplied with and the experts ``chosen``, both
    (tokens, top-k)."""

    inputs: Tensor
    logits: Tensor
    gates: Tensor
    chosen: Tensor


def load(folder: Path) -> Any:
    """The model in float32. ReapcError where it has no MoE layer of the kind that this folder knows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    if not list(moe_layers(model)):
        raise ReapcError(
            f"{folder}: {type(model).__name__} has no MoE layer with a router `gate` that transformers lets return "
            "(logits, weights, indices) and fused `experts`",
            hint="the baselines know models that are built as Qwen3-MoE or GLM-4.x MoE are",
        )
    # what else a folder says of generating (a temperature, top-p) is not asked for here
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def moe_layers(model: Any) -> Iterator[tuple[int, Any]]:
    """Index and MoE block of each layer that has experts; shared experts stand beside and are left alone."""
    for index, layer in enumerate(model.model.layers):
        experts, gate = getattr(layer.mlp, "experts", None), getattr(layer.mlp, "gate", None)
        if hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj") and hasattr(gate, "num_experts"):
            yield index, layer.mlp


@torch.inference_mode()
def seen_by(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[int, Seen]:
    """What each MoE layer is given, and decides, on ``ids`` (sequences, length); without the places behind a sequence
    where ``mask`` of the same shape is False."""
    parts: dict[int, list[Seen]] = {}
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    hooks = []
    for index, block in moe_layers(model):

        def keep(_module: Any, inputs: Any, output: Any, index: int = index) -> None:
            states = inputs[0].reshape(-1, inputs[0].shape[-1])
            parts.setdefault(index, []).append(Seen(states, *output))

        hooks.append(block.gate.register_forward_hook(keep))
    try:
        for batch in ids.split(BATCH):
            model.model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = real.flatten()
    return {
        index: Seen(*(torch.cat(part)[rows] for part in zip(*found, strict=True))) for index, found in parts.items()
    }


def one_expert(experts: Any, index: int, inputs: Tensor) -> Tensor:
    """Output (tokens, hidden) of one expert."""
    gate, up = (inputs @ experts.gate_up_proj[index].T).chunk(2, dim=-1)
    found: Tensor = (experts.act_fn(gate) * up) @ experts.down_proj[index].T
    return found


def pruned(model: Any, kept: Kept) -> Any:
    """A copy with the experts ``kept`` of each layer, in that order. Layers may keep different numbers here.

    ValueError where a layer is left fewer than its router's top-k, or numbers that its groups cannot hold."""
    result = copy.deepcopy(model)
    for index, block in moe_layers(result):
        rows, gate = torch.tensor(kept[index]), block.gate
        groups = getattr(gate, "num_group", 1)
        if len(rows) < gate.top_k or len(rows) % groups:
            raise ValueError(f"layer {index}: {len(rows)} experts, top-{gate.top_k}, {groups} groups")
        for name in ("gate_up_proj", "down_proj"):
            setattr(block.experts, name, nn.Parameter(getattr(block.experts, name)[rows].detach(), False))
        for name in PER_EXPERT:
            own = getattr(gate, name, None)
            if own is not None:
                part = own[rows].detach().clone()
                setattr(gate, name, nn.Parameter(part, False) if isinstance(own, nn.Parameter) else part)
        block.experts.num_experts = gate.num_experts = len(rows)
    return result


@torch.inference_mode()
def log_probs(model: Any, ids: Tensor) -> Tensor:
    """(sequences, length, vocabulary) in float32."""
    return torch.cat([model(batch, use_cache=False).logits.log_softmax(-1) for batch in ids.split(BATCH)])


def kl(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) in nats, by position."""
    return (reference.exp() * (reference - found)).sum(-1)
