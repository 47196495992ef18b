"""Drives token sequences through the layers, hidden states in memory-mapped files, resumable at a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from reapc.progress import Progress
from reapc.stream.ahead import layers_of
from reapc.stream.budget import MemoryPlan
from reapc.stream.experts import LayerObserver
from reapc.stream.model import Forward, StreamedModel
from reapc.stream.tokens import Batch, Tokens

TOKENS_PER_BATCH = 8192


class HiddenStates:
    """Hidden states (sequences, length, width) fp32 of one token set, before layer ``i``, and, with ``carried`` > 0,
    that many int32 indices for every token that layers hand on beside them.

    Two files in turn: layer i reads ``i % 2`` and writes ``(i + 1) % 2``, so a layer that was interrupted
    can be run again from what is on disk.
    """

    def __init__(self, tokens: Tokens, folder: Path, name: str, width: int, carried: int = 0) -> None:
        self.tokens = tokens
        self._files = [self._open(folder / f"hidden-{name}-{turn}.bin", np.float32, width) for turn in range(2)]
        # sparse attention chooses among the tokens that there are
        carried = min(carried, tokens.length)
        places = [folder / f"hidden-{name}-carried-{turn}.bin" for turn in range(2)]
        self._carried = [self._open(place, np.int32, carried) for place in places] if carried else []

    def _open(self, path: Path, dtype: type, width: int) -> np.ndarray:
        shape = (self.tokens.sequences, self.tokens.length, width)
        fresh = not path.exists() or path.stat().st_size != 4 * int(np.prod(shape))
        return np.memmap(path, dtype, "w+" if fresh else "r+", shape=shape)

    @staticmethod
    def disk_bytes(tokens: Tokens, width: int, carried: int = 0) -> int:
        """Bytes that all files take on disk: what no batch reaches is never written."""
        longest = tokens.batches(TOKENS_PER_BATCH)
        return sum(2 * 4 * batch.tokens * (width + min(carried, tokens.length)) for batch in longest)

    def read(self, layer: int, rows: slice, length: int | None = None) -> torch.Tensor:
        """A copy of the states before ``layer``, of the first ``length`` tokens."""
        return torch.from_numpy(np.array(self._files[layer % 2][rows, :length]))

    def write(self, layer: int, batch: Batch, values: torch.Tensor) -> None:
        """Stores the states before ``layer``. What is behind a batch's length stays a hole in the file."""
        self._files[layer % 2][batch.rows, : batch.length] = values.float().cpu().numpy()

    def read_carried(self, layer: int, batch: Batch) -> torch.Tensor | None:
        """What the layer before ``layer`` handed on, (rows, length, carried) int64; None before the first."""
        if not self._carried or layer == 0:
            return None
        values = self._carried[layer % 2][batch.rows, : batch.length, : batch.length]
        return torch.from_numpy(values.astype(np.int64))

    def write_carried(self, layer: int, batch: Batch, values: torch.Tensor | None) -> None:
        """Stores what is handed on to ``layer``: a token chooses among no more than the batch's length."""
        if self._carried:
            assert values is not None
            self._carried[layer % 2][batch.rows, : batch.length, : batch.length] = values.cpu().numpy()

    def flush(self) -> None:
        for file in (*self._files, *self._carried):
            file.flush()  # type: ignore[attr-defined]


def states_of(model: StreamedModel, tokens: Tokens, folder: Path, name: str) -> HiddenStates:
    """Room for the states of ``tokens`` between the layers of ``model``."""
    return HiddenStates(tokens, folder, name, model.width, model.carried_width)


def _mask(tokens: Tokens, batch: Batch, device: torch.device) -> torch.Tensor | None:
    mask = tokens.mask[batch.rows, : batch.length]
    return None if mask.all() else torch.from_numpy(np.ascontiguousarray(mask)).to(device)


def ids_of(tokens: Tokens, batch: Batch) -> torch.Tensor:
    """The batch's token ids, (rows, length) int64."""
    return torch.from_numpy(tokens.input_ids[batch.rows, : batch.length].astype(np.int64))


def run_layers(
    models: StreamedModel | Sequence[StreamedModel],
    sets: Sequence[tuple[HiddenStates, bool]],
    observer_of: Callable[[int], LayerObserver | None],
    layer_done: Callable[[int, LayerObserver | None], None],
    progress: Progress,
    start_layer: int = 0,
    name: str = "forward",
    plan: MemoryPlan | None = None,
) -> None:
    """Runs all layers from ``start_layer`` over ``sets``: (states, observed). The states before ``start_layer``
    must be on disk unless it is 0. ``layer_done(i, observer)`` is called when layer i's states are stored.
    Several ``models``, of one checkpoint on several devices, take turns."""
    models = [models] if isinstance(models, StreamedModel) else list(models)
    layers = models[0].spec.num_layers
    batches = [(states, observed, batch) for states, observed in sets for batch in batches_of(states.tokens, plan)]
    total = sum(batch.tokens for _, _, batch in batches)
    with progress.task(name, total * (layers - start_layer), "tokens x layers") as advance:
        for states, _, batch in batches if start_layer == 0 else ():
            states.write(0, batch, models[0].embed(ids_of(states.tokens, batch)))
        with layers_of(models, start_layer, plan) as loaded:
            for model, layer in loaded:
                observer = observer_of(layer.index)
                with model.computing(layer) as forward:
                    for states, observed, batch in batches:
                        compute_batch(model, forward, layer.index, states, batch, observer if observed else None)
                        advance(batch.tokens)
                layer.finish()
                index = layer.index
                del layer, forward
                for states, _ in sets:
                    states.flush()
                layer_done(index, observer)


def batches_of(tokens: Tokens, plan: MemoryPlan | None = None) -> Iterator[Batch]:
    """The batches that are computed: cut where ``plan`` says that they do not fit, else whole."""
    for batch in tokens.batches(TOKENS_PER_BATCH):
        yield from (batch,) if plan is None else plan.cut(batch)


def compute_batch(
    model: StreamedModel,
    forward: Forward,
    index: int,
    states: HiddenStates,
    batch: Batch,
    observer: LayerObserver | None,
) -> None:
    """One batch through one layer: its states before the layer are read, and those behind it stored. A function of its
    own: nothing of a batch outlives it."""
    hidden = states.read(index, batch.rows, batch.length).to(model.device, model.dtype)
    carried = states.read_carried(index, batch)
    if carried is not None:
        carried = carried.to(model.device)
    mask = _mask(states.tokens, batch, model.device)
    if observer is not None:
        observer.batch(batch.rows, batch.length, mask)
    result = forward(hidden, mask, observer, ids_of(states.tokens, batch), carried)
    states.write(index + 1, batch, result)
    states.write_carried(index + 1, batch, model.carried)
