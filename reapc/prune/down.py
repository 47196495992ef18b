"""The down projections of a layer as they are stored: read, rounded, and written with changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.streamed_writer import Slot, write_streamed
from reapc.prune.refit import Basis
from reapc.stream.expert_weights import Stored

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Down:
    """Those of the layer whose tensors begin with ``prefix`` (with the dot), in a float dtype.

    ``checkpoint`` is what the layer computes with; ``source`` whose weights are refitted: the same, or what
    ``checkpoint`` was rounded from. ``coarse``: rounding moves a weight by more than the last bit of a float, so that
    what it did is looked at before it is taken, and what was taken is kept as it is stored (``keep``)."""

    coarse = False

    def __init__(self, checkpoint: Checkpoint, prefix: str, stored: Stored, source: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.source = source or checkpoint
        self.place = stored
        self._name = prefix + stored.name

    def tensor(self, expert: int) -> str:
        """The tensor of the plain checkpoint that the expert's lies in."""
        return self._name.replace("{e}", str(expert))

    def weight(self, expert: int) -> torch.Tensor:
        """(hidden, width) float32: what is refitted."""
        return self._read(self.source, expert)

    def made(self, expert: int) -> torch.Tensor:
        """(hidden, width) float32: what the layer computes with before anything is refitted, less ``weight``."""
        return self._read(self.checkpoint, expert) - self.weight(expert)

    def _read(self, checkpoint: Checkpoint, expert: int) -> torch.Tensor:
        name = self.tensor(expert)
        part = checkpoint.read_expert(name, expert) if self.place.fused else checkpoint.tensor(name)
        return (part.mT if self.place.turned else part).float()

    def rounded(self, expert: int, values: torch.Tensor, basis: Basis) -> tuple[torch.Tensor, Any]:
        """``values`` (hidden, width) as they would be read again, and what ``keep`` takes of them. ``basis``: of what
        the expert's down projection is given."""
        return values.to(_DTYPES[self._kind]).float(), None

    def keep(self, expert: int, packed: Any) -> None:
        """Takes what ``rounded`` gave of an expert for what is written."""

    @property
    def _kind(self) -> str:
        return self.checkpoint.entries[self.tensor(0)].dtype

    def changed(self, changes: np.ndarray) -> int:
        """How many experts become others than they were."""
        return sum(bool(change.any()) for change in changes)

    def write(self, path: Path, changes: np.ndarray) -> None:
        """Writes all weights + ``changes`` (experts, hidden, width) by their names on disk, an expert at a time; of a
        fused tensor as NAME#EXPERT (see ``stored_name``)."""
        experts = range(len(changes))
        names = [f"{self.tensor(e)}#{e}" if self.place.fused else self.tensor(e) for e in experts]
        shape = changes.shape[1:][::-1] if self.place.turned else changes.shape[1:]
        slots = [Slot(name, self._kind, shape) for name in names]
        healed = (self.weight(e) + torch.from_numpy(np.array(changes[e])) for e in experts)
        stored = ((w.mT if self.place.turned else w).to(_DTYPES[self._kind]).contiguous() for w in healed)
        write_streamed(path, slots, stored, {})


def stored_name(name: str) -> str:
    """The checkpoint's tensor that an entry of ``Down.write`` belongs to; those of one tensor follow each other."""
    return name.split("#")[0]
