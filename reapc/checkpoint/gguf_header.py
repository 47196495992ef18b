"""The header of GGUF files: metadata and the place of every tensor, in plain Python.

The gguf package makes an array of every word of the vocabulary: 7 seconds for 150,000 words and their merges, where
this takes a tenth. It also refuses a file whose types are newer than it is.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from reapc.errors import ReapcError
from reapc.formats.gguf_types import ALIGNMENT_BYTES, TYPES

_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
_STRING, _ARRAY = 8, 9
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEPT_VALUES = 4096  # of an array: one or a few for each layer; longer ones are vocabularies
# ggml.h: the numbers of the types (4, 5 and 31 to 38 but TQ are gone).
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in _TYPE_NAMES.items()}
_SIZES = {
    **{name: (kind.block, kind.block_bytes) for name, kind in TYPES.items()},
    "Q8_1": (32, 40), "Q8_K": (256, 292), "I8": (1, 1), "I16": (1, 2), "I64": (1, 8), "F64": (1, 8),
}  # fmt: skip


class GgufTensorInfo(NamedTuple):
    """One tensor: its shape as numpy reads it (row last), its type, the bytes of its data and where these begin in
    their file."""

    name: str
    shape: tuple[int, ...]
    type: str
    data_bytes: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """One file. ``fields`` holds no strings of arrays, and no long arrays (None stands for them). ``values``: where
    each of them lies, its type before it (start, end offsets). ``order``: the byte order, "<" or ">"."""

    path: Path
    order: str
    version: int
    fields: dict[str, Any]
    values: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensorInfo, ...]


@dataclass(frozen=True)
class GgufHeader:
    """All parts of a model; the first part's ``fields`` win."""

    path: Path
    files: tuple[GgufFile, ...]
    fields: dict[str, Any]
    tensors: tuple[GgufTensorInfo, ...]

    @property
    def parts(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self.files)


def part_names(path: Path) -> tuple[Path, ...]:
    """The names of all parts, the first one first, where ``path`` is named as one of several; else itself."""
    match = _SHARD.match(path.name)
    if not match:
        return (path,)
    return tuple(path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1))


def shards(path: Path) -> tuple[Path, ...]:
    """All parts of a file that may be split in several; ReapcError names one that is missing."""
    paths = part_names(path)
    if not paths:
        raise ReapcError(f"{path}: no part is numbered 0 of 0")
    for part in paths:
        if not part.is_file():
            if len(paths) == 1:
                raise ReapcError(f"{part}: no such file")
            raise ReapcError(f"{part}: this part of {path.name} is missing", hint="download all parts")
    return paths


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensors of all parts. ReapcError where one is damaged."""
    files = tuple(_read(part) for part in shards(path))
    fields = {key: value for file in reversed(files) for key, value in file.fields.items()}
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    expected = fields.get("split.tensors.count", len(tensors)) if len(files) > 1 else len(tensors)
    if expected != len(tensors) or len({tensor.name for tensor in tensors}) != len(tensors):
        raise ReapcError(
            f"{path}: its {len(files)} parts hold {len(tensors)} tensors, and {expected} different ones are expected",
            hint="parts of other files? download all of them again",
        )
    return GgufHeader(path, files, fields, tensors)


def _read(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(4) != b"GGUF":
                raise ReapcError(f"{path}: not a readable GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data, size).header()
    except (StructError, UnicodeDecodeError, OverflowError) as error:
        raise ReapcError(
            f"{path}: not a readable GGUF file: its header is cut short or damaged ({error})", hint="download it again"
        ) from error


class _Cursor:
    """Reads the header of one file from its start."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4
        version = Struct("<I").unpack_from(data, 4)[0]
        self.order = "<" if version < 1 << 16 else ">"
        self.numbers = {kind: Struct(self.order + letter) for kind, letter in VALUES.items()}
        self.version = self.number(4)
        if self.version not in (2, 3):
            raise ReapcError(
                f"{path}: not a readable GGUF file: version {self.version}, 2 or 3 expected",
                hint="convert it again with a current llama.cpp" if self.version == 1 else "",
            )

    def number(self, kind: int) -> Any:
        struct = self.numbers[kind]
        value = struct.unpack_from(self.data, self.at)[0]
        self.at += struct.size
        return value

    def text(self, named: bool = False) -> str:
        length: int = self.number(10)
        if not length and named:
            raise StructError(f"an empty name at {self.at}")
        if length > self.size - self.at:
            raise StructError(f"a text of {length} bytes at {self.at} of {self.size}")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "strict")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in self.numbers:
                raise StructError(f"a value of type {kind} at {self.at}")
            return self.number(kind)
        item, count = self.number(4), self.number(10)
        if item == _STRING:
            return self.skip_texts(count)
        if item == _ARRAY:
            for _ in range(count):
                self.value(_ARRAY)
            return None
        if item not in self.numbers:
            raise StructError(f"an array of type {item} at {self.at}")
        start, width = self.at, self.numbers[item].size
        if count * width > self.size - start:
            raise StructError(f"an array of {count} values at {start} of {self.size} bytes")
        self.at += count * width
        if count > _KEPT_VALUES:
            return None
        return list(Struct(f"{self.order}{count}{VALUES[item]}").unpack_from(self.data, start))

    def skip_texts(self, count: int) -> None:
        """Steps over an array of texts: only their lengths are read."""
        read, data, at = self.numbers[10].unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + read(data, at)[0]
        self.at = at

    def header(self) -> GgufFile:
        count, keys = self.number(10), self.number(10)
        fields, values = {}, {}
        for _ in range(keys):
            key, start = self.text(named=True), self.at
            fields[key] = self.value(self.number(4))
            values[key] = (start, self.at)
        listed = [self.tensor() for _ in range(count)]
        alignment = fields.get("general.alignment", ALIGNMENT_BYTES) or ALIGNMENT_BYTES
        base = -(-self.at // alignment) * alignment
        tensors = tuple(tensor._replace(start=base + tensor.start) for tensor in listed)
        end = max((tensor.start + tensor.data_bytes for tensor in tensors), default=0)
        if end > self.size:
            raise ReapcError(
                f"{self.path}: cut short: {self.size:,} bytes, and its header says {end:,}", hint="download it again"
            )
        return GgufFile(self.path, self.order, self.version, fields, values, tensors)

    def tensor(self) -> GgufTensorInfo:
        """One tensor, its start counted from where the data begin."""
        name, axes = self.text(named=True), self.number(4)
        if axes > 8:
            raise StructError(f"{name!r} has {axes} axes")
        shape = tuple(self.number(10) for _ in range(axes))[::-1]
        kind, offset = self.number(4), self.number(10)
        if kind not in _TYPE_NAMES:
            raise ReapcError(
                f"{self.path}: {name}: storage type {kind} is not known", hint="a newer llama.cpp, or a fork, wrote it"
            )
        block, size = _SIZES[_TYPE_NAMES[kind]]
        if (shape[-1] if shape else 1) % block:
            raise StructError(f"{name!r} of {shape}: its rows are no whole numbers of {_TYPE_NAMES[kind]} blocks")
        return GgufTensorInfo(name, shape, _TYPE_NAMES[kind], prod(shape) // block * size, offset)
