"""The experts of one layer, computed from mapped weights, routed pairs only; an observer sees every pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

ExpertWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LayerObserver(Protocol):
    """What an accumulator is shown of one layer."""

    def routed(
        self, expert: int, inputs: torch.Tensor, activated: torch.Tensor, outputs: torch.Tensor, gate: torch.Tensor
    ) -> None:
        """``inputs`` (tokens, hidden), ``activated`` (tokens, width), ``outputs`` (tokens, hidden) before the
        gate weight, ``gate`` (tokens,): the very coefficient that the model multiplies the output with."""

    def linear(self, module: str, inputs: torch.Tensor) -> None:
        """``inputs`` (tokens, in): what the linear called ``module`` (name on disk) is given."""


class StreamedExperts(nn.Module):
    """Stands in for a transformers experts module: ``forward(hidden, top_k_index, top_k_weights)``.

    ``weights(e)`` gives (gate, up, down) of expert e as stored; they are cast one expert at a time, so a layer's
    experts cost no anonymous memory beyond one expert. ``valid`` (tokens,) hides padding from experts and observer.
    """

    def __init__(
        self,
        num_experts: int,
        weights: Callable[[int], ExpertWeights],
        activation: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weights = weights
        self.activation = activation
        self.dtype = dtype
        self.device = device
        self.observer: LayerObserver | None = None
        self.valid: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over chosen experts of gate weight x expert output, (tokens, hidden)."""
        top_k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        if self.valid is not None:
            chosen = torch.where(self.valid.repeat_interleave(top_k), chosen, self.num_experts)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts + 1).tolist()
        gates = top_k_weights.reshape(-1)
        result = torch.zeros_like(hidden_states)
        start = 0
        for expert in range(self.num_experts):
            pairs = order[start : start + counts[expert]]
            start += counts[expert]
            if not counts[expert]:
                continue
            gate_proj, up_proj, down_proj = (w.to(self.device, self.dtype) for w in self.weights(expert))
            tokens = pairs // top_k
            inputs = hidden_states[tokens]
            activated = self.activation(F.linear(inputs, gate_proj)).mul_(F.linear(inputs, up_proj))
            outputs = F.linear(activated, down_proj)
            gate = gates[pairs]
            if self.observer is not None:
                self.observer.routed(expert, inputs, activated, outputs, gate)
            # Sigmoid routers give fp32 gates in a 16-bit model too; the class rounds the product likewise.
            result.index_add_(0, tokens, (outputs * gate[:, None]).to(result.dtype))
        return result
