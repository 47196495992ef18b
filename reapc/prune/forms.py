"""What is healed, whatever form it is stored in: a folder (quantize/folder_form.py) or a GGUF file (gguf_form.py)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from reapc.checkpoint.atomic import atomic_path
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, read_header, write_copied
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import write_index
from reapc.prune.down import Down, stored_name
from reapc.stream.expert_weights import Stored, expert_places
from reapc.stream.families import FAMILIES


class Form(Protocol):
    """``checkpoint``: what the model computes with, to be read."""

    checkpoint: Checkpoint

    @property
    def digest(self) -> str:
        """Identity of everything that healing depends on."""

    @property
    def bytes(self) -> int:
        """Of what ``write`` writes."""

    def down(self, index: int, work: Path) -> Down:
        """The down projections of a layer; ``work``: a folder for what is kept of them until they are written."""

    def write(self, healed: Sequence[Path], out: Path) -> None:
        """Writes the model to ``out``, atomically, with what ``Down.write`` left in the files ``healed``."""

    def check_unchanged(self) -> None:
        """CannotBeDone where a file is not the one that was opened any more."""


def down_place(checkpoint: Checkpoint, index: int) -> tuple[str, Stored]:
    """What the names of a layer's tensors begin with, and where its down projections lie."""
    layer = checkpoint.spec.layers[index]
    places = expert_places(layer.kind, FAMILIES[checkpoint.spec.family].transposed)
    return f"{layer.prefix}.", places.parts["down"]


def write_with(pruned: Checkpoint, healed: Sequence[Path], out: Path) -> None:
    """Writes the folder ``out``: ``pruned`` with the tensors of the files ``healed`` in the place of its own."""
    replaced: dict[str, tuple[Path, list[tuple[int, int]]]] = {}
    for path in healed:
        for entry in sorted(read_header(path)[0].values(), key=lambda e: e.start):
            replaced.setdefault(stored_name(entry.name), (path, []))[1].append((entry.start, entry.end))
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(pruned, partial)
        shutil.copyfile(pruned.folder / "config.json", partial / "config.json")
        shards: dict[str, list[OutTensor]] = {shard.name: [] for shard in pruned.shards}
        for entry in pruned.in_order():
            own = pruned.shard_of[entry.name]
            source, ranges = replaced.get(entry.name, (own, [(entry.start, entry.end)]))
            shards[own.name].append(OutTensor(entry.name, entry.dtype, entry.shape, source, tuple(ranges)))
        for name, tensors in shards.items():
            write_copied(partial / name, tensors, pruned.metadata[name])
        if (pruned.folder / INDEX).is_file():
            write_index(partial, shards)
