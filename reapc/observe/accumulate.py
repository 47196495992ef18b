"""The sums that one pass records of a layer: routing scores and second moments, in float64, additive.

Scores over the tokens routed to expert i (facts/reap-reference.md): n is the L2 norm of the expert's output in
fp32, g the coefficient that the model multiplies that output with. REAP is the mean of g * n.
"""

from __future__ import annotations

import numpy as np
import torch

ROUTING = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")


class LayerSums:
    """Sums of one layer; ``arrays()`` is what the scores file holds of it."""

    def __init__(self, num_experts: int, hidden: int, width: int, moments: bool) -> None:
        self.routing = {name: np.zeros(num_experts, np.float64) for name in ROUTING}
        self.moments: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._want_moments = moments
        self._last: tuple[torch.Tensor, np.ndarray] | None = None
        if moments and num_experts:
            self.moments["experts.gate_up"] = np.zeros((num_experts, hidden), np.float64)
            self.moments["experts.down"] = np.zeros((num_experts, width), np.float64)

    def routed(
        self, expert: int, inputs: torch.Tensor, activated: torch.Tensor, outputs: torch.Tensor, gate: torch.Tensor
    ) -> None:
        """One expert's routed pairs of one batch (see ``LayerObserver.routed``)."""
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).double()
        weights = gate.double()
        product = norms * weights
        low, high = torch.aminmax(outputs)
        sums = self.routing
        sums["routed_tokens"][expert] += len(norms)
        sums["gate_sum"][expert] += weights.sum().item()
        sums["norm_sum"][expert] += norms.sum().item()
        sums["gate_norm_sum"][expert] += product.sum().item()
        sums["gate_norm_sq_sum"][expert] += product.square().sum().item()
        sums["max_activation"][expert] = max(sums["max_activation"][expert], -low.item(), high.item())
        if self._want_moments:
            self.moments["experts.gate_up"][expert] += _square_sums(inputs)
            self.moments["experts.down"][expert] += _square_sums(activated)

    def linear(self, module: str, inputs: torch.Tensor) -> None:
        """The input of one linear outside the experts; q, k and v are given the same tensor, summed once."""
        if not self._want_moments:
            return
        if self._last is None or self._last[0].data_ptr() != inputs.data_ptr() or self._last[0].shape != inputs.shape:
            self._last = (inputs, _square_sums(inputs))
        if module not in self.moments:
            self.moments[module] = np.zeros(inputs.shape[-1], np.float64)
            self.counts[module] = np.zeros(1, np.float64)
        self.moments[module] += self._last[1]
        self.counts[module] += len(inputs)

    def arrays(self, layer: int) -> dict[str, np.ndarray]:
        """The sums by their names in the scores file."""
        self._last = None
        named = {f"layers.{layer}.{name}": values for name, values in self.routing.items() if len(values)}
        for module, values in self.moments.items():
            key = f"layers.{layer}.{module}" if module.startswith("experts.") else module
            named[f"second_moment.{key}"] = values
        named |= {f"second_moment_count.{module}": values for module, values in self.counts.items()}
        return named


def _square_sums(inputs: torch.Tensor) -> np.ndarray:
    """Sum over tokens of squared inputs, (in,) float64."""
    norms = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32)
    sums: np.ndarray = norms.double().square().cpu().numpy()
    return sums
