"""A token set on its way through the original model and the pruned one, and what the pruned layer lacks of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from reapc.stream.experts import LayerObserver, RoutedPairs
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates, batches_of, states_of
from reapc.stream.tokens import Batch, Tokens


class Side:
    """``original``, ``pruned``: the states in each model. ``lacking`` (tokens, hidden): output of the original layer
    less that of the pruned one; 0 where a token is padding. ``weight`` (tokens,): one over the root mean square of the
    original's output, because the next layer's norm takes its size away: else the few tokens of huge states (the first
    of a sequence) would be all that counts. ``pairs``: what the pruned layer's experts were given."""

    def __init__(self, name: str, tokens: Tokens, original: StreamedModel, pruned: StreamedModel, work: Path) -> None:
        self.tokens = tokens
        self.original = states_of(original, tokens, work, f"{name}-original")
        self.pruned = states_of(pruned, tokens, work, f"{name}-pruned")
        self._inputs = work / f"{name}-inputs.bin"
        self._count = tokens.sequences * tokens.length
        shape = (self._count, original.spec.hidden_size)
        self.lacking = np.memmap(work / f"{name}-lacking.bin", np.float32, "w+", shape=shape)
        self.weight = np.zeros(self._count, np.float32)
        self.pairs: PairsSeen | None = None

    def watch(self, inputs: int) -> PairsSeen:
        """An observer for the next layer, whose experts take ``inputs`` channels."""
        mapped = np.memmap(self._inputs, np.float32, "w+", shape=(self._count, inputs))
        self.pairs = PairsSeen(self.tokens.length, mapped)
        return self.pairs

    def batches(self) -> list[Batch]:
        return list(batches_of(self.tokens))

    def compare(self, layer: int) -> None:
        """Sets ``lacking`` and ``weight`` from the states of both models behind ``layer``."""
        for batch in self.batches():
            original, pruned = (s.read(layer + 1, batch.rows, batch.length) for s in (self.original, self.pruned))
            lacking = (original - pruned).numpy()
            padding = ~self.tokens.mask[batch.rows, : batch.length]
            lacking[padding] = 0
            places = _places(batch, self.tokens.length)
            self.lacking[places] = lacking
            size = original.square().mean(dim=-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny).numpy()
            self.weight[places] = np.where(padding, 0, 1 / size)

    def weights(self, places: np.ndarray) -> torch.Tensor:
        """``weight`` at some tokens, (tokens, 1)."""
        return torch.from_numpy(self.weight[places])[:, None]

    def keep(self, layer: int) -> None:
        """The pruned model's states behind ``layer`` become what they are with nothing lacking but ``lacking``."""
        for batch in self.batches():
            original, before = (s.read(layer + 1, batch.rows, batch.length) for s in (self.original, self.pruned))
            healed = original - torch.from_numpy(self.lacking[_places(batch, self.tokens.length)])
            real = torch.from_numpy(self.tokens.mask[batch.rows, : batch.length])[..., None]
            self.pruned.write(layer + 1, batch, torch.where(real, healed, before))

    def error(self) -> float:
        """Mean square of what is lacking, weighted, over real tokens and channels: its share of the original's."""
        places = (_places(batch, self.tokens.length) for batch in self.batches())
        parts = (self.lacking[place] * self.weight[place][..., None] for place in places)
        total = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
        return total / (self.tokens.count * int(self.lacking.shape[1]))


def _places(batch: Batch, length: int) -> np.ndarray:
    """Where the batch's tokens lie in arrays of all, (rows, length of the batch)."""
    places: np.ndarray = np.arange(batch.rows.start, batch.rows.stop)[:, None] * length + np.arange(batch.length)
    return places


class PairsSeen(LayerObserver):
    """Which tokens were sent to each expert of a layer, with what gate weight, and what the experts were given:
    ``inputs`` (tokens, in), the same for all experts of a token."""

    def __init__(self, length: int, inputs: np.ndarray) -> None:
        self.inputs = inputs
        self._length = length
        self._places = np.zeros(0, np.int64)
        self._found: dict[int, list[tuple[np.ndarray, torch.Tensor]]] = {}

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None:
        self._places = _places(Batch(rows, length), self._length).reshape(-1)

    def routed(self, pairs: RoutedPairs) -> None:
        places = self._places[pairs.tokens.cpu().numpy()]
        self.inputs[places] = pairs.inputs.float().cpu().numpy()
        self._found.setdefault(pairs.expert, []).append((places, pairs.gate.float().cpu()))

    def of(self, expert: int) -> tuple[np.ndarray, torch.Tensor]:
        """Token places and gate weights, (pairs,) each."""
        found = self._found.get(expert, [])
        places = [np.zeros(0, np.int64), *(places for places, _ in found)]
        return np.concatenate(places), torch.cat([torch.zeros(0), *(gates for _, gates in found)])


class RoutedTotal(LayerObserver):
    """Sums gate weight x output of every token of one batch: ``total`` (tokens, hidden), what the experts add."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total

    def routed(self, pairs: RoutedPairs) -> None:
        self.total.index_add_(0, pairs.tokens, (pairs.outputs * pairs.gate[:, None]).to(self.total.dtype))


def disk_bytes(tokens: Tokens, hidden: int) -> int:
    """Bytes that a side takes: the states of both models, what is lacking, and the experts' inputs."""
    return 2 * HiddenStates.disk_bytes(tokens, hidden) + 2 * 4 * tokens.sequences * tokens.length * hidden
