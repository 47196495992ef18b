"""A safetensors file written one computed tensor at a time: the header is known from shapes before any data is."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reapc.checkpoint.safetensors_file import DTYPE_BYTES, OutTensor
from reapc.checkpoint.shards import INDEX
from reapc.errors import ReapcError

if TYPE_CHECKING:
    import torch


class Slot(NamedTuple):
    """A tensor to be written: its name, safetensors dtype ("F8_E4M3") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_streamed(path: Path, slots: Sequence[Slot], tensors: Iterable[torch.Tensor], metadata: dict[str, str]) -> int:
    """Writes ``tensors`` in the order of ``slots``, holding one at a time; fsyncs and returns the file's bytes.

    ReapcError where a tensor has another size than its slot."""
    import torch

    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for slot in slots:
        header[slot.name] = {
            "dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, offset + slot.bytes],
        }  # fmt: skip
        offset += slot.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for slot, tensor in zip(slots, tensors, strict=True):
            if tensor.nbytes != slot.bytes or tuple(tensor.shape) != slot.shape:
                raise ReapcError(f"{path}: {slot.name} is {list(tensor.shape)}, {list(slot.shape)} was announced")
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
    return 8 + len(text) + offset


def write_index(folder: Path, shards: Mapping[str, Sequence[Slot | OutTensor]]) -> None:
    """Writes the index of a folder of shards (file name -> its tensors)."""
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensors in shards.values() for tensor in tensors)},
        "weight_map": dict(sorted((tensor.name, name) for name, tensors in shards.items() for tensor in tensors)),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
