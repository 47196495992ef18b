"""What a layer needs of memory, counted before a pass begins. All in bytes.

A layer of every kind is loaded and run on two sequences of the greatest length, with all tokens sent to the same
experts: more a router cannot do. A dispatch mode sees every tensor that is made, so the bytes that are alive at once
are counted, whatever the family does inside. Activations grow with the number of sequences, weights and sums do not.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reapc.stream.experts import LayerObserver
from reapc.stream.model import StreamedModel
from reapc.stream.tokens import Batch

# Linear attention and Mamba pad a sequence to whole chunks, of at most that many tokens.
_CHUNK = 256


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive (``now``) and were at once (``most``), by type of device. Views
    and tensors made before do not count; nor does scratch memory inside an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode operators that are made of others come whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._add(leaf.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, place, size = storage._cdata, storage.device.type, storage.nbytes()
        if key in given or key in self._known:
            return

        def freed() -> None:
            self._known.discard(key)
            self.now[place] -= size

        self._known.add(key)
        weakref.finalize(storage, freed)
        self.now[place] = self.now.get(place, 0) + size
        self.most[place] = max(self.most.get(place, 0), self.now[place])


@dataclass(frozen=True)
class LayerNeed:
    """What a kind of layer takes on one type of device: its weights outside the experts (``outside``) and the most
    while these are read (``loading``), an expert as it is computed with (``expert``; 0: mapped) and the most while one
    is made ready (``decoding``), the activations of one sequence of ``length`` tokens, padded to whole chunks of
    ``chunk``, and the observer's sums."""

    outside: int
    loading: int
    expert: int
    decoding: int
    sequence: int
    sums: int
    length: int
    chunk: int

    def activations(self, batch: Batch) -> int:
        """Of all sequences of a batch: in a sequence they grow with its length or faster."""
        share = min(1.0, self.chunk * ceil(batch.length / self.chunk) / self.length)
        sequences: int = batch.rows.stop - batch.rows.start
        return ceil(sequences * share * self.sequence)


def count_layer(
    model: StreamedModel, index: int, ids: torch.Tensor, masked: bool, observer: LayerObserver | None
) -> dict[str, LayerNeed]:
    """The needs of layer ``index`` by type of device ("cpu", "cuda"), counted on the sequences ``ids`` (count, length):
    two, since transformers does less for a single one (no masking of padded states)."""
    count, length = ids.shape
    with LiveBytes() as loading:
        layer = model.load(index)
    outside = dict(loading.now)
    decoding = LiveBytes()
    expert: dict[str, int] = {}
    if layer.experts is not None:
        with decoding:
            part = layer.experts.store.get(0)
        expert = dict(decoding.now)
        layer.experts.store.stand_in, layer.experts.crowded = part, True
        del part
    with LiveBytes() as running, model.computing(layer) as forward:
        # as run_layers has them: read from the file in float32
        hidden = torch.zeros(count, length, model.width).add_(0.01).to(model.device, model.dtype)
        carried = None
        if model.carried_width:
            carried = torch.zeros(
                count, length, min(model.carried_width, length), dtype=torch.long, device=model.device
            )
        mask = torch.ones(count, length, dtype=torch.bool, device=model.device) if masked else None
        if mask is not None:
            mask[0, -1] = length == 1
        if observer is not None:
            observer.batch(slice(0, count), length, mask)
        forward(hidden, mask, observer, ids, carried).float().cpu()
        del hidden, carried, mask
    sums = {"cpu": observer.held_bytes()} if observer is not None else {}
    return {
        place: LayerNeed(
            outside.get(place, 0), loading.most.get(place, 0), expert.get(place, 0), decoding.most.get(place, 0),
            ceil(running.most.get(place, 0) / count), sums.get(place, 0), length,
            _CHUNK if model.spec.layers[index].kind.recurrent_elements else 1,
        )
        for place in {"cpu", model.device.type}
    }  # fmt: skip
