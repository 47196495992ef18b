"""A quantized checkpoint as one in 16 bit: where another format is wanted than the one that it is published in.

Decoding is exact in float32; the 16 bit that are written round it once more (bfloat16: by 2^-9 of a weight at most).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.checkpoint.atomic import atomic_path, refuse_existing, require_room
from reapc.checkpoint.config import MODELOPT
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.formats.layout import SAFETENSORS, tensors_of
from reapc.progress import Advance, Progress
from reapc.prune.lists import FILES

if TYPE_CHECKING:
    import torch

_HALF = ("BF16", "F16")
_KEYS = ("quantization_config", "expert_dtype")  # what a config says of how its weights are packed


def decode(checkpoint: Checkpoint, out: Path, progress: Progress) -> int:
    """Writes ``checkpoint`` with every quantized linear in 16 bit to the new folder ``out``, atomically; the rest is
    copied. Returns the bytes written. One tensor is in memory at a time. ReapcError where ``out`` exists, or a weight
    is NaN or infinite."""
    refuse_existing(out)
    half = SAFETENSORS.get(checkpoint.spec.dtype, "BF16")
    half = half if half in _HALF else "BF16"
    shapes = {tensor.name: tensor.shape for tensor, _ in tensors_of(checkpoint.spec, mtp=True)}
    of_part = {part: name for name, linear in checkpoint.packed.items() for part in linear.parts.values()}
    shards: dict[str, dict[str, Slot]] = {shard.name: {} for shard in checkpoint.shards}
    done: set[str] = set()
    for entry in checkpoint.in_order():
        name = of_part.get(entry.name, entry.name)
        if name not in done:  # a linear is written where its first part lies
            done.add(name)
            packed = name in checkpoint.packed
            slot = Slot(name, half, shapes[name]) if packed else Slot(name, entry.dtype, entry.shape)
            shards[checkpoint.shard_of[entry.name].name][name] = slot
    shards = {name: slots for name, slots in shards.items() if slots}
    total = sum(slot.bytes for slots in shards.values() for slot in slots.values())
    require_room(out.parent, total, "the checkpoint decoded to 16 bit")
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(checkpoint, partial)
        for name in (*FILES, MODELOPT):
            (partial / name).unlink(missing_ok=True)
        (partial / "config.json").write_text(json.dumps(_plain(checkpoint.config), indent=2) + "\n")
        written = 0
        with progress.task("decode to 16 bit", total, "B") as advance:
            for shard, slots in shards.items():
                tensors = _tensors(checkpoint, list(slots.values()), advance)
                metadata = checkpoint.metadata[shard] or {"format": "pt"}
                written += write_streamed(partial / shard, list(slots.values()), tensors, metadata)
        if (checkpoint.folder / INDEX).is_file():
            write_index(partial, {name: list(slots.values()) for name, slots in shards.items()})
    return written


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    config = deepcopy(config)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for key in _KEYS:
                section.pop(key, None)
    return config


def _tensors(checkpoint: Checkpoint, slots: list[Slot], advance: Advance) -> Iterator[torch.Tensor]:
    import torch

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    for slot in slots:
        if slot.name in checkpoint.packed:
            yield checkpoint.checked_tensor(slot.name).to(kinds[slot.dtype])
        else:
            yield checkpoint.stored_tensor(slot.name)
        advance(slot.bytes)
