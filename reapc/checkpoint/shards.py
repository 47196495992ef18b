"""A folder of safetensors: which tensor lies in which shard, and tensors one at a time (mapped, not copied)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reapc.checkpoint.safetensors_file import TensorEntry, read_header
from reapc.errors import CannotBeDone, ReapcError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class _State(NamedTuple):
    """What tells one version of a file from another."""

    bytes: int
    modified_ns: int
    inode: int


def _state(path: Path) -> _State | None:
    """None where the file is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _State(found.st_size, found.st_mtime_ns, found.st_ino)


def _difference(before: _State | None, now: _State | None) -> str:
    if before is None or now is None:
        return "it is gone" if now is None else "it was not there"
    if before.bytes != now.bytes:
        return f"{before.bytes} bytes, now {now.bytes}"
    return "another file is in its place" if before.inode != now.inode else "it was written to"


class Shards:
    """Read access to the tensors of a folder as they are stored; headers are validated on opening."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ReapcError(f"{folder}: no such folder", hint="a checkpoint is a folder with config.json")
        self.shards = self._find_shards()
        self.metadata: dict[str, dict[str, str]] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.shard_of: dict[str, Path] = {}
        self._states = {shard: _state(shard) for shard in self.shards}
        for shard in self.shards:
            entries, self.metadata[shard.name] = read_header(shard)
            for name, entry in entries.items():
                if name in self.entries:
                    raise ReapcError(f"{shard}: tensor {name!r} is also in {self.shard_of[name].name}")
                self.entries[name] = entry
                self.shard_of[name] = shard
        self._open: dict[Path, Any] = {}

    def _find_shards(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            single = self.folder / "model.safetensors"
            if not single.is_file():
                raise ReapcError(f"{self.folder}: neither model.safetensors nor {INDEX} is here")
            return [single]
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ReapcError(f"{index}: no readable weight_map ({error})", hint="download it again") from error
        shards = []
        for name in names:
            path = self.folder / name
            if Path(name).name != name or name in ("", ".", ".."):
                raise ReapcError(
                    f"{index}: weight_map names {name!r}, which is outside the checkpoint folder",
                    hint="shards must lie beside the index; do not use this checkpoint",
                )
            if not path.is_file():
                raise ReapcError(f"{index}: names the shard {name!r}, which is missing", hint="download it")
            shards.append(path)
        return shards

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.bytes for entry in self.entries.values())

    def in_order(self) -> list[TensorEntry]:
        """All tensors, shard by shard in the order of their bytes."""
        return sorted(self.entries.values(), key=lambda entry: (self.shard_of[entry.name].name, entry.start))

    def stored_tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped from the file (its pages are the file's, not anonymous memory)."""
        from safetensors import safe_open

        shard = self.shard_of[name]
        self.check_unchanged(shard)
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        result: torch.Tensor = self._open[shard].get_tensor(name)
        return result

    def check_unchanged(self, shard: Path | None = None) -> None:
        """CannotBeDone where ``shard`` (None: any) is not the file that was opened, by size, time and inode: a download
        or a copy that is still under way, or another that took its place."""
        for path in self.shards if shard is None else (shard,):
            before, now = self._states[path], _state(path)
            if before != now:
                raise CannotBeDone(
                    f"{path}: changed while it was read ({_difference(before, now)}): what was read of it before and "
                    "after may belong to two models",
                    hint="wait until nothing writes to this folder any more, and start again",
                )

    def close(self) -> None:
        """Drops the mappings."""
        self._open.clear()
