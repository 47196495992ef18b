"""The sums that one pass records of a layer: routing scores and second moments, in float64, additive.

Scores over the tokens routed to expert i (facts/reap-reference.md): n is the L2 norm of the expert's output in
fp32, g the coefficient that the model multiplies that output with. REAP is the mean of g * n.

Sums are kept apart by domain of the text, so that a mix can be weighed anew, and the routing's also by part of the
data, so that one can see whether more of it would have changed the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from reapc.stream.experts import LayerObserver, RoutedPairs
from reapc.stream.tokens import Tokens

ROUTING = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
PARTS = 8


class Groups(NamedTuple):
    """Which sums a sequence belongs to: ``rows`` (sequences,) = domain * ``PARTS`` + part."""

    rows: np.ndarray
    domains: int

    @staticmethod
    def of(tokens: Tokens) -> Groups:
        """A domain's sequences are dealt to its parts in turn, so that each part looks like the whole."""
        part = np.zeros(tokens.sequences, np.int64)
        for domain in range(len(tokens.domains)):
            mine = np.flatnonzero(tokens.domain == domain)
            part[mine] = np.arange(len(mine)) % PARTS
        return Groups(tokens.domain.astype(np.int64) * PARTS + part, len(tokens.domains))

    def take(self, rows: slice) -> Groups:
        return Groups(self.rows[rows], self.domains)

    def sums(self, amounts: np.ndarray) -> np.ndarray:
        """Sums of ``amounts`` (sequences,) by domain and part, (domains, PARTS)."""
        sums = np.bincount(self.rows, amounts, self.domains * PARTS)
        return sums.reshape(self.domains, PARTS)


class _Pairs(NamedTuple):
    """What is kept of an expert's routed pairs until the batch ends, each (pairs,)."""

    expert: int
    tokens: torch.Tensor
    norms: torch.Tensor
    gates: torch.Tensor
    peaks: torch.Tensor


