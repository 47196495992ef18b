"""Writes the pruned checkpoint: kept experts' bytes are copied, router rows sliced, the config's counts set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerSpec
from reapc.checkpoint.atomic import atomic_path, partial_of, refuse_existing, require_room
from reapc.checkpoint.config import MODELOPT
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.safetensors_file import OutTensor, TensorEntry, write_copied
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import write_index
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.quantization import quantization_config
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.prune.criteria import best_of, check_groups, groups_of, router_norms
from reapc.prune.layout import check_layout
from reapc.prune.lists import FILES, ModuleLists
from reapc.prune.names import Names, Place
from reapc.prune.table import remapped

Mtp = Literal["drop", "prune"]
Kept = dict[int, list[int]]
_GROUP_KEYS = ("n_group", "num_expert_group", "topk_group")
_TABLE_DTYPES = {"I64": "<i8", "I32": "<i4"}


def _sliced(entry: TensorEntry, shard: Path, axis: int, experts: list[int]) -> OutTensor:
    """The tensor with only these ``experts`` on ``axis``: for every index of the axes before it, their byte ranges."""
    count, outer = entry.shape[axis], prod(entry.shape[:axis])
    size = entry.bytes // (outer * count)
    starts = (entry.start + size * (o * count + e) for o in range(outer) for e in experts)
    shape = (*entry.shape[:axis], len(experts), *entry.shape[axis + 1 :])
    return OutTensor(entry.name, entry.dtype, shape, shard, tuple((start, start + size) for start in starts))


def _rewritten(entry: TensorEntry, shard: Path, kept: Kept, place: Place | None, table: Path) -> OutTensor | None:
    """What becomes of one tensor: None when its expert goes. ``table``: the file that a table of experts will be in."""
    whole = OutTensor(entry.name, entry.dtype, entry.shape, shard, ((entry.start, entry.end),))
    if place is None:
        return whole
    experts = kept[place.layer]
    if place.kind == "axis":
        return _sliced(entry, shard, place.axis, experts)
    if place.kind == "table":
        return OutTensor(entry.name, entry.dtype, entry.shape, table, ((0, entry.bytes),))
    if place.expert not in experts:
        return None
    name = f"{place.before}{experts.index(place.expert)}{place.behind}"
    return OutTensor(name, entry.dtype, entry.shape, shard, whole.ranges)


def plan_tensors(checkpoint: Checkpoint, kept: Kept, names: Names, tables: Path) -> dict[str, list[OutTensor]]:
    """The tensors of every shard that stay, in the order of the source's bytes. ``tables`` is the folder of computed
    ones, a file with the tensor's name each."""
    shards: dict[str, list[OutTensor]] = {shard.name: [] for shard in checkpoint.shards}
    for entry in sorted(checkpoint.entries.values(), key=lambda e: e.start):
        if names.is_dropped(entry.name):
            continue
        shard = checkpoint.shard_of[entry.name]
        if out := _rewritten(entry, shard, kept, names.place(entry.name), tables / f".{entry.name}"):
            shards[shard.name].append(out)
    return {name: tensors for name, tensors in shards.items() if tensors}


def check_kept_map(spec: ModelSpec, kept: Mapping[int, list[int]]) -> int:
    """The count that every MoE layer keeps; ReapcError for a map that names a dense layer, leaves one with experts out,
    or is not of equal, rising lists of experts that there are."""
    expected = set(spec.moe_layers) | {layer.index for layer in spec.mtp_layers if layer.is_moe}
    if dense := sorted(set(kept) - expected):
        raise ReapcError(
            f"layer {dense[0]} of this {spec.model_type} model has no experts to keep or to drop",
            hint=f"layers with experts: {_ranges(sorted(expected))}",
        )
    if missing := sorted(set(spec.moe_layers) - set(kept)):
        raise ReapcError(f"which experts of layer {missing[0]} are kept is not said: every MoE layer has to be pruned")
    for layer, experts in kept.items():
        if list(experts) != sorted(set(experts)) or not all(0 <= e < spec.num_experts for e in experts):
            raise ReapcError(
                f"layer {layer}: experts {experts}: rising numbers from 0 to {spec.num_experts - 1} expected"
            )
    counts = sorted({len(experts) for experts in kept.values()})
    if len(counts) != 1:
        raise ReapcError(f"every MoE layer must keep the same number of experts, found {counts}")
    if counts[0] < spec.top_k:
        raise ReapcError(f"{counts[0]} experts are fewer than the top-k of {spec.top_k}")
    return counts[0]


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as "3-5, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in runs)


