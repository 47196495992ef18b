"""Records of a source, in an order that the seed decides: lines of JSONL, text files, rows of a hub data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reapc.errors import ReapcError
from reapc.mix import MixSource
from reapc.observe.corpora import hub, logs
from reapc.observe.corpora.presets import find_path, hub_id, no_such_data

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".c", ".h", ".json", ".jsonl")


class Record(NamedTuple):
    """One record; ``where`` is its file and line, or its row."""

    where: str
    value: dict[str, Any]


def records(source: MixSource, base: Path, seed: int) -> Iterator[Record]:
    """The records of ``source``, shuffled by ``seed``, ``limit`` of them at most. ReapcError for a path or line that
    cannot be read, CannotBeDone for a hub data set that is not to be had."""
    path = None if source.source.startswith("hub:") else find_path(source.source, base)
    if path is not None:
        found = _local(path, source, np.random.default_rng(seed))
    elif name := hub_id(source.source):
        found = (Record(f"{source.name}: row {number}", row) for number, row in hub.rows(name, source, seed))
    else:
        raise no_such_data(source.source, base, "source")
    return islice(found, source.limit)


def _local(path: Path, source: MixSource, random: np.random.Generator) -> Iterator[Record]:
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix in TEXT_SUFFIXES]
        if not files:
            raise ReapcError(f"{path}: no text in this folder", hint=f"files that are read: {', '.join(TEXT_SUFFIXES)}")
    index: list[tuple[int, int, int]] = []  # file, offset and number of the line; offset -1: the whole file
    for number, file in enumerate(files):
        if file.suffix == ".jsonl":
            index += [(number, offset, line) for offset, line in _lines(file)]
        else:
            index.append((number, -1, 0))
    if index and (source.format == "log" or (source.format == "auto" and logs.is_log(_read(files, index[0]).value))):
        index = _whole_conversations(files, index)
    for i in random.permutation(len(index)):
        yield _read(files, index[i])


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and number of every line that is not blank: a log of many GB is not held in memory."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield offset, number
            offset += len(line)


def _read(files: list[Path], entry: tuple[int, int, int]) -> Record:
    path, offset, number = files[entry[0]], *entry[1:]
    if offset < 0:
        return Record(str(path), {"text": path.read_text(encoding="utf-8", errors="replace")})
    with path.open("rb") as file:
        file.seek(offset)
        line = file.readline()
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ReapcError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReapcError(f"{path}:{number}: an object is expected, not {type(value).__name__}")
    return Record(f"{path}:{number}", value)


def _whole_conversations(files: list[Path], index: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    def exchanges() -> Iterator[dict[str, Any] | None]:
        for entry in index:
            try:
                yield logs.exchange(_read(files, entry).value)
            except logs.NoSample:
                yield None

    return [entry for entry, stays in zip(index, logs.last_of_each(exchanges()), strict=True) if stays]