class LayerSums(LayerObserver):
    """Sums of one layer; ``arrays()`` is what the scores file holds of it."""

    def __init__(self, num_experts: int, hidden: int, width: int, moments: bool, groups: Groups) -> None:
        shape = (groups.domains, PARTS, num_experts)
        self.routing = {name: np.zeros(shape, np.float64) for name in ROUTING} if num_experts else {}
        self.moments: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._groups = groups
        self._experts = num_experts
        self._want_moments = moments
        self._pairs: list[_Pairs] = []
        self._last: tuple[torch.Tensor, dict[int, tuple[np.ndarray, float]]] | None = None
        self._token_groups = np.zeros(0, np.int64)
        self._domains: torch.Tensor | None = None  # of every token, where a batch holds several
        self._valid: torch.Tensor | None = None
        self._domain = 0
        if moments and num_experts:
            self.moments["experts.gate_up"] = np.zeros((groups.domains, num_experts, hidden), np.float64)
            self.moments["experts.down"] = np.zeros((groups.domains, num_experts, width), np.float64)

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None:
        """See ``LayerObserver.batch``."""
        self._flush()
        groups = self._groups.rows[rows]
        self._token_groups = np.repeat(groups, length)
        domains = groups // PARTS
        self._domain = int(domains[0])
        self._domains = None if (domains == domains[0]).all() else torch.from_numpy(np.repeat(domains, length))
        self._valid = None if mask is None else mask.reshape(-1).cpu()

    def routed(self, pairs: RoutedPairs) -> None:
        """See ``LayerObserver.routed``."""
        outputs = pairs.outputs
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
        # amax and amin: on a CPU a tenth of what aminmax along an axis takes
        peaks = torch.maximum(outputs.amax(dim=-1), -outputs.amin(dim=-1))
        self._pairs.append(_Pairs(pairs.expert, pairs.tokens, norms, pairs.gate, peaks))
        if self._want_moments:
            for name, values in (("experts.gate_up", pairs.inputs), ("experts.down", pairs.activated)):
                for domain, part in self._by_domain(values, pairs.tokens):
                    self.moments[name][domain, pairs.expert] += _square_sums(part)

    def _by_domain(self, values: torch.Tensor, tokens: torch.Tensor | None = None) -> list[tuple[int, torch.Tensor]]:
        """The rows of ``values`` by domain; ``tokens`` (rows,) says which token each is of; None: all in turn."""
        if self._domains is None:
            return [(self._domain, values)]
        domains = self._domains if tokens is None else self._domains[tokens.cpu()]
        found, counts = torch.unique_consecutive(domains, return_counts=True)
        return list(zip(found.tolist(), values.split(counts.tolist()), strict=True))

    def _flush(self) -> None:
        """Adds the pairs of the batch that has ended."""
        if not self._pairs:
            return
        tokens, norms, gates, peaks = (
            torch.cat(values).cpu().numpy().astype(np.int64 if i == 0 else np.float64)
            for i, values in enumerate(
                zip(*((p.tokens, p.norms, p.gates.float(), p.peaks.float()) for p in self._pairs), strict=True)
            )
        )
        experts = np.repeat([p.expert for p in self._pairs], [len(p.tokens) for p in self._pairs])
        self._pairs = []
        place = self._token_groups[tokens] * self._experts + experts
        product = norms * gates
        sums = {
            "routed_tokens": None, "gate_sum": gates, "norm_sum": norms, "gate_norm_sum": product,
            "gate_norm_sq_sum": product * product,
        }  # fmt: skip
        for name, values in sums.items():
            array = self.routing[name]
            array += np.bincount(place, values, array.size).reshape(array.shape)
        np.maximum.at(self.routing["max_activation"].reshape(-1), place, peaks)

    def linear(self, module: str, inputs: torch.Tensor) -> None:
        """The input of one linear outside the experts; q, k and v are given the same tensor, summed once."""
        if not self._want_moments:
            return
        if self._last is None or self._last[0].data_ptr() != inputs.data_ptr() or self._last[0].shape != inputs.shape:
            self._last = (inputs, self._linear_sums(inputs))
        if module not in self.moments:
            self.moments[module] = np.zeros((self._groups.domains, inputs.shape[-1]), np.float64)
            self.counts[module] = np.zeros((self._groups.domains, 1), np.float64)
        for domain, (sums, count) in self._last[1].items():
            self.moments[module][domain] += sums
            self.counts[module][domain] += count

    def _linear_sums(self, inputs: torch.Tensor) -> dict[int, tuple[np.ndarray, float]]:
        """Squares and rows by domain."""
        if self._domains is None:
            return {self._domain: (_square_sums(inputs), len(inputs))}
        domains = self._domains if self._valid is None else self._domains[self._valid]
        if len(inputs) == len(self._domains):
            domains = self._domains
        result: dict[int, tuple[np.ndarray, float]] = {}
        if len(inputs) % len(domains):
            # Rows that are no tokens (compressed ones): shared out as the tokens are.
            whole = _square_sums(inputs)
            for domain, count in zip(*(t.tolist() for t in torch.unique(domains, return_counts=True)), strict=True):
                share = count / len(domains)
                result[domain] = (whole * share, len(inputs) * share)
            return result
        each = len(inputs) // len(domains)  # several rows of a token stand together
        found, counts = torch.unique_consecutive(domains, return_counts=True)
        for domain, part in zip(found.tolist(), inputs.split((counts * each).tolist()), strict=True):
            sums, count = result.get(domain, (np.zeros(inputs.shape[-1]), 0.0))
            result[domain] = (sums + _square_sums(part), count + len(part))
        return result

    def held_bytes(self) -> int:
        """See ``LayerObserver.held_bytes``."""
        return sum(values.nbytes for values in self.arrays(0).values())

    def arrays(self, layer: int) -> dict[str, np.ndarray]:
        """The sums by their names in the scores file."""
        self._flush()
        self._last = None
        named = {f"layers.{layer}.{name}": values for name, values in self.routing.items()}
        for module, values in self.moments.items():
            key = f"layers.{layer}.{module}" if module.startswith("experts.") else module
            named[f"second_moment.{key}"] = values
        named |= {f"second_moment_count.{module}": values for module, values in self.counts.items()}
        return named


def _square_sums(inputs: torch.Tensor) -> np.ndarray:
    """Sum over tokens of squared inputs, (in,) float64."""
    sums: np.ndarray = inputs.float().square().sum(dim=0).double().cpu().numpy()
    return sums
