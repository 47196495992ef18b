"""A checkpoint folder: which tensor lies in which shard, and tensors one at a time (mapped, not copied)."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.arch import ModelSpec, load_config, model_spec
from reapc.checkpoint.safetensors_file import TensorEntry, read_header
from reapc.errors import ReapcError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_SAMPLE = 1 << 20
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


class Checkpoint:
    """Read access to a folder with config.json and safetensors; validated on opening."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ReapcError(f"{folder}: no such folder", hint="a checkpoint is a folder with config.json")
        self.config = load_config(folder)
        self.spec: ModelSpec = model_spec(self.config, str(folder / "config.json"))
        self.shards = self._find_shards()
        self.metadata: dict[str, dict[str, str]] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.shard_of: dict[str, Path] = {}
        for shard in self.shards:
            entries, self.metadata[shard.name] = read_header(shard)
            for name, entry in entries.items():
                if name in self.entries:
                    raise ReapcError(f"{shard}: tensor {name!r} is also in {self.shard_of[name].name}")
                self.entries[name] = entry
                self.shard_of[name] = shard
        self._check_names()
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

    def _check_names(self) -> None:
        """Every tensor that the config implies must be there, with its shape."""
        where = self.folder
        for tensor in self.spec.tensors():
            entry = self.entries.get(tensor.name)
            if entry is None:
                raise ReapcError(f"{where}: tensor {tensor.name!r} is missing", hint="the download is incomplete")
            if entry.shape != tensor.shape:
                raise ReapcError(
                    f"{self.shard_of[tensor.name]}: tensor {tensor.name!r} has shape {list(entry.shape)}, "
                    f"config.json implies {list(tensor.shape)}"
                )

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.bytes for entry in self.entries.values())

    @cached_property
    def digest(self) -> str:
        """Identity of config and weights: headers and sizes of all shards, and their content (shards beyond
        1 GiB: sixteen evenly spaced mebibytes, so that naming a 700 GB model takes seconds)."""
        result = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            size = shard.stat().st_size
            result.update(f"{shard.name}:{size}:".encode())
            with shard.open("rb") as file:
                if size <= 1 << 30:
                    while block := file.read(_SAMPLE):
                        result.update(block)
                else:
                    for i in range(16):
                        file.seek((size - _SAMPLE) * i // 15)
                        result.update(file.read(_SAMPLE))
        return result.hexdigest()

    @cached_property
    def side_digest(self) -> str:
        """Identity of the other small files (tokenizer, chat template, generation config)."""
        result = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in _SIDE_FILES and path.name != INDEX:
                result.update(path.name.encode() + b"\0" + path.read_bytes())
        return result.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped from the file (its pages are the file's, not anonymous memory)."""
        from safetensors import safe_open

        shard = self.shard_of[name]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        result: torch.Tensor = self._open[shard].get_tensor(name)
        return result

    def checked_tensor(self, name: str) -> torch.Tensor:
        """``tensor(name)``, refused by name when it holds NaN or infinity."""
        import torch

        tensor = self.tensor(name)
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ReapcError(
                    f"{self.shard_of[name]}: tensor {name!r} holds NaN or infinite weights",
                    hint="the checkpoint is damaged; scores and quantization would be meaningless",
                )
        return tensor

    def close(self) -> None:
        """Drops the mappings."""
        self._open.clear()
