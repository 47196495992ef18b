"""The experts of one layer, computed from mapped weights, routed pairs only; an observer sees every pair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from reapc.errors import CannotBeDone
from reapc.stream.expert_store import ExpertStore
from reapc.stream.expert_weights import Expert


class RoutedPairs(NamedTuple):
    """What one expert did in one batch: ``inputs`` (pairs, in), ``activated`` (pairs, width), ``outputs`` (pairs, in)
    before the gate weight, ``gate`` (pairs,): the very coefficient that the model multiplies the output with;
    ``tokens`` (pairs,), rising: which of the batch's rows x length tokens each pair is of."""

    expert: int
    inputs: torch.Tensor
    activated: torch.Tensor
    outputs: torch.Tensor
    gate: torch.Tensor
    tokens: torch.Tensor


class LayerObserver:
    """What an accumulator is shown of one layer. A subclass says what it wants to see."""

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None:
        """A batch begins: the sequences ``rows`` of the token set, ``length`` tokens of each; ``mask`` (rows, length),
        True where a token is real, None where all are."""

    def routed(self, pairs: RoutedPairs) -> None:
        """The tokens of the batch that were sent to one expert."""

    def linear(self, module: str, inputs: torch.Tensor) -> None:
        """``inputs`` (tokens, in): what the linear called ``module`` (name on disk) is given."""

    def held_bytes(self) -> int:
        """What its sums take."""
        return 0


class StreamedExperts(nn.Module):
    """Stands in for a transformers experts module: ``forward(hidden, top_k_index, top_k_weights)``.

    ``store`` gives the matrices one expert at a time, so a layer's experts cost no anonymous memory beyond one expert
    and what the store keeps. ``valid`` (tokens,) hides padding from experts and observer. The activation is the
    replaced module's own. ``scale``: what the block multiplies the sum of all experts with afterwards. ``crowded``:
    every token is sent to the same experts, the first ones: what the most memory is needed for (needs.py).
    """

    def __init__(self, replaced: nn.Module, num_experts: int, store: ExpertStore, scale: float = 1.0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.store = store
        self.scale = scale
        self.crowded = False
        self.observer: LayerObserver | None = None
        self.valid: torch.Tensor | None = None
        module: Any = replaced
        own = getattr(type(replaced), "_apply_gate", None)
        plain = own is None or own.__name__ == "_default_apply_gate"
        self._activation: Callable[[torch.Tensor], torch.Tensor] = getattr(module, "act_fn", F.silu)
        # Bound to the replaced module, which holds the limits that some gates are clamped to.
        self._gate: Callable[[torch.Tensor], torch.Tensor] | None = None if plain else module._apply_gate

    def compute(self, part: Expert, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(activated, outputs) of the expert ``part`` for ``inputs`` (tokens, in)."""
        activated = self.activated_by(inputs, part)
        return activated, F.linear(activated, part["down"], part.get("down.bias"))

    def activated_by(self, inputs: torch.Tensor, part: Expert) -> torch.Tensor:
        """What the down projection of the expert ``part`` is given for ``inputs`` (tokens, in), (tokens, width)."""
        if "gate_up" in part:
            both = F.linear(inputs, part["gate_up"], part.get("gate_up.bias"))
            if self._gate is not None:
                return self._gate(both)
            gate, up = both.chunk(2, dim=-1)
            return self._activation(gate) * up
        up = F.linear(inputs, part["up"])
        if "gate" not in part:
            return self._activation(up)
        gate = F.linear(inputs, part["gate"])
        if self._gate is not None:
            return self._gate(torch.cat((gate, up), dim=-1))
        return self._activation(gate).mul_(up)

    def forward(self, hidden_states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Sum over chosen experts of gate weight x expert output, in the shape of ``hidden_states`` (..., in).

        The classes name the other two differently: indices (tokens, top_k) are the one of integers."""
        index, weights = routing_given(*args, **kwargs)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self._sum(hidden, index, weights).reshape(hidden_states.shape)

    def _sum(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        top_k = index.shape[-1]
        if self.crowded:
            index = torch.arange(top_k, device=index.device).expand_as(index)
        chosen = index.reshape(-1)
        if self.valid is not None:
            chosen = torch.where(self.valid.repeat_interleave(top_k), chosen, self.num_experts)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts + 1).tolist()
        places = order.split(counts)
        hit = [expert for expert, count in enumerate(counts[: self.num_experts]) if count]
        gates = weights.reshape(-1)
        result = torch.zeros_like(hidden)
        with closing(self.store.each(hit)) as parts:
            for expert in hit:
                pairs = places[expert]
                tokens = pairs // top_k
                inputs = hidden.index_select(0, tokens)  # on a CPU a fifth of what hidden[tokens] takes
                activated, outputs = self.compute(next(parts), inputs)
                gate = gates[pairs]
                if self.observer is not None:
                    self.observer.routed(RoutedPairs(expert, inputs, activated, outputs, gate * self.scale, tokens))
                # Sigmoid routers give fp32 gates in a 16-bit model too; the class rounds the product likewise.
                result.index_add_(0, tokens, (outputs * gate[:, None]).to(result.dtype))
        return result


class ScaledInputExperts(StreamedExperts):
    """Llama-4's: ``forward`` is given every token once for each expert, (experts x tokens, hidden), already multiplied
    by its gate weight, which is 0 where the expert was not chosen. The gate weight recorded is 1."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
        result = torch.zeros_like(given)
        chosen = given.any(dim=-1)
        if self.crowded:
            chosen = torch.zeros_like(chosen)
            chosen[0] = True
        if self.valid is not None:
            chosen &= self.valid
        hit = chosen.any(dim=1).nonzero()[:, 0].tolist()
        with closing(self.store.each(hit)) as parts:
            for expert in hit:
                tokens = chosen[expert].nonzero()[:, 0]
                inputs = given[expert][tokens]
                activated, outputs = self.compute(next(parts), inputs)
                if self.observer is not None:
                    ones = torch.ones_like(outputs[:, 0])
                    self.observer.routed(RoutedPairs(expert, inputs, activated, outputs, ones, tokens))
                result[expert][tokens] = outputs
        return result.reshape(hidden_states.shape)


def routing_given(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, gate weights), both (tokens, top_k), of what a block hands its experts behind the hidden states;
    CannotBeDone where that is something else."""
    given = [*args, *kwargs.values()]
    try:
        (index,) = (value for value in given if not value.is_floating_point())
        (weights,) = (value for value in given if value.is_floating_point())
    except ValueError:
        raise CannotBeDone(f"the router gives {len(given)} values: indices and weights are expected") from None
    return index, weights


def find_experts(module: nn.Module, num_experts: int) -> tuple[str, nn.Module]:
    """The path and the module of a layer's experts; CannotBeDone where there is not exactly one."""
    found = [
        (name, child)
        for name, child in module.named_modules()
        if getattr(child, "num_experts", None) == num_experts
        and any(parameter.dim() == 3 for parameter in child.parameters(recurse=False))
    ]
    if len(found) != 1:
        raise CannotBeDone(f"{type(module).__name__}: {len(found)} modules of {num_experts} experts, one is expected")
    return found[0]
