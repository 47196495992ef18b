"""The experts of one loaded layer as they are computed with: cast, some kept for all batches, the next one made ready
while one computes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future

import torch

from reapc.stream.expert_weights import Expert, ExpertReader
from reapc.stream.readahead import WINDOW_BYTES, Readahead


class ExpertStore:
    """``each(experts)`` yields their matrices on ``device`` in ``dtype``, good until the next are asked for.

    ``keep``: as many experts as are asked for first stay until the layer is dropped; the others are cast or decoded
    again for every batch. ``helper``, on GPUs only: the next one is made ready there while the caller computes with one
    (on a CPU it would take the memory of the one in use). Neither changes a value. ``stand_in``: given for every
    expert, where only memory is counted (needs.py).
    """

    def __init__(self, reader: ExpertReader, readahead: Readahead, device: torch.device, dtype: torch.dtype) -> None:
        self.reader = reader
        self.device = device
        self.dtype = dtype
        self.keep = 0
        self.helper: Executor | None = None
        self.stand_in: Expert | None = None
        self._readahead = readahead
        self._window = max(1, WINDOW_BYTES // max(1, readahead.bytes_of(reader.shares(0))))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[int, Expert] = {}
        self._seen: set[int] = set()
        self._room: dict[str, torch.Tensor] = {}

    def get(self, expert: int) -> Expert:
        """One expert's matrices; ReapcError where they hold NaN."""
        if (kept := self.stand_in or self._kept.get(expert)) is not None:
            return kept
        stored = self.reader.load(expert)
        self._seen.add(expert)
        if len(self._kept) < self.keep:
            self._kept[expert] = self._cast(stored)
            return self._kept[expert]
        return self._cast(stored) if self.device.type != "cpu" else self._cast_in_place(stored)

    def _cast_in_place(self, stored: Expert) -> Expert:
        """In the memory of the expert before: fresh pages cost several times the cast itself, and what the C library
        keeps of them grows."""
        found = {}
        with torch.inference_mode():  # where the room was made in one mode and is filled in the other
            for key, tensor in stored.items():
                room = self._room.get(key)
                if tensor.dtype == self.dtype:
                    found[key] = tensor
                    continue
                if room is None or room.shape != tensor.shape or room.stride() != tensor.stride():
                    room = self._room[key] = torch.empty_like(tensor, dtype=self.dtype)
                found[key] = room.copy_(tensor)
        return found

    def _cast(self, stored: Expert) -> Expert:
        if self._stream is None:
            return {key: tensor.to(self.device, self.dtype) for key, tensor in stored.items()}
        # On a stream of its own, so that the copy does not wait for what the GPU computes meanwhile.
        with torch.cuda.stream(self._stream):
            found = {key: tensor.to(self.device, self.dtype) for key, tensor in stored.items()}
        self._stream.synchronize()
        return found

    def each(self, experts: Sequence[int]) -> Generator[Expert, None, None]:
        """The matrices of ``experts``, in order; each is forgotten here before the next is made."""
        waiting: Future[Expert] | None = None
        try:
            for place, expert in enumerate(experts):
                # The window moves on by one; the first time it is opened.
                self._ask(experts[place and place + self._window - 1 : place + self._window])
                found = waiting.result() if waiting is not None else self.get(expert)
                waiting = None
                if self.helper is not None and place + 1 < len(experts) and experts[place + 1] not in self._kept:
                    waiting = self.helper.submit(self.get, experts[place + 1])
                if self._stream is not None:
                    for tensor in found.values():  # made on another stream: not to be reused before this one is done
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield found
                del found
        finally:
            if waiting is not None and not waiting.cancel():
                waiting.exception()  # its end, so that nothing reads on behind an error

    def ask(self, experts: Sequence[int]) -> None:
        """Has the kernel read the first of ``experts`` ahead, as many as stand in its window."""
        self._ask(experts[: self._window])

    def _ask(self, experts: Sequence[int]) -> None:
        missing = (expert for expert in experts if expert not in self._kept)
        self._readahead.ask(share for expert in missing for share in self.reader.shares(expert))

    def fill(self) -> None:
        """Makes ready what is kept."""
        for expert in range(self.keep):
            self.get(expert)

    def check_rest(self, experts: int) -> None:
        """Refuses NaN in mapped experts that no token was sent to."""
        for expert in range(experts) if self.reader.mapped else ():
            if expert not in self._seen:
                self.reader.load(expert)
                self._seen.add(expert)


class KeptExperts(ExpertStore):
    """The experts ``kept`` of a store, under their numbers in the pruned layer; nothing is held twice."""

    def __init__(self, whole: ExpertStore, kept: Sequence[int]) -> None:
        self.whole = whole
        self.kept = list(kept)

    def get(self, expert: int) -> Expert:
        return self.whole.get(self.kept[expert])

    def each(self, experts: Sequence[int]) -> Generator[Expert, None, None]:
        return self.whole.each([self.kept[expert] for expert in experts])

    def check_rest(self, experts: int) -> None:
        """The whole store's owner does that."""
