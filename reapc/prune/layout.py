"""Checks, before a byte is copied, that every tensor with experts is one whose pruning is understood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from reapc.arch.spec import LayerSpec, TensorGroup, TensorSpec
from reapc.checkpoint.reader import Checkpoint, several
from reapc.checkpoint.safetensors_file import DTYPE_BYTES, TensorEntry
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import linear_modules
from reapc.formats.quantization import quantization_config
from reapc.prune.names import Names, is_complete, known_parts, moe_layers


def quantization_method(checkpoint: Checkpoint) -> str | None:
    """``quant_method`` of the checkpoint, None where it is not quantized."""
    config = quantization_config(checkpoint.config)
    return None if config is None else str(config.get("quant_method"))


def check_layout(checkpoint: Checkpoint, names: Names, mtp: bool) -> None:
    """ReapcError lists the tensors that are missing or have another shape than the config implies; CannotBeDone names
    one whose experts are not understood."""
    where = str(checkpoint.folder / "config.json")
    parts = known_parts(quantization_method(checkpoint), where)
    present: dict[str, set[str]] = defaultdict(set)  # module -> the ends of its tensors' names
    for name in checkpoint.entries:
        module, _, end = name.rpartition(".")
        present[module].add(end)
    problems = [problem for layer in checkpoint.spec.layers for problem in _problems(checkpoint, layer, present)]
    in_mtp = len(problems)
    if mtp:
        problems += [p for layer in checkpoint.spec.mtp_layers for p in _problems(checkpoint, layer, present)]
    if problems:
        hint = "the download is incomplete, or config.json belongs to another checkpoint"
        if not in_mtp:
            hint = 'its MTP layers are not whole: leave them out (mtp = "drop")'
        raise ReapcError(f"{checkpoint.folder}: {several(problems)}", hint=hint)
    for entry in checkpoint.entries.values():
        if not names.is_dropped(entry.name):
            _check_entry(checkpoint.shard_of[entry.name], entry, names, parts)
    _check_strangers(checkpoint, names, mtp)


def _check_entry(shard: Path, entry: TensorEntry, names: Names, parts: tuple[str, ...]) -> None:
    """CannotBeDone unless the tensor's experts lie as its name says."""
    place, count = names.place(entry.name), names.spec.num_experts
    if place is None or place.kind == "table":
        return
    if place.kind == "one":
        end = entry.name.rpartition(".")[2]
        if end not in parts:
            raise CannotBeDone(
                f"{shard}: tensor {entry.name!r}: an expert's {end!r} is not known here: {', '.join(parts)} expected"
            )
        if place.expert >= count:
            raise ReapcError(f"{shard}: tensor {entry.name!r}: config.json states {count} experts, from 0 on")
        return
    axis = place.axis
    if not place.exact and axis != 0:
        raise CannotBeDone(f"{shard}: tensor {entry.name!r}: quantized, with the experts of its weight on axis {axis}")
    if len(entry.shape) <= axis or entry.shape[axis] != count:
        raise CannotBeDone(
            f"{shard}: tensor {entry.name!r} has shape {list(entry.shape)}: {count} experts on axis {axis} expected"
        )
    if place.exact and DTYPE_BYTES[entry.dtype] < 2 and "router" in _role(names, entry.name):
        raise CannotBeDone(f"{shard}: tensor {entry.name!r} is {entry.dtype}: a quantized router cannot be pruned")


def _role(names: Names, name: str) -> str:
    """The role of a tensor that the ModelSpec names."""
    for layer in (*names.spec.layers, *names.spec.mtp_layers):
        if name.startswith(f"{layer.prefix}."):
            for group in layer.kind.tensors:
                if f"{layer.prefix}.{group.name}" == name:
                    return group.role
    return ""


def _problems(checkpoint: Checkpoint, layer: LayerSpec, present: dict[str, set[str]]) -> Iterator[str]:
    """What a layer lacks, or has in another shape, as words."""
    count = checkpoint.spec.num_experts
    for group in layer.kind.tensors:
        for tensor in group.expand(f"{layer.prefix}.", count, layer.index):
            entry = checkpoint.entries.get(tensor.name)
            quantized = bool(quantization_config(checkpoint.config)) and bool(group.linears)
            if entry is not None and (entry.shape == tensor.shape or quantized):
                continue
            if entry is not None:
                yield f"tensor {tensor.name!r} has shape {list(entry.shape)}, config.json implies {list(tensor.shape)}"
            elif not (quantized and _is_packed(checkpoint, group, tensor, present)):
                yield f"tensor {tensor.name!r} is missing ({list(tensor.shape)} expected)"


def _is_packed(checkpoint: Checkpoint, group: TensorGroup, tensor: TensorSpec, present: dict[str, set[str]]) -> bool:
    """Whether the linears of a tensor are there in parts."""
    if f"{tensor.name}_blocks" in checkpoint.entries:
        return f"{tensor.name}_scales" in checkpoint.entries
    modules = linear_modules(tensor, group, checkpoint.spec.num_experts)
    return all(is_complete(present.get(module, ())) for module, _ in modules)


def _check_strangers(checkpoint: Checkpoint, names: Names, mtp: bool) -> None:
    """CannotBeDone for a tensor inside a MoE block that has as many rows as there are experts, and that the family does
    not name: it may be one more that has to be cut."""
    spec = checkpoint.spec
    blocks: dict[str, set[str]] = {}  # "model.layers.3.mlp." -> modules and tensors known there
    for layer in moe_layers(spec, mtp):
        known = {f"{layer.prefix}.{group.name}" for group in layer.kind.tensors}
        for group in layer.kind.tensors:
            if group.per_expert or group.names_experts:
                blocks[f"{layer.prefix}.{group.name.split('.')[0]}."] = known
    depth = {prefix.count(".") for prefix in blocks}
    for entry in checkpoint.entries.values():
        if spec.num_experts not in entry.shape or names.place(entry.name) or names.is_dropped(entry.name):
            continue
        words = entry.name.split(".")
        for count in depth:
            found = blocks.get(".".join(words[:count]) + ".")
            module = entry.name.rpartition(".")[0]
            if found is not None and entry.name not in found and f"{module}.weight" not in found:
                raise CannotBeDone(
                    f"{checkpoint.shard_of[entry.name]}: tensor {entry.name!r} {list(entry.shape)} is not one that "
                    f"{spec.family} models are known to have, and may hold a row for each of {spec.num_experts} experts"
                )
