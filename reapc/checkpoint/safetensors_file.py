"""One safetensors file: a validated header, raw byte ranges, and a streaming writer.

The library's own reader maps whole files and its writer wants every tensor in memory; pruning copies byte
ranges of files larger than memory, so the header is read here. Tensors as torch come from the library.
Format: u64 little-endian header length, JSON header, data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from reapc.errors import ReapcError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``end`` are file offsets in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries by name and the metadata of ``path``; ReapcError when the file is not whole or not sound."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise ReapcError(f"{path}: truncated: {size} bytes, shorter than a safetensors header", hint=_AGAIN)
            (length,) = struct.unpack("<Q", start)
            if length > _HEADER_LIMIT or 8 + length > size:
                raise ReapcError(
                    f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}",
                    hint=_AGAIN,
                )
            raw = json.loads(file.read(length))
    except OSError as error:
        raise ReapcError(f"{path}: cannot read: {error.strerror}", hint=_AGAIN) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReapcError(f"{path}: corrupt: its header is not JSON ({error})", hint=_AGAIN) from error
    if not isinstance(raw, dict):
        raise ReapcError(f"{path}: corrupt: its header is not a JSON object", hint=_AGAIN)
    metadata = raw.pop("__metadata__", {})
    entries = {name: _entry(path, name, info, 8 + length, size) for name, info in raw.items()}
    return entries, metadata


_AGAIN = "download or copy this file again"


def _entry(path: Path, name: str, info: object, base: int, size: int) -> TensorEntry:
    try:
        assert isinstance(info, dict)
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
        first, last = (int(n) for n in info["data_offsets"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ReapcError(
            f"{path}: corrupt: tensor {name!r} has no dtype, shape and data_offsets", hint=_AGAIN
        ) from error
    if dtype not in DTYPE_BYTES:
        raise ReapcError(f"{path}: tensor {name!r} has dtype {dtype!r}, which is not known here")
    if not 0 <= first <= last or last - first != prod(shape) * DTYPE_BYTES[dtype]:
        raise ReapcError(
            f"{path}: corrupt: tensor {name!r} {dtype} {list(shape)} at bytes {first} to {last}", hint=_AGAIN
        )
    if base + last > size:
        raise ReapcError(
            f"{path}: truncated: tensor {name!r} ends at byte {base + last}, the file has {size}", hint=_AGAIN
        )
    return TensorEntry(name, dtype, shape, base + first, base + last)


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: its bytes come from ``ranges`` of files, in order (start, end offsets)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Path
    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(end - start for start, end in self.ranges)


def _merged(ranges: Iterable[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, int]]:
    """Joins neighbouring ranges of the same file, so that a run of kept tensors is one copy."""
    current: tuple[Path, int, int] | None = None
    for path, start, end in ranges:
        if current and current[0] == path and current[2] == start:
            current = (path, current[1], end)
            continue
        if current:
            yield current
        current = (path, start, end)
    if current:
        yield current


def copy_range(source: BinaryIO, start: int, end: int, out: BinaryIO) -> None:
    """Copies bytes [start, end) inside the kernel where it can, so that memory stays flat."""
    offset = start
    out.flush()
    while offset < end:
        done = os.sendfile(out.fileno(), source.fileno(), offset, min(end - offset, 1 << 27))
        if done == 0:
            raise ReapcError(f"{source.name}: ended at byte {offset}, {end} expected", hint=_AGAIN)
        offset += done


def write_copied(path: Path, tensors: list[OutTensor], metadata: dict[str, str]) -> int:
    """Writes ``tensors`` to ``path`` by copying byte ranges, fsyncs, and returns the file's bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handles: dict[Path, BinaryIO] = {}
    try:
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            parts = ((t.source, start, end) for t in tensors for start, end in t.ranges)
            for source, start, end in _merged(parts):
                if source not in handles:
                    handles[source] = source.open("rb")
                copy_range(handles[source], start, end, out)
            out.flush()
            os.fsync(out.fileno())
    finally:
        for handle in handles.values():
            handle.close()
    return 8 + len(text) + offset
