"""A token set on its way through the original model and the pruned one, and what the pruned layer lacks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from reapc.stream.experts import LayerObserver, RoutedPairs
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates, batches_of, states_of
from reapc.stream.tokens import Batch, Tokens

CHUNK_PAIRS = 8192
_LEAST_SIZE = 1e-30  # of a token's state, so that its weight stays finite


class Side:
    """``original``, ``pruned``: the states in each model. ``weight`` (tokens,): one over the root mean square of the
    original layer's output, because the next layer's norm takes its size away: else the few tokens of huge states (the
    first of a sequence) would be all that counts; 0 where a token is padding. ``lacking`` (tokens, hidden): weight x
    (output of the original layer less that of the pruned one). ``pairs``: what the pruned layer's experts were given.
    """

    def __init__(self, name: str, tokens: Tokens, original: StreamedModel, pruned: StreamedModel, work: Path) -> None:
        self.tokens = tokens
        self.original = states_of(original, tokens, work, f"{name}-original")
        self.pruned = states_of(pruned, tokens, work, f"{name}-pruned")
        self._inputs, self._activated = work / f"{name}-inputs.bin", work / f"{name}-activated.bin"
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
            places = _places(batch, self.tokens.length)
            size = original.square().mean(dim=-1).sqrt().clamp_min(_LEAST_SIZE).numpy()
            self.weight[places] = np.where(self.tokens.mask[batch.rows, : batch.length], 1 / size, 0)
            self.lacking[places] = lacking * self.weight[places][..., None]

    def begin(self, experts: int, width: int) -> None:
        """Makes room for what the experts' down projections are given, and sets where each expert's lies."""
        assert self.pairs is not None
        ends = np.cumsum([len(self.pairs.of(expert)[0]) for expert in range(experts)])
        self._runs = [slice(int(start), int(end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._gated = np.memmap(self._activated, np.float32, "w+", shape=(max(1, int(ends[-1])), width))

    def activate(self, expert: int, activated_by: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Keeps weight x gate weight x activation of one expert's pairs. ``activated_by`` takes their inputs."""
        assert self.pairs is not None
        places, gates = self.pairs.of(expert)
        run = self._runs[expert]
        for start in range(0, len(places), CHUNK_PAIRS):
            chunk = slice(start, start + CHUNK_PAIRS)
            factors = gates[chunk] * torch.from_numpy(self.weight[places[chunk]])
            gated = activated_by(self.pairs.inputs[places[chunk]]) * factors[:, None]
            self._gated[run.start + start : run.start + start + len(gated)] = gated.numpy()

    def gated(self, expert: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """What ``activate`` kept, (pairs, width) in chunks, and the tokens' places."""
        assert self.pairs is not None
        places, run = self.pairs.of(expert)[0], self._runs[expert]
        for start in range(0, len(places), CHUNK_PAIRS):
            chunk = places[start : start + CHUNK_PAIRS]
            first = run.start + start
            yield chunk, torch.from_numpy(self._gated[first : first + len(chunk)])

    def lacking_at(self, places: np.ndarray) -> torch.Tensor:
        """``lacking`` of some tokens, (tokens, hidden)."""
        return torch.from_numpy(self.lacking).index_select(0, torch.from_numpy(places))

    def lower(self, places: np.ndarray, by: torch.Tensor) -> None:
        """Takes ``by`` (tokens, hidden) off ``lacking`` at some tokens, each named once."""
        torch.from_numpy(self.lacking).index_add_(0, torch.from_numpy(places), by, alpha=-1)

    def cost(self, expert: int, step: torch.Tensor) -> float:
        """By how much |lacking|^2 grows where an expert's down projection changes by ``step`` (width, hidden)."""
        total = 0.0
        for places, gated in self.gated(expert):
            by = gated @ step
            total += float((by * (by - 2 * self.lacking_at(places))).sum(dtype=torch.float64))
        return total

    def keep(self, layer: int) -> None:
        """The pruned model's states behind ``layer`` become what they are with nothing lacking but ``lacking``."""
        for batch in self.batches():
            original, before = (s.read(layer + 1, batch.rows, batch.length) for s in (self.original, self.pruned))
            places = _places(batch, self.tokens.length)
            weight = torch.from_numpy(self.weight[places])[..., None]
            healed = original - torch.from_numpy(self.lacking[places]) / weight.clamp_min(_LEAST_SIZE)
            self.pruned.write(layer + 1, batch, torch.where(weight > 0, healed, before))

    def error(self) -> float:
        """Mean square of what is lacking over real tokens and channels: its share of the original's output."""
        parts = (self.lacking[_places(batch, self.tokens.length)] for batch in self.batches())
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
        self._whole: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def batch(self, rows: slice, length: int, mask: torch.Tensor | None) -> None:
        self._places = _places(Batch(rows, length), self._length).reshape(-1)

    def routed(self, pairs: RoutedPairs) -> None:
        places = self._places[pairs.tokens.cpu().numpy()]
        self.inputs[places] = pairs.inputs.float().cpu().numpy()
        self._found.setdefault(pairs.expert, []).append((places, pairs.gate.float().cpu()))

    def of(self, expert: int) -> tuple[np.ndarray, torch.Tensor]:
        """Token places and gate weights, (pairs,) each, once everything was seen."""
        if expert not in self._whole:
            found = self._found.pop(expert, [])
            places = [np.zeros(0, np.int64), *(places for places, _ in found)]
            self._whole[expert] = np.concatenate(places), torch.cat([torch.zeros(0), *(gates for _, gates in found)])
        return self._whole[expert]


class RoutedTotal(LayerObserver):
    """Sums gate weight x output of every token of one batch: ``total`` (tokens, hidden), what the experts add."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total

    def routed(self, pairs: RoutedPairs) -> None:
        self.total.index_add_(0, pairs.tokens, (pairs.outputs * pairs.gate[:, None]).to(self.total.dtype))


def disk_bytes(tokens: Tokens, hidden: int, pairs: int, width: int) -> int:
    """Bytes that a side takes: the states of both models, what is lacking, the experts' inputs, and what their down
    projections are given (``pairs``: experts that a token is sent to)."""
    count = tokens.sequences * tokens.length
    return 2 * HiddenStates.disk_bytes(tokens, hidden) + 4 * count * (2 * hidden + pairs * width)