def kept_with_mtp(
    spec: ModelSpec, kept: Kept, groups: int, norms: Callable[[LayerSpec], NDArray[Any]], progress: Progress
) -> Kept:
    """``kept`` with the MTP layers that it does not speak of; ``norms`` are those of a layer's router rows."""
    count = len(next(iter(kept.values())))
    unseen = [layer for layer in spec.mtp_layers if layer.is_moe and layer.index not in kept]
    if unseen:
        progress.log(
            f"prune: the MTP layers ({len(unseen)}) were not observed: they keep the {count} experts whose router rows "
            "are longest (L2 norm), which is a guess. Drafts may be accepted less often; the output does not suffer, "
            "since every draft is verified"
        )
    found = {layer.index: best_of(norms(layer), count, groups) for layer in unseen}
    return {**kept, **found}


def prune(
    checkpoint: Checkpoint, kept: Kept, out: Path, progress: Progress, *, mtp: Mtp = "drop",
    dissolve_groups: bool = False, values: Mapping[int, NDArray[Any]] | None = None,
) -> int:  # fmt: skip
    """Writes the checkpoint with only the experts ``kept`` (by layer) to the folder ``out``, atomically.

    Tensor bytes are the source's own, quantized ones too. Returns the bytes of all shards. Every other file of the
    source is kept, other weight formats excepted. Layers must keep equal counts: engines read one count per model, and
    so must the groups of a router that limits by group, unless ``dissolve_groups`` makes one group of them.

    ``mtp`` "drop": MTP layers are left out, and the config counts none. "prune": they keep as many experts as the
    others, those of ``kept`` where it names them, else a guess (``router_norms``).
    ``values``: what each expert is worth, (experts,) by layer; only layers that choose by a table (DeepSeek-V4) ask.
    """
    spec = checkpoint.spec
    with_mtp = mtp == "prune"
    names = Names(spec, with_mtp)
    count = check_kept_map(spec, kept)
    check_groups(spec, kept, dissolve_groups)
    if spec.mtp_layers and not with_mtp and not spec.mtp_count_keys:
        raise CannotBeDone(f"{checkpoint.folder}: how {spec.family} states its MTP layers is not known in this version")
    check_layout(checkpoint, names, with_mtp)
    if with_mtp:
        groups = groups_of(spec, dissolve_groups)
        kept = kept_with_mtp(spec, kept, groups, lambda layer: router_norms(checkpoint, layer), progress)
    else:
        kept = {layer: experts for layer, experts in kept.items() if layer in spec.moe_layers}
    config = json.loads((checkpoint.folder / "config.json").read_text())
    files = _json_files(checkpoint, kept, names, with_counts(config, spec, count, with_mtp, dissolve_groups))
    tables = _tables(checkpoint, kept, names, values)
    shards = plan_tensors(checkpoint, kept, names, partial_of(out))
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    refuse_existing(out)
    require_room(out.parent, total, "the pruned checkpoint")
    say(spec, with_mtp, dissolve_groups, progress)
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(
            checkpoint, partial, lambda name: progress.log(f"prune: {name} is not copied: it holds unpruned weights")
        )
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        for name, table in tables.items():
            (partial / f".{name}").write_bytes(table.tobytes())
        written = 0
        with progress.task("prune", total, "B") as advance:
            for name, tensors in shards.items():
                written += write_copied(partial / name, tensors, checkpoint.metadata[name])
                advance(sum(tensor.bytes for tensor in tensors))
        checkpoint.check_unchanged()
        for name in tables:
            (partial / f".{name}").unlink()
        if (checkpoint.folder / INDEX).is_file():
            write_index(partial, shards)
    return written


def say(spec: ModelSpec, with_mtp: bool, dissolve_groups: bool, progress: Progress, where: str = "config.json") -> None:
    """What the user has to know of the result. ``where``: what holds its counts."""
    if spec.mtp_layers and not with_mtp:
        progress.log(
            f"prune: the MTP layers ({len(spec.mtp_layers)}) are left out, and {where} says so "
            f"({', '.join(spec.mtp_count_keys)} = 0): no speculative decoding with the result"
        )
    if spec.n_group > 1 and dissolve_groups:
        progress.log(
            f"prune: the router's {spec.n_group} groups are given up: a token may be sent to any expert, where the "
            f"original looked into {spec.topk_group} groups"
        )


