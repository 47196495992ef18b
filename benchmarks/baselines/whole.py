"""A small Mixture-of-Experts model held whole by transformers: its layers, their experts, and what reaches them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Kept = Mapping[int, list[int]]
PER_EXPERT = ("weight", "e_score_correction_bias")  # of a router


class Seen(NamedTuple):
    """Of a layer on a sample: ``inputs`` (tokens, hidden), ``logits`` (tokens, experts), ``chosen`` and ``gates``
    (tokens, top-k)."""

    inputs: Tensor
    logits: Tensor
    gates: Tensor
    chosen: Tensor


def load(folder: Path) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def moe_layers(model: Any) -> Iterator[tuple[int, Any]]:
    """Index and MoE block of each layer that has experts."""
    for index, layer in enumerate(model.model.layers):
        if isinstance(getattr(layer.mlp, "gate", None), nn.Module) and hasattr(layer.mlp, "experts"):
            yield index, layer.mlp


@torch.inference_mode()
def seen_by(model: Any, ids: Tensor) -> dict[int, Seen]:
    """What each MoE layer is given, and decides, on ``ids`` (sequences, length)."""
    parts: dict[int, list[Seen]] = {}
    hooks = []
    for index, block in moe_layers(model):

        def keep(_module: Any, inputs: Any, output: Any, index: int = index) -> None:
            states = inputs[0].reshape(-1, inputs[0].shape[-1])
            parts.setdefault(index, []).append(Seen(states, *output))

        hooks.append(block.gate.register_forward_hook(keep))
    for batch in ids.split(8):
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {index: Seen(*(torch.cat(part) for part in zip(*found, strict=True))) for index, found in parts.items()}


def one_expert(experts: Any, index: int, inputs: Tensor) -> Tensor:
    """Output (tokens, hidden) of one expert."""
    gate, up = (inputs @ experts.gate_up_proj[index].T).chunk(2, dim=-1)
    found: Tensor = (experts.act_fn(gate) * up) @ experts.down_proj[index].T
    return found


def pruned(model: Any, kept: Kept) -> Any:
    """A copy with the experts ``kept`` of each layer. Layers may keep different numbers here."""
    result = copy.deepcopy(model)
    for index, block in moe_layers(result):
        rows = torch.tensor(kept[index])
        for name in ("gate_up_proj", "down_proj"):
            setattr(block.experts, name, nn.Parameter(getattr(block.experts, name)[rows].detach(), False))
        for name in PER_EXPERT:
            own = getattr(block.gate, name, None)
            if own is not None:
                part = own[rows].detach().clone()
                setattr(block.gate, name, nn.Parameter(part, False) if isinstance(own, nn.Parameter) else part)
        block.experts.num_experts = block.gate.num_experts = len(rows)
    return result


@torch.inference_mode()
def log_probs(model: Any, ids: Tensor) -> Tensor:
    """(sequences, length, vocabulary)."""
    return torch.cat([model(batch, use_cache=False).logits.log_softmax(-1) for batch in ids.split(8)])


def kl(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) in nats, by position."""
    return (reference.exp() * (reference - found)).sum(-1)
