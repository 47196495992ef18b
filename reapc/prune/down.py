"""The down projections of a layer as they are stored: read, rounded, and written with changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.streamed_writer import Slot, write_streamed
from reapc.stream.expert_weights import Stored

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Down:
    """Those of the layer whose tensors begin with ``prefix`` (with the dot)."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, stored: Stored) -> None:
        self._checkpoint = checkpoint
        self._name = prefix + stored.name
        self._stored = stored
        self._kind = checkpoint.entries[self._tensor(0)].dtype

    def _tensor(self, expert: int) -> str:
        """The tensor on disk that the expert's lies in."""
        return self._name.replace("{e}", str(expert))

    def weight(self, expert: int) -> torch.Tensor:
        """(hidden, width) float32."""
        tensor = self._checkpoint.tensor(self._tensor(expert))
        part = tensor[expert] if self._stored.fused else tensor
        return (part.mT if self._stored.turned else part).float()

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """As they would be read again."""
        return values.to(_DTYPES[self._kind]).float()

    def write(self, path: Path, changes: np.ndarray) -> None:
        """Writes all weights + ``changes`` (experts, hidden, width) by their names on disk, an expert at a time; of a
        fused tensor as NAME#EXPERT (see ``stored_name``)."""
        experts = range(len(changes))
        names = [f"{self._tensor(e)}#{e}" if self._stored.fused else self._tensor(e) for e in experts]
        shape = changes.shape[1:][::-1] if self._stored.turned else changes.shape[1:]
        slots = [Slot(name, self._kind, shape) for name in names]
        healed = (self.weight(e) + torch.from_numpy(np.array(changes[e])) for e in experts)
        stored = ((w.mT if self._stored.turned else w).to(_DTYPES[self._kind]).contiguous() for w in healed)
        write_streamed(path, slots, stored, {})


def stored_name(name: str) -> str:
    """The checkpoint's tensor that an entry of ``Down.write`` belongs to; those of one tensor follow each other."""
    return name.split("#")[0]
