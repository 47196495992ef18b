"""A GGUF file written from byte ranges of others: metadata as they were, byte for byte, but for what is said to change.

The gguf package's writer takes metadata as Python values, and a type that it guesses differently would be changed.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, pack
from typing import BinaryIO

from reapc.checkpoint.gguf_header import TYPE_NUMBERS, VALUES, GgufFile
from reapc.checkpoint.safetensors_file import copy_range
from reapc.errors import ReapcError
from reapc.formats.gguf_types import ALIGNMENT_BYTES
from reapc.progress import Advance


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write. Its bytes are ``data`` or, where that is empty, those of ``ranges`` (start, end offsets) of
    ``source``, in their order. ``shape`` as numpy reads it."""

    name: str
    type: str
    shape: tuple[int, ...]
    source: Path
    ranges: tuple[tuple[int, int], ...] = ()
    data: bytes = b""

    @property
    def bytes(self) -> int:
        return len(self.data) or sum(end - start for start, end in self.ranges)


@dataclass(frozen=True)
class GgufOutput:
    """A file to write: metadata by key (the type's number and the value, as they are stored) and tensors."""

    path: Path
    values: dict[str, bytes]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    order: str
    version: int

    def header(self) -> bytes:
        """All that comes before the data, padded."""
        order, offset = self.order, 0
        parts = [b"GGUF", pack(f"{order}IQQ", self.version, len(self.tensors), len(self.values))]
        for key, value in self.values.items():
            parts += [_text(order, key), value]
        for tensor in self.tensors:
            axes = len(tensor.shape)
            numbers = (axes, *tensor.shape[::-1], TYPE_NUMBERS[tensor.type], offset)
            parts += [_text(order, tensor.name), pack(f"{order}I{axes}QIQ", *numbers)]
            offset += tensor.bytes + _padding(tensor.bytes, self.alignment)
        whole = b"".join(parts)
        return whole + bytes(_padding(len(whole), self.alignment))

    @property
    def bytes(self) -> int:
        """The size of the whole file."""
        return len(self.header()) + sum(t.bytes + _padding(t.bytes, self.alignment) for t in self.tensors)


def _text(order: str, text: str) -> bytes:
    raw = text.encode()
    return pack(f"{order}Q", len(raw)) + raw


def _padding(count: int, alignment: int) -> int:
    return -count % alignment


def raw_values(file: GgufFile) -> dict[str, bytes]:
    """The metadata of a file as they are stored."""
    with file.path.open("rb") as opened:
        return {key: _read(opened, start, end) for key, (start, end) in file.values.items()}


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def alignment_of(file: GgufFile) -> int:
    """What the data of a file are aligned to, in bytes."""
    return file.fields.get("general.alignment") or ALIGNMENT_BYTES


def with_number(raw: bytes, order: str, number: int, where: str) -> bytes:
    """A stored number with another value, its type kept; ReapcError where it is none."""
    (kind,) = Struct(f"{order}I").unpack_from(raw)
    if kind not in VALUES:
        raise ReapcError(f"{where} has type {kind}: a number is expected")
    return raw[:4] + pack(order + VALUES[kind], number)


def shortened(raw: bytes, order: str, count: int) -> bytes:
    """A stored array of numbers, its first ``count`` values only."""
    _, item, _ = Struct(f"{order}IIQ").unpack_from(raw)
    return raw[:8] + pack(f"{order}Q", count) + raw[16 : 16 + count * Struct(order + VALUES[item]).size]


def write_gguf(output: GgufOutput, path: Path, advance: Advance) -> int:
    """Writes the file to ``path``, copying byte ranges; fsyncs, and returns its bytes. ``advance`` hears of bytes."""
    with path.open("wb") as out, ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        out.write(output.header())
        for tensor in output.tensors:
            if tensor.data:
                out.write(tensor.data)
            for start, end in tensor.ranges:
                if tensor.source not in opened:
                    opened[tensor.source] = stack.enter_context(tensor.source.open("rb"))
                copy_range(opened[tensor.source], start, end, out)
            out.write(bytes(_padding(tensor.bytes, output.alignment)))
            advance(tensor.bytes)
        out.flush()
        os.fsync(out.fileno())
    return path.stat().st_size
