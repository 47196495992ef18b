"""Writes the pruned checkpoint: kept experts' bytes are copied, router rows sliced, the config's counts set."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import atomic_path, require_room
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, TensorEntry, write_copied
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import write_index
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.prune.criteria import groups_of


class _Names:
    """What becomes of a tensor, told by the names in the ModelSpec."""

    def __init__(self, spec: ModelSpec) -> None:
        self._experts: dict[str, int] = {}  # "model.layers.3.mlp.experts." -> 3
        self._rows: dict[str, int] = {}  # tensors with a row for every expert (router, its bias) -> layer
        for layer in spec.layers:
            for group in layer.kind.tensors if layer.is_moe else ():
                if "{e}" in group.name:
                    self._experts[f"{layer.prefix}.{group.name.split('{e}')[0]}"] = layer.index
                elif group.expert_axis == 0:
                    self._rows[f"{layer.prefix}.{group.name}"] = layer.index
                elif group.expert_axis is not None:
                    raise CannotBeDone(
                        f"{layer.prefix}.{group.name}: its experts lie on axis {group.expert_axis}",
                        hint="this version prunes tensors with the experts on their first axis",
                    )
        self._mtp = tuple(f"{layer.prefix}." for layer in spec.mtp_layers)
        self._mtp += tuple(f"{group.name.rsplit('.', 1)[0]}." for group in spec.mtp_outer)

    def is_mtp(self, name: str) -> bool:
        """Whether the tensor belongs to an MTP layer."""
        return name.startswith(self._mtp)

    def expert(self, name: str) -> tuple[int, str, int, str] | None:
        """(layer, what stands before the expert's number, the number, what stands behind it) of an expert's tensor,
        scales of quantized ones included."""
        for digits in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            layer = self._experts.get(name[: digits.start()])
            if layer is not None:
                return layer, name[: digits.start()], int(digits[0]), name[digits.end() :]
        return None

    def rows(self, name: str) -> int | None:
        """The layer of a tensor with a row for every expert."""
        return self._rows.get(name)


def _rewritten(entry: TensorEntry, shard: Path, kept: dict[int, list[int]], names: _Names) -> OutTensor | None:
    """What becomes of one tensor: None when its expert goes, or the MTP layer that it belongs to."""
    if names.is_mtp(entry.name):
        return None
    if found := names.expert(entry.name):
        layer, before, expert, behind = found
        if expert not in kept[layer]:
            return None
        name = f"{before}{kept[layer].index(expert)}{behind}"
        return OutTensor(name, entry.dtype, entry.shape, shard, ((entry.start, entry.end),))
    if (row_layer := names.rows(entry.name)) is not None:
        experts = kept[row_layer]
        row = entry.bytes // entry.shape[0]
        ranges = tuple((entry.start + row * e, entry.start + row * (e + 1)) for e in experts)
        return OutTensor(entry.name, entry.dtype, (len(experts), *entry.shape[1:]), shard, ranges)
    return OutTensor(entry.name, entry.dtype, entry.shape, shard, ((entry.start, entry.end),))


def plan_tensors(checkpoint: Checkpoint, kept: dict[int, list[int]]) -> dict[str, list[OutTensor]]:
    """The tensors of every shard that stay, in the order of the source's bytes."""
    names = _Names(checkpoint.spec)
    shards: dict[str, list[OutTensor]] = {shard.name: [] for shard in checkpoint.shards}
    for entry in sorted(checkpoint.entries.values(), key=lambda e: e.start):
        shard = checkpoint.shard_of[entry.name]
        if out := _rewritten(entry, shard, kept, names):
            shards[shard.name].append(out)
    return {name: tensors for name, tensors in shards.items() if tensors}


def check_groups(spec: ModelSpec, kept: dict[int, list[int]]) -> None:
    """ReapcError where the router's groups cannot hold what is kept.

    The router cuts the kept experts, in their order, into n_group equal parts. Where it chooses among few of them
    (topk_group < n_group), each part must be what is left of one group of the original.
    """
    if spec.n_group == 1:
        return
    size = spec.num_experts // spec.n_group
    for layer, experts in kept.items():
        counts = Counter(e // size for e in experts)
        each, rest = divmod(len(experts), spec.n_group)
        if rest or each < min(size, 2):
            least = min(size, 2) * spec.n_group
            raise ReapcError(
                f"layer {layer}: {len(experts)} experts do not fill the router's {spec.n_group} groups",
                hint=f"keep a multiple of {spec.n_group}, at least {least}",
            )
        if groups_of(spec) > 1 and any(counts[group] != each for group in range(spec.n_group)):
            raise ReapcError(
                f"layer {layer}: the experts kept are {[counts[group] for group in range(spec.n_group)]} of the "
                f"router's {spec.n_group} groups of {size}; it looks into {spec.topk_group} groups for every token and "
                "takes them to be equal",
                hint=f"keep {each} of every group",
            )


def prune(checkpoint: Checkpoint, kept: dict[int, list[int]], out: Path, progress: Progress) -> int:
    """Writes the checkpoint with only the experts ``kept`` (by layer) to the folder ``out``, atomically.

    Tensor bytes are the source's own. Returns the bytes of all shards. Every other file of the source is kept,
    other weight formats excepted. Layers must keep equal counts: engines read one count per model, and so must the
    groups of a router that limits by group. MTP layers are left out, and the config counts none: nothing here runs
    them, so which of their experts matter is not known, and with another layer's choice they would only guess badly.
    """
    checkpoint.refuse_quantized("pruning")
    spec = checkpoint.spec
    counts = {len(experts) for experts in kept.values()}
    if len(counts) != 1 or set(kept) != set(spec.moe_layers):
        raise ReapcError(f"every MoE layer must keep the same number of experts, found {sorted(counts)}")
    check_groups(spec, kept)
    if spec.mtp_layers and not spec.mtp_count_keys:
        raise CannotBeDone(f"{checkpoint.folder}: how {spec.family} states its MTP layers is not known in this version")
    shards = plan_tensors(checkpoint, kept)
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another folder")
    require_room(out.parent, total, "the pruned checkpoint")
    if spec.mtp_layers:
        progress.log(
            f"prune: the MTP layers ({len(spec.mtp_layers)}) are left out, and config.json says so "
            f"({', '.join(spec.mtp_count_keys)} = 0): no speculative decoding with the result"
        )
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(
            checkpoint, partial, lambda name: progress.log(f"prune: {name} is not copied: it holds unpruned weights")
        )
        _write_config(checkpoint, counts.pop(), partial)
        written = 0
        with progress.task("prune", total, "B") as advance:
            for name, tensors in shards.items():
                written += write_copied(partial / name, tensors, checkpoint.metadata[name])
                advance(sum(tensor.bytes for tensor in tensors))
        if (checkpoint.folder / INDEX).is_file():
            write_index(partial, shards)
    return written


def _write_config(checkpoint: Checkpoint, count: int, folder: Path) -> None:
    config = json.loads((checkpoint.folder / "config.json").read_text())
    values = dict.fromkeys(checkpoint.spec.expert_count_keys, count)
    values |= dict.fromkeys(checkpoint.spec.mtp_count_keys, 0)
    for key, value in values.items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
