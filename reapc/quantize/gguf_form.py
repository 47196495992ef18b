"""A quantized GGUF to be healed: the refitted down projections are rounded by ggml to the types that they have in the
file, with the same importance, and written in their places; every other byte is the file's own."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors import safe_open

from reapc.checkpoint.atomic import atomic_path
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.streamed_writer import Slot, write_streamed
from reapc.errors import CannotBeDone
from reapc.prune.down import Down
from reapc.prune.forms import down_place
from reapc.prune.refit import Basis
from reapc.quantize.ggml import quantized
from reapc.quantize.gguf_view import GgufView, importance_of
from reapc.stream.expert_weights import expert_places

DOWN = "ffn_down_exps.weight"
_SAMPLE = 1 << 20


class GgufDown(Down):
    """Those of one layer; what is kept of each expert are its blocks."""

    coarse = True

    def __init__(self, view: GgufView, index: int, source: Checkpoint, work: Path) -> None:
        super().__init__(view, *down_place(view, index), source)
        self._file_name = f"blk.{index}.{DOWN}"
        self._stored, self._view = view.stored[self._file_name], view
        self._blocks = np.memmap(work / "blocks.bin", np.uint8, "w+", shape=_bytes_of(self._stored))
        self._kept: set[int] = set()

    def rounded(self, expert: int, values: torch.Tensor, basis: Basis) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        kind = self._stored.tensor_type
        weights = importance_of(self._view.importance, self._file_name, expert)
        blocks = quantized(values.numpy(), kind.name, weights, os.cpu_count() or 1)
        return torch.from_numpy(dequantize(blocks, kind)), blocks

    def keep(self, expert: int, packed: NDArray[np.uint8]) -> None:
        self._blocks[expert] = packed
        self._kept.add(expert)

    def changed(self, changes: np.ndarray) -> int:
        return len(self._kept)

    def write(self, path: Path, changes: np.ndarray) -> None:
        experts = sorted(self._kept)
        slots = [Slot(f"{self._file_name}#{e}", "U8", self._blocks.shape[1:]) for e in experts]
        write_streamed(path, slots, (torch.from_numpy(np.array(self._blocks[e])) for e in experts), {})


class GgufForm:
    """The GGUF ``file``, quantized from the checkpoint ``source``, with ``imatrix`` where it was with one. ``work``: a
    folder for one layer of it in float32.

    CannotBeDone where the experts' down projections do not lie in the file as they do in the checkpoint."""

    def __init__(self, source: Path, file: Path, imatrix: Path | None, work: Path) -> None:
        self.source = Checkpoint(source)
        self.file = file
        self.view = GgufView(source, file, imatrix, work)
        self.checkpoint: Checkpoint = self.view
        self._imatrix = imatrix
        self._state = _state(file)
        spec = self.source.spec
        for index in spec.moe_layers:
            width = expert_places(spec.layers[index].kind).width
            shape = [spec.num_experts, spec.hidden_size, width]
            stored = self.view.stored.get(f"blk.{index}.{DOWN}")
            found = stored and [int(size) for size in reversed(stored.shape)]
            if found != shape:
                raise CannotBeDone(
                    f"{file}: blk.{index}.{DOWN} is {found or 'not there'}, {shape} expected: its experts are not "
                    f"stored as in {source}, and cannot be healed",
                    hint="set quantize.heal = false",
                )

    @property
    def digest(self) -> str:
        result = hashlib.sha256(self.source.digest.encode())
        for path in (self.file, *([self._imatrix] if self._imatrix else [])):
            result.update(f"{path.stat().st_size}:".encode())
            with path.open("rb") as file:
                while block := file.read(_SAMPLE):
                    result.update(block)
        return result.hexdigest()

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size

    def down(self, index: int, work: Path) -> Down:
        return GgufDown(self.view, index, self.source, work)

    def write(self, healed: Sequence[Path], out: Path) -> None:
        with atomic_path(out) as partial:
            shutil.copyfile(self.file, partial)
            with partial.open("r+b") as file:
                for path in healed:
                    with safe_open(path, framework="numpy") as blocks:
                        for entry in blocks.keys():  # noqa: SIM118 (not a mapping)
                            name, _, expert = entry.partition("#")
                            values = blocks.get_tensor(entry)
                            file.seek(int(self.view.stored[name].data_offset) + int(expert) * values.nbytes)
                            file.write(values.data)
                file.flush()
                os.fsync(file.fileno())

    def check_unchanged(self) -> None:
        self.source.check_unchanged()
        if _state(self.file) != self._state:
            raise CannotBeDone(f"{self.file}: changed while it was read", hint="start again")


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _bytes_of(tensor: gguf.ReaderTensor) -> tuple[int, int, int]:
    """(experts, rows, bytes of a row)."""
    columns, rows, experts = (int(size) for size in tensor.shape)
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    return experts, rows, columns // block * size
