"""What a rewritten checkpoint keeps of its source beside the weights: tokenizer, templates, generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from reapc.checkpoint.reader import INDEX, Checkpoint

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


def copy_side_files(checkpoint: Checkpoint, folder: Path, left_out: Callable[[str], None] = lambda name: None) -> None:
    """Copies every file of the source that is neither weights nor config.json, byte for byte. ``left_out`` is told of
    weights that are not the checkpoint's own shards."""
    shards = {shard.name for shard in checkpoint.shards}
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith(".") or path.name in (INDEX, "config.json"):
            continue
        if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
            if path.name not in shards:
                left_out(path.name)
        elif path.is_dir():
            ignore = shutil.ignore_patterns(*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES))
            shutil.copytree(path, folder / path.name, ignore=ignore)
        else:
            shutil.copy2(path, folder / path.name)
