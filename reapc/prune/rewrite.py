"""Writes the pruned checkpoint: kept experts' bytes are copied, router rows sliced, the config's counts set."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from reapc.checkpoint.atomic import atomic_path, require_room
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, TensorEntry, write_copied
from reapc.errors import ReapcError
from reapc.observe.scores import Scores
from reapc.progress import Progress

_EXPERT = re.compile(r"^(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..+)$")
_ROUTER = re.compile(r"^model\.layers\.(\d+)\.mlp\.gate\.")
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


def _rewritten(entry: TensorEntry, shard: Path, kept: dict[int, list[int]]) -> OutTensor | None:
    """What becomes of one tensor: None when its expert goes."""
    match = _EXPERT.match(entry.name)
    if match and int(match[2]) in kept:
        experts, expert = kept[int(match[2])], int(match[3])
        if expert not in experts:
            return None
        name = f"{match[1]}{experts.index(expert)}{match[4]}"
        return OutTensor(name, entry.dtype, entry.shape, shard, ((entry.start, entry.end),))
    if (match := _ROUTER.match(entry.name)) and int(match[1]) in kept:
        experts = kept[int(match[1])]
        row = entry.bytes // entry.shape[0]
        ranges = tuple((entry.start + row * e, entry.start + row * (e + 1)) for e in experts)
        return OutTensor(entry.name, entry.dtype, (len(experts), *entry.shape[1:]), shard, ranges)
    return OutTensor(entry.name, entry.dtype, entry.shape, shard, ((entry.start, entry.end),))


def plan_tensors(checkpoint: Checkpoint, kept: dict[int, list[int]]) -> dict[str, list[OutTensor]]:
    """The tensors of every shard that stay, in the order of the source's bytes."""
    shards: dict[str, list[OutTensor]] = {shard.name: [] for shard in checkpoint.shards}
    for entry in sorted(checkpoint.entries.values(), key=lambda e: e.start):
        shard = checkpoint.shard_of[entry.name]
        if out := _rewritten(entry, shard, kept):
            shards[shard.name].append(out)
    return {name: tensors for name, tensors in shards.items() if tensors}


def prune(checkpoint: Checkpoint, kept: dict[int, list[int]], out: Path, progress: Progress) -> int:
    """Writes the checkpoint with only the experts ``kept`` (by layer) to the folder ``out``, atomically.

    Tensor bytes are the source's own. Returns the bytes of all shards. Every other file of the source is kept,
    other weight formats excepted. Layers must keep equal counts: engines read one count per model.
    """
    counts = {len(experts) for experts in kept.values()}
    if len(counts) != 1 or set(kept) != set(checkpoint.spec.moe_layers):
        raise ReapcError(f"every MoE layer must keep the same number of experts, found {sorted(counts)}")
    shards = plan_tensors(checkpoint, kept)
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another folder")
    require_room(out.parent, total, "the pruned checkpoint")
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        _copy_other_files(checkpoint, partial, progress)
        _write_config(checkpoint, counts.pop(), partial)
        written = 0
        with progress.task("prune", total, "B") as advance:
            for name, tensors in shards.items():
                written += write_copied(partial / name, tensors, checkpoint.metadata[name])
                advance(sum(tensor.bytes for tensor in tensors))
        if (checkpoint.folder / INDEX).is_file():
            weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return written


def _write_config(checkpoint: Checkpoint, count: int, folder: Path) -> None:
    config = json.loads((checkpoint.folder / "config.json").read_text())
    for key in checkpoint.spec.expert_count_keys:
        config[key] = count
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_other_files(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith(".") or path.name in (INDEX, "config.json"):
            continue
        if path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json"):
            if path.name not in {shard.name for shard in checkpoint.shards}:
                progress.log(f"prune: {path.name} is not copied: it holds unpruned weights")
        elif path.is_dir():
            ignore = shutil.ignore_patterns(*(f"*{suffix}" for suffix in _OTHER_WEIGHTS))
            shutil.copytree(path, folder / path.name, ignore=ignore)
        else:
            shutil.copy2(path, folder / path.name)


def check_scores(scores: Scores, checkpoint: Checkpoint, where: Path) -> None:
    """ReapcError unless ``scores`` were observed on ``checkpoint``."""
    spec = checkpoint.spec
    if scores.header["num_experts"] != spec.num_experts or scores.layers != list(spec.moe_layers):
        raise ReapcError(
            f"{where}: scores of {scores.header['model']} with {scores.header['num_experts']} experts in layers "
            f"{scores.layers}; {checkpoint.folder} has {spec.num_experts} in layers {list(spec.moe_layers)}"
        )
    if scores.header["digest"] != checkpoint.digest:
        raise ReapcError(
            f"{where}: these scores were observed on other weights than those of {checkpoint.folder}",
            hint="observe this checkpoint, or use the one that the scores belong to",
        )
