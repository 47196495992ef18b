"""How a pass keeps a bound on its memory, or finds by itself what there is room for. All in bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from reapc.errors import CannotBeDone
from reapc.stream.experts import LayerObserver
from reapc.stream.memory import SPARE_BYTES, SPARE_SHARE, Memory, anonymous_bytes, available_bytes, return_freed
from reapc.stream.model import StreamedModel
from reapc.stream.needs import LayerNeed, count_layer
from reapc.stream.tokens import Batch, Tokens
from reapc.units import format_bytes

_GPU_SHARE = 0.9
# Without a bound a pass is not counted where that would be more of it than one part in so many.
_COUNTING_PART = 50

Batches = Sequence[tuple[Tokens, Batch]]


@dataclass(frozen=True)
class MemoryPlan:
    """``tokens_per_batch``: batches are cut into runs of sequences of so many tokens, or one sequence. ``keep``: how
    many experts of a layer stay for all its batches. ``ahead``: the next layer is loaded while one computes."""

    tokens_per_batch: int
    keep: tuple[int, ...]
    ahead: bool

    def cut(self, batch: Batch) -> Iterator[Batch]:
        return batch.cut(self.tokens_per_batch)


@dataclass(frozen=True)
class _Place:
    """One type of device: what is taken there at the start, what may be, what layers of each kind need. ``shared``: two
    layers can be there at once. ``width``: of a token's states as they are read."""

    name: str
    base: int
    bound: int
    needs: dict[int, LayerNeed]  # by the id of the kind
    shared: bool
    width: int
    helper: bool

    def peak(self, kind: int, batches: Sequence[Batch], ahead: bool) -> int:
        """The most while a layer of this kind is there, no expert kept."""
        need = self.needs[kind]
        following = max(other.loading for other in self.needs.values()) if ahead and self.shared else 0
        running = max(need.activations(batch) for batch in batches) + need.decoding
        running += need.expert if self.helper else 0
        computing = need.outside + need.sums + max(running, need.sums)  # sums are written from a copy
        embedding = 4 * self.width * max(batch.tokens for batch in batches)
        most = max(computing + following, need.loading, embedding)
        return ceil((self.base + most + SPARE_BYTES) * (1 + SPARE_SHARE))

    def worst(self, batches: Sequence[Batch], ahead: bool) -> int:
        """The most of all layers."""
        return max(self.peak(kind, batches, ahead) for kind in self.needs)


def plan_pass(
    models: Sequence[StreamedModel],
    batches: Batches,
    observer_of: Callable[[int], LayerObserver | None],
    memory: Memory,
    at_most: int | None = None,
) -> MemoryPlan:
    """How a pass over ``batches`` keeps the bound of ``memory``, whose ``predicted_bytes`` it sets; CannotBeDone names
    the smallest bound that it could keep. They are cut only where they do not fit (or to ``at_most`` tokens, as they
    were before an interruption), since sums of other batches can differ in their last bits."""
    spec = models[0].spec
    whole = at_most or max(batch.tokens for _, batch in batches)
    rows = sum(batch.rows.stop - batch.rows.start for _, batch in batches)
    kinds = {id(layer.kind) for layer in spec.layers}
    if memory.bound_bytes is None and rows * spec.num_layers < 2 * len(kinds) * _COUNTING_PART:
        return MemoryPlan(whole, (0,) * spec.num_layers, True)
    if memory.bound_bytes is not None:
        return_freed(always=True)
    places = _places(models, _count(models[0], batches, observer_of), memory)
    limit, ahead = _largest(places, batches, whole, memory)
    runs = _cut(batches, limit)
    keep = _kept(models, places, runs, ahead, memory)
    host, several = places[0], len(models) > 1
    memory.predicted_bytes = max(
        host.peak(id(layer.kind), runs, ahead) + (1 + several) * count * host.needs[id(layer.kind)].expert
        for layer, count in zip(spec.layers, keep, strict=True)
    )
    return MemoryPlan(limit, keep, ahead)


def _cut(batches: Batches, limit: int) -> list[Batch]:
    return [run for _, batch in batches for run in batch.cut(limit)]


