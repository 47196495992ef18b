"""A quantized checkpoint to be healed: the refitted down projections leave in the packing that they came in, or in the
16 bit that the format leaves them in; every other tensor is copied as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.decode import decode
from reapc.checkpoint.packed import PackedLinear
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.streamed_writer import Slot, write_streamed
from reapc.prune.down import Down
from reapc.prune.forms import down_place, write_with
from reapc.prune.refit import Basis
from reapc.quantize.encode import INTEGERS, Parts, check_packing, encode
from reapc.quantize.feedback import damped_inverse
from reapc.stream.expert_weights import Stored


class PackedDown(Down):
    """Those of one layer, packed; what is kept of each expert are the tensors that change, by their names on disk."""

    coarse = True

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, stored: Stored, source: Checkpoint | None, work: Path
    ) -> None:
        super().__init__(checkpoint, prefix, stored, source)
        self._path = work / "packed.bin"
        self._packed: np.memmap | None = None  # (experts, bytes of what changes of one)
        self._kept: set[int] = set()
        self._changing: dict[str, tuple[torch.dtype, torch.Size]] = {}  # what changes of each expert, in order

    def _linear(self, expert: int) -> PackedLinear:
        return self.checkpoint.packed[self.tensor(expert)]

    def _own(self, expert: int) -> dict[str, tuple[str, bool]]:
        """Names of the expert's parts by what they are, and whether the tensor of that name holds all experts'."""
        linear = self._linear(expert)
        before = f"{expert}.0." if linear.unfused else ""
        shared = bool(linear.experts) and not linear.unfused
        names = {key: name for key, name in linear.parts.items() if key.startswith(before)}
        return {key.removeprefix(before): (name, shared) for key, name in names.items()}

    def rounded(self, expert: int, values: torch.Tensor, basis: Basis) -> tuple[torch.Tensor, Parts]:
        linear = self._linear(expert)
        turned = self.place.turned != linear.transposed
        own = self._read_parts(expert)
        # of a transposed linear the columns are the outputs: no error of theirs can be made up for by others
        feeds_back = linear.packing.method in INTEGERS and not turned
        inverse = damped_inverse(basis.values, basis.vectors) if feeds_back else None
        packed = encode((values.mT if turned else values).contiguous(), linear.packing, own, inverse)
        found = decode({**own, **packed}, linear.packing, *linear.linears[0]).float()
        return (found.mT if turned else found), packed

    def _read_parts(self, expert: int) -> Parts:
        found = {}
        for key, (name, shared) in self._own(expert).items():
            tensor = self.checkpoint.stored_tensor(name)
            found[key] = tensor[expert] if shared else tensor
        return found

    def keep(self, expert: int, packed: Parts) -> None:
        if self._packed is None:
            self._changing = {key: (part.dtype, part.shape) for key, part in packed.items()}
            shape = (self.checkpoint.spec.num_experts, sum(part.nbytes for part in packed.values()))
            self._packed = np.memmap(self._path, np.uint8, "w+", shape=shape)
        octets = [part.contiguous().reshape(-1).view(torch.uint8).numpy() for part in packed.values()]
        self._packed[expert] = np.concatenate(octets)
        self._kept.add(expert)

    def changed(self, changes: np.ndarray) -> int:
        return len(self._kept)

    def _part(self, expert: int, key: str) -> torch.Tensor:
        """What is written: what was kept, or the expert's own."""
        if expert not in self._kept:
            return self._read_parts(expert)[key]
        assert self._packed is not None
        start = 0
        for name, (dtype, shape) in self._changing.items():
            size = shape.numel() * dtype.itemsize
            if name == key:
                octets = np.array(self._packed[expert, start : start + size])
                return torch.from_numpy(octets).view(dtype).reshape(shape)
            start += size
        raise AssertionError(key)

    def write(self, path: Path, changes: np.ndarray) -> None:
        found: list[tuple[Slot, int, str]] = []
        for key, (_, shape) in self._changing.items():
            for expert in range(len(changes)):
                name, shared = self._own(expert)[key]
                if shared or expert in self._kept:  # else its own tensors stay
                    slot = Slot(f"{name}#{expert}" if shared else name, self.checkpoint.entries[name].dtype, (*shape,))
                    found.append((slot, expert, key))
        write_streamed(path, [slot for slot, _, _ in found], (self._part(e, key) for _, e, key in found), {})


class FolderForm:
    """``checkpoint``, quantized or not; ``source``: the 16 bit that it was quantized from, if that is at hand.

    CannotBeDone where the down projections of a layer are in a packing that is not written here."""

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.source = source
        for index in checkpoint.spec.moe_layers:
            linear = checkpoint.packed.get(_first(checkpoint, index))
            if linear is not None:
                check_packing(linear.packing, str(checkpoint.folder))

    @property
    def digest(self) -> str:
        return json.dumps([self.checkpoint.digest, self.source.digest if self.source else None])

    @property
    def bytes(self) -> int:
        return self.checkpoint.bytes

    def down(self, index: int, work: Path) -> Down:
        prefix, stored = down_place(self.checkpoint, index)
        if _first(self.checkpoint, index) in self.checkpoint.packed:
            return PackedDown(self.checkpoint, prefix, stored, self.source, work)
        return Down(self.checkpoint, prefix, stored)  # in the source's own 16 bit

    def write(self, healed: Sequence[Path], out: Path) -> None:
        write_with(self.checkpoint, healed, out)

    def check_unchanged(self) -> None:
        self.checkpoint.check_unchanged()


def _first(checkpoint: Checkpoint, index: int) -> str:
    """The tensor that the down projection of a layer's first expert lies in."""
    prefix, stored = down_place(checkpoint, index)
    return prefix + stored.name.replace("{e}", "0")