def _section(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The table that a dotted key lies in, and its last part."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config, last


def with_counts(
    config: dict[str, Any], spec: ModelSpec, count: int, with_mtp: bool, dissolve_groups: bool
) -> dict[str, Any]:
    """The parsed config.json ``config`` with ``count`` experts a layer, changed in place; quantization_config as it
    was."""
    values = dict.fromkeys(spec.expert_count_keys, count)
    if not with_mtp:
        values |= dict.fromkeys(spec.mtp_count_keys, 0)
        for key in spec.mtp_list_keys:
            section, last = _section(config, key)
            section[last] = section[last][: spec.num_layers]
    for key, value in values.items():
        section, last = _section(config, key)
        section[last] = value
    if dissolve_groups and spec.n_group > 1:
        section, _ = _section(config, spec.expert_count_keys[0])
        section |= {key: 1 for key in _GROUP_KEYS if section.get(key) is not None}
    return config


def _json_files(checkpoint: Checkpoint, kept: Kept, names: Names, config: dict[str, Any]) -> dict[str, Any]:
    """config.json, and the quantizers' own files beside it, with their lists of modules in the new numbers."""
    files: dict[str, Any] = {"config.json": config}
    stated = quantization_config(checkpoint.config)
    if stated is None:
        return files
    lists = ModuleLists(names, kept, checkpoint.entries, str(checkpoint.folder / "config.json"))
    if quantization_config(config) is not None:
        section = config if config.get("quantization_config") else config["text_config"]
        section["quantization_config"] = lists.rewritten(section["quantization_config"])
    for name in (*FILES, MODELOPT):
        path = checkpoint.folder / name
        if path.is_file():
            whole = json.loads(path.read_text())
            content = whole["quantization"] if name == MODELOPT else whole
            new = lists.rewritten({"quant_method": stated.get("quant_method"), **content})
            own = {key: new[key] for key in content}
            files[name] = {**whole, "quantization": own} if name == MODELOPT else own
    return files


def _tables(
    checkpoint: Checkpoint, kept: Kept, names: Names, values: Mapping[int, NDArray[Any]] | None
) -> dict[str, NDArray[Any]]:
    """Tables from token to experts, in the new numbers, by name."""
    found: dict[str, NDArray[Any]] = {}
    for entry in checkpoint.entries.values():
        place = None if names.is_dropped(entry.name) else names.place(entry.name)
        if place is None or place.kind != "table":
            continue
        where = f"{checkpoint.shard_of[entry.name]}: tensor {entry.name!r}"
        if entry.dtype not in _TABLE_DTYPES:
            raise CannotBeDone(f"{where} is {entry.dtype}: {' or '.join(_TABLE_DTYPES)} expected")
        if values is None or place.layer not in values:
            raise ReapcError(
                f"{where}: which experts take the places of dropped ones depends on what experts of layer "
                f"{place.layer} are worth, and that is not given",
                hint="prune with scores",
            )
        with checkpoint.shard_of[entry.name].open("rb") as file:
            file.seek(entry.start)
            raw = np.frombuffer(file.read(entry.bytes), _TABLE_DTYPES[entry.dtype]).reshape(entry.shape)
        found[entry.name] = remapped(raw, kept[place.layer], values[place.layer], where)
    return found


def check_scores(scores: Scores, checkpoint: Checkpoint, where: Path) -> None:
    """ReapcError unless ``scores`` were observed on ``checkpoint``."""
    spec = checkpoint.spec
    mtp = {layer.index for layer in spec.mtp_layers if layer.is_moe}
    observed = [layer for layer in scores.layers if layer not in mtp]  # of MTP layers there may be scores, or none
    if scores.header["num_experts"] != spec.num_experts or observed != list(spec.moe_layers):
        raise ReapcError(
            f"{where}: scores of {scores.header['model']} with {scores.header['num_experts']} experts in layers "
            f"{scores.layers}; {checkpoint.folder} has {spec.num_experts} in layers {list(spec.moe_layers)}"
        )
    if scores.header["digest"] != checkpoint.digest:
        raise ReapcError(
            f"{where}: these scores were observed on other weights than those of {checkpoint.folder}",
            hint="observe this checkpoint, or use the one that the scores belong to",
        )
