"""A checkpoint with its weights as they stand in a GGUF file that was quantized from it, by the checkpoint's own names.

Of each tensor that the file holds in fewer bits: the file's numbers where they lie as in the checkpoint (told by the
numbers themselves: the converter turns the rows of some around), else the checkpoint's rows rounded by ggml to the type
and with the importance that they have in the file. The rest (norms, routers, what the converter computes anew) stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from reapc.arch.spec import ModelSpec, TensorGroup
from reapc.checkpoint.atomic import atomic_path, remove
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.formats.layout import tensors_of
from reapc.quantize.ggml import rounded

_FLOATS = ("F32", "F16", "BF16")
_ELSEWHERE = 0.9  # of relative error: the same weights are nearer even in one bit, others are off by 1 or more
Importance = Mapping[str, NDArray[np.float32]]


def read_importance(imatrix: Path | None) -> dict[str, NDArray[np.float32]]:
    """Mean squared inputs (matrices, columns) by tensor, of an importance matrix; ones where a matrix saw no token, as
    llama-quantize takes them (tools/quantize/quantize.cpp)."""
    if imatrix is None:
        return {}
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(imatrix)).tensors}
    found = {}
    for name, sums in stored.items():
        if name.endswith(".in_sum2"):
            base = name.removesuffix(".in_sum2")
            counts = stored[f"{base}.counts"].reshape(-1, 1)
            found[base] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    return found


def importance_of(importance: Importance, name: str, matrix: int) -> NDArray[np.float32] | None:
    """(columns,) of one matrix of a tensor; None where there is nothing on it."""
    rows = importance.get(name)
    return None if rows is None else np.ascontiguousarray(rows[matrix if len(rows) > 1 else 0])


@dataclass(frozen=True)
class _Place:
    """A tensor of the checkpoint: its group, the layer (None outside) and the expert whose own it is (None: all's)."""

    group: TensorGroup
    layer: int | None
    expert: int | None


class GgufView(Checkpoint):
    """``folder``: the checkpoint that the GGUF ``file`` was converted and quantized from; ``work``: a folder for one
    layer's weights in float32. ``left``: names that could not be rounded."""

    in_files = False

    def __init__(self, folder: Path, file: Path, imatrix: Path | None, work: Path) -> None:
        super().__init__(folder)
        self.file = file
        self.importance = read_importance(imatrix)
        self.stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
        self.left: set[str] = set()
        self._work = work
        self._units: dict[int | str, list[str]] = {}
        self._ready: dict[int | str, dict[str, torch.Tensor]] = {}

    @cached_property
    def places(self) -> dict[str, _Place]:
        """Every tensor of the checkpoint that is quantized in the file."""
        found: dict[str, _Place] = {}
        for tensor, group in tensors_of(self.spec):
            stored = [self.stored.get(_stored_name(tensor.layer, part.name)) for part in group.gguf]
            if all(part is None or part.tensor_type.name in _FLOATS for part in stored):
                continue
            found[tensor.name] = _Place(group, tensor.layer, tensor.expert)
            self._units.setdefault(tensor.name if tensor.layer is None else tensor.layer, []).append(tensor.name)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """As ``Checkpoint.tensor``; float32, mapped from ``work``, where the file has fewer bits."""
        place = self.places.get(name)
        return super().tensor(name) if place is None else self._made(name, place)

    def _expert(self, name: str, expert: int, device: str | torch.device) -> torch.Tensor:
        place = self.places.get(name)
        return super()._expert(name, expert, device) if place is None else self._made(name, place)[expert]

    def _made(self, name: str, place: _Place) -> torch.Tensor:
        unit = name if place.layer is None else place.layer
        if unit not in self._ready:
            self._make(unit)
        return self._ready[unit][name]

    def _make(self, unit: int | str) -> None:
        """All tensors of a layer, or one outside of them, one after another in a file."""
        names = self._units[unit]
        shapes = {name: self._shape(name) for name in names}
        path = self._path(unit)
        if isinstance(unit, int):  # one layer at a time
            for other in [key for key in self._ready if isinstance(key, int)]:
                del self._ready[other]
                remove(self._path(other))
        with atomic_path(path) as partial:
            whole = np.memmap(partial, np.float32, "w+", shape=(sum(prod(shape) for shape in shapes.values()),))
            start = 0
            for name in names:
                out = whole[start : start + prod(shapes[name])].reshape(shapes[name])
                self._fill(name, out)
                start += out.size
            whole.flush()
        mapped = torch.from_numpy(np.memmap(path, np.float32, "c"))
        ready, start = {}, 0
        for name, shape in shapes.items():
            ready[name] = mapped[start : start + prod(shape)].view(shape)
            start += prod(shape)
        self._ready[unit] = ready

    def _path(self, unit: int | str) -> Path:
        return self._work / f"view-{list(self._units).index(unit)}.bin"

    def _shape(self, name: str) -> tuple[int, ...]:
        place = self.places[name]
        shape = place.group.shape
        return (self.spec.num_experts, *shape) if place.group.expert_axis == 0 else shape

    def _fill(self, name: str, out: NDArray[np.float32]) -> None:
        group, layer, expert = (place := self.places[name]).group, place.layer, place.expert
        if group.expert_axis is None:
            out[:] = self._matrix(name, group, layer, expert, super().tensor(name))
            return
        for number in range(self.spec.num_experts):
            out[number] = self._matrix(name, group, layer, number, super()._expert(name, number, "cpu"))

    def _matrix(
        self, name: str, group: TensorGroup, layer: int | None, expert: int | None, plain: torch.Tensor
    ) -> NDArray[np.float32]:
        """One matrix as it stands in the file; ``plain``: the checkpoint's."""
        own = plain.float().numpy()
        parts = {}
        for part in group.gguf:
            found = self.stored.get(where := _stored_name(layer, part.name))
            if found is None:
                raise ReapcError(f"{self.file}: no tensor {where}: it was not made of {self.folder}")
            parts[where] = found
        size = float(np.square(own, dtype=np.float64).sum())
        for candidate in self._candidates(parts, expert, own.shape):
            error = float(np.square(candidate - own, dtype=np.float64).sum())
            if error <= _ELSEWHERE**2 * size:
                return candidate
        return self._rounded(name, parts, expert or 0, own)

    def _candidates(
        self, parts: Mapping[str, ReaderTensor], expert: int | None, shape: tuple[int, ...]
    ) -> Iterator[NDArray[np.float32]]:
        """The file's numbers in the orders in which they may lie in the checkpoint."""
        if any(name.endswith("attn_k_b.weight") for name in parts):
            keys, values = (_decoded(tensor) for tensor in parts.values())
            yield np.concatenate((keys.transpose(0, 2, 1), values), axis=1).reshape(shape)
            return
        found = [_decoded(tensor, expert) for tensor in parts.values()]
        if sum(part.size for part in found) != prod(shape) or any(part.ndim != 2 for part in found):
            return
        rows = np.concatenate(found)
        for order in (rows, _interleaved(found)):
            if order is not None and order.shape == shape:
                yield order
            if order is not None and order.T.shape == shape:
                yield np.ascontiguousarray(order.T)

    def _rounded(
        self, name: str, parts: Mapping[str, ReaderTensor], matrix: int, own: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The checkpoint's own rows, each rounded alone, so that their order does not matter."""
        types = {tensor.tensor_type.name for tensor in parts.values()}
        columns = {int(tensor.shape[0]) for tensor in parts.values()}
        if len(types) > 1 or columns != {own.shape[-1]} or own.ndim != 2:
            self.left.add(name)
            return own
        weights = importance_of(self.importance, next(iter(parts)), matrix)
        return rounded(own, types.pop(), weights)


def view_bytes(spec: ModelSpec) -> int:
    """Disk that a view takes: the largest layer, the embeddings and the head in float32."""
    layers = (sum(g.parameters(spec.num_experts) for g in layer.kind.tensors) for layer in spec.layers)
    return 4 * (max(layers) + sum(group.parameters(spec.num_experts) for group in spec.outer))


def _stored_name(layer: int | None, part: str) -> str:
    return part if layer is None else f"blk.{layer}.{part}"


def _decoded(tensor: ReaderTensor, expert: int | None = None) -> NDArray[np.float32]:
    """The numbers of a tensor, or of one matrix of it."""
    data = tensor.data if expert is None else tensor.data[expert]
    found: NDArray[np.float32] = dequantize(np.ascontiguousarray(data), tensor.tensor_type)
    return found


def _interleaved(parts: list[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Row by row from two parts in turn, as gpt-oss has gate and up."""
    if len(parts) != 2 or parts[0].shape != parts[1].shape:
        return None
    return np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