def _count(
    model: StreamedModel, batches: Batches, observer_of: Callable[[int], LayerObserver | None]
) -> dict[int, dict[str, LayerNeed]]:
    """The needs of every kind of layer, on the longest sequence that there is."""
    tokens, longest = max(batches, key=lambda item: item[1].length)
    row = longest.rows.start + int(tokens.lengths[longest.rows].argmax())
    ids = torch.from_numpy(tokens.input_ids[row : row + 1, : longest.length].astype("int64"))
    ids = ids.expand(min(2, min(tokens.sequences for tokens, _ in batches)), -1)
    masked = any(not tokens.mask[batch.rows, : batch.length].all() for tokens, batch in batches)
    found: dict[int, dict[str, LayerNeed]] = {}
    for layer in model.spec.layers:
        if id(layer.kind) not in found:
            found[id(layer.kind)] = count_layer(model, layer.index, ids, masked, observer_of(layer.index))
    return found


def _places(models: Sequence[StreamedModel], counted: dict[int, dict[str, LayerNeed]], memory: Memory) -> list[_Place]:
    """The host, and the GPUs where the models are on such."""
    model = models[0]
    gc.collect()
    return_freed(always=False)
    base, gpu = anonymous_bytes(), model.device.type == "cuda"
    bound = memory.limit_bytes(base)
    needs = {kind: need["cpu"] for kind, need in counted.items()}
    places = [_Place("cpu", base, 1 << 62 if bound is None else bound, needs, True, 4 * model.width, gpu)]
    if gpu:
        devices = {model.device for model in models}
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
        needs = {kind: need["cuda"] for kind, need in counted.items()}
        width = model.dtype.itemsize * model.width
        places.append(_Place("cuda", 0, int(_GPU_SHARE * free), needs, len(devices) == 1, width, True))
    return places


def _largest(places: Sequence[_Place], batches: Batches, whole: int, memory: Memory) -> tuple[int, bool]:
    """Tokens of a batch, and whether the next layer is loaded ahead: as many as fit, rather than ahead."""
    limit, ahead = whole, True
    while any(place.worst(_cut(batches, limit), ahead) > place.bound for place in places):
        if ahead:
            ahead = False
        elif limit > 1:
            limit, ahead = limit // 2, True
        elif memory.bound_bytes is None:  # half of the RAM is a default, no promise: the least is tried
            break
        else:
            raise _refused(places, _cut(batches, limit))
    return limit, ahead


def _kept(
    models: Sequence[StreamedModel], places: Sequence[_Place], runs: Sequence[Batch], ahead: bool, memory: Memory
) -> tuple[int, ...]:
    """How many experts of every layer there is room for, where more than one batch uses them."""
    several = len(models) > 1
    if len(runs) == 1 and not (several and ahead):
        return (0,) * models[0].spec.num_layers
    available = available_bytes() if memory.bound_bytes is None else 0
    keep = []
    for layer in models[0].spec.layers:
        kind, rooms = id(layer.kind), [models[0].spec.num_experts if layer.is_moe else 0]
        for place in places:
            if expert := place.needs[kind].expert:
                peak = place.peak(kind, runs, ahead)
                room = place.bound - peak
                if place.name == "cpu" and memory.bound_bytes is None:
                    # Every batch reads the others' bytes again: they must stay in the page cache.
                    room = min(room, available - (peak - place.base) - models[0].stored_bytes(layer.index))
                both = 2 if several and place.shared else 1
                rooms.append(max(0, int(room / (1 + SPARE_SHARE) / expert / both)))
        keep.append(min(rooms))
    return tuple(keep)


def _refused(places: Sequence[_Place], runs: Sequence[Batch]) -> CannotBeDone:
    place = next(place for place in places if place.worst(runs, False) > place.bound)
    kind = max(place.needs, key=lambda kind: place.peak(kind, runs, False))
    peak, need = place.peak(kind, runs, False), place.needs[kind]
    parts = (
        f"{format_bytes(place.base)} before the first layer, {format_bytes(need.outside)} of a layer's weights beside "
        f"its experts, {format_bytes(need.decoding)} for one expert, {format_bytes(need.sequence)} for a sequence of "
        f"{need.length} tokens"
    )
    if place.name == "cuda":
        return CannotBeDone(
            f"{format_bytes(place.bound)} of the GPU's memory can be used, {format_bytes(peak)} are needed: {parts}",
            hint="shorter sequences, or --device cpu",
        )
    return CannotBeDone(
        f"a bound of {format_bytes(place.bound)} of memory is less than the {format_bytes(peak)} that are needed: "
        f"{parts}",
        hint=f"--memory {ceil(peak * 1.01 / 10_000_000)}0MB is the least that does; shorter sequences need less",
    )
