"""Prunes a GGUF file in place of blocks: kept experts' bytes are copied, router rows sliced, the metadata's counts set.

llama.cpp keeps the experts of a layer in one tensor whose outermost axis is theirs (src/models/*.cpp, llama-arch.cpp of
0c1e57098), so an expert is a range of bytes whatever its block type, and nothing is quantized again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reapc.arch.spec import LayerSpec
from reapc.checkpoint.atomic import atomic_path, require_room
from reapc.checkpoint.gguf_header import GgufFile, GgufHeader, GgufTensorInfo, part_names
from reapc.checkpoint.gguf_model import read_model
from reapc.checkpoint.gguf_writer import (
    GgufOutput,
    GgufTensor,
    alignment_of,
    raw_values,
    shortened,
    with_number,
    write_gguf,
)  # fmt: skip
from reapc.engines.llamacpp import fixed_experts
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.scores import Scores
from reapc.progress import Progress
from reapc.prune.criteria import check_groups, groups_of
from reapc.prune.rewrite import Kept, Mtp, check_kept_map, kept_with_mtp, say
from reapc.prune.table import remapped

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Names inside a layer. Of the first the experts are the outermost axis; of the second (hy-v3 writes no ".bias") the
# last, which ERNIE has a 1 before.
_ROWS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)|ffn_gate_inp\.(weight|bias)")
_LAST = re.compile(r"exp_probs_b(_vl)?(\.bias)?")
_TABLE = "ffn_gate_tid2eid.weight"
_WITHOUT_EXPERTS = re.compile(r"ffn_\w+_shexp\.\w+|ffn_norm_exps\.weight|ffn_gate_inp\.scale")  # the last: Gemma-4
_SUSPECT = re.compile(r"exp|gate_inp|tid2eid")
_ROUTER = "ffn_gate_inp.weight"
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# Metadata with a value for every layer (llama.cpp: get_key_or_arr with n_layer_all), and those that are as long by
# chance.
_LAYER_KEYS = frozenset(
    {
        "attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern",
        "attention.recurrent_layers", "attention.indexer.types", "attention.compress_ratios", "expert_used_count",
        "expert_feed_forward_length", "feed_forward_length", "swiglu_clamp_exp", "swiglu_clamp_shexp",
    }
)  # fmt: skip
_OTHER_LISTS = frozenset({"rope.dimension_sections", "rope.scaling.long_factor", "rope.scaling.short_factor"})


@dataclass(frozen=True)
class _Place:
    """Where a tensor's experts are: an axis of it, or its values are their numbers."""

    layer: int
    kind: Literal["axis", "table"]
    axis: int = 0


class GgufSource:
    """A GGUF file (all its parts) to prune. ReapcError and CannotBeDone as ``read_model``'s, and CannotBeDone for
    tensors whose experts are not understood."""

    def __init__(self, path: Path) -> None:
        model = read_model(path)
        self.path, self.spec, self.header = path, model.spec, model.header
        self.marks = self.current_marks()
        self.arch = self.spec.family
        self._files = {tensor.name: file for file in self.header.files for tensor in file.tensors}
        self._tensors = {tensor.name: tensor for tensor in self.header.tensors}
        self._moe = {layer.index for layer in (*self.spec.layers, *self.spec.mtp_layers) if layer.is_moe}
        self.places = {tensor.name: place for tensor in self.header.tensors if (place := self._place(tensor))}
        for layer in sorted(self._moe):
            if f"blk.{layer}.{_ROUTER}" not in self._tensors:
                raise ReapcError(f"{path}: layer {layer} has experts, and no blk.{layer}.{_ROUTER}")

    def _place(self, tensor: GgufTensorInfo) -> _Place | None:
        match = _LAYER.fullmatch(tensor.name)
        if not match or int(match[1]) not in self._moe:
            return None
        layer, name = int(match[1]), match[2]
        if name == _TABLE:
            if tensor.type != "I32" or len(tensor.shape) != 2:
                raise CannotBeDone(f"{self.path}: {tensor.name} is {tensor.type} {list(tensor.shape)}: I32 expected")
            return _Place(layer, "table")
        if _ROWS.fullmatch(name):
            axis = 0
        elif _LAST.fullmatch(name):
            axis = len(tensor.shape) - 1
        elif _SUSPECT.search(name) and not _WITHOUT_EXPERTS.fullmatch(name):
            raise CannotBeDone(
                f"{self.path}: tensor {tensor.name} {list(tensor.shape)} is not one that is known here, and may hold "
                f"something of each of {self.spec.num_experts} experts"
            )
        else:
            return None
        shape = tensor.shape
        if not shape or shape[axis] != self.spec.num_experts or prod(shape[:axis]) != 1:
            raise ReapcError(
                f"{self.path}: {tensor.name} has shape {list(shape)}: {self.spec.num_experts} experts "
                f"({self.arch}.expert_count) on axis {axis} expected"
            )
        return _Place(layer, "axis", axis)

    def current_marks(self) -> list[tuple[int, int]]:
        """Sizes and times of all parts: others than ``marks`` say that a part was changed since it was opened."""
        return [(part.stat().st_size, part.stat().st_mtime_ns) for part in self.header.parts]

    def stored(self, name: str) -> bytes:
        """The bytes of a tensor."""
        tensor, file = self._tensors[name], self._files[name]
        with file.path.open("rb") as opened:
            opened.seek(tensor.start)
            return opened.read(tensor.data_bytes)

    def router(self, layer: int) -> NDArray[np.float32]:
        """The router's weight, (experts, hidden); CannotBeDone where it is quantized."""
        name = f"blk.{layer}.{_ROUTER}"
        tensor, order, raw = self._tensors[name], self._files[name].order, self.stored(name)
        if tensor.type == "BF16":
            values = (np.frombuffer(raw, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
        elif tensor.type in ("F32", "F16"):
            values = np.frombuffer(raw, f"{order}f{4 if tensor.type == 'F32' else 2}").astype(np.float32)
        else:
            raise CannotBeDone(
                f"{self.path}: {name} is {tensor.type}: whether scores belong to it is told by the router's weights, "
                "which llama.cpp leaves in F32"
            )
        return values.reshape(tensor.shape)

    @cached_property
    def router_digest(self) -> str:
        """What ``observe`` stores of the checkpoint that this file was made of (``router_digest`` there)."""
        result = hashlib.sha256()
        for layer in self.spec.moe_layers:
            result.update(self.router(layer).astype("<f4").tobytes())
        return result.hexdigest()

    def table(self, name: str, kept: Kept, values: Mapping[int, NDArray[Any]] | None) -> bytes:
        """A table from token to experts in the new numbers."""
        tensor, place, where = self._tensors[name], self.places[name], f"{self.path}: tensor {name}"
        if values is None or place.layer not in values:
            raise ReapcError(
                f"{where}: which experts take the places of dropped ones depends on what experts of layer "
                f"{place.layer} are worth, and that is not given",
                hint="prune with scores",
            )
        raw = np.frombuffer(self.stored(name), f"{self._files[name].order}i4").reshape(tensor.shape)
        return remapped(raw, kept[place.layer], values[place.layer], where).tobytes()


def check_scores_of_gguf(scores: Scores, source: GgufSource, where: Path) -> None:
    """ReapcError unless ``scores`` were observed on the checkpoint that ``source`` was made of."""
    spec, path = source.spec, source.path
    mtp = {layer.index for layer in spec.mtp_layers}
    observed = [layer for layer in scores.layers if layer not in mtp]
    found = (scores.header["num_experts"], scores.header["top_k"], observed)
    if found != (spec.num_experts, spec.top_k, list(spec.moe_layers)):
        raise ReapcError(
            f"{where}: scores of {scores.header['model']} with {found[0]} experts, top-{found[1]}, in layers "
            f"{found[2]}; {path} has {spec.num_experts}, top-{spec.top_k}, in layers {list(spec.moe_layers)}"
        )
    digest = scores.header.get("router_digest")
    if digest is None:
        raise ReapcError(
            f"{where}: does not say which routers it was observed with: an earlier version of reapc wrote it",
            hint="observe the checkpoint that the GGUF was made of again",
        )
    if digest != source.router_digest:
        raise ReapcError(
            f"{where}: these scores were observed on another model or revision than {path} was made of: the routers' "
            "weights differ",
            hint="observe the very checkpoint that this GGUF was converted from",
        )


def prune_gguf(
    source: GgufSource, kept: Kept, out: Path, progress: Progress, *, mtp: Mtp = "drop",
    dissolve_groups: bool = False, values: Mapping[int, NDArray[Any]] | None = None,
) -> int:  # fmt: skip
    """Writes the GGUF with only the experts ``kept`` (by layer) to ``out``, atomically; options as ``prune``'s.

    Every other tensor and all metadata but the counts are the source's own bytes. A file in several parts becomes one,
    or as many where ``out`` has the name of the first of them. Returns the bytes written.
    """
    spec, with_mtp = source.spec, mtp == "prune"
    count = check_kept_map(spec, kept)
    check_groups(spec, kept, dissolve_groups)
    _check_engine(source, count, dissolve_groups)
    if with_mtp:
        groups = groups_of(spec, dissolve_groups)
        kept = kept_with_mtp(spec, kept, groups, lambda layer: _norms(source, layer), progress)
    outputs = _outputs(source, kept, out, _Counts(source, count, with_mtp, dissolve_groups), values)
    for output in outputs:
        if output.path.exists():
            raise ReapcError(f"{output.path}: exists already", hint="remove it or choose another name")
    require_room(out.parent, sum(output.bytes for output in outputs), "the pruned GGUF")
    say(spec, with_mtp, dissolve_groups, progress, "its metadata")
    total = sum(tensor.bytes for output in outputs for tensor in output.tensors)
    with ExitStack() as stack, progress.task("prune", total, "B") as advance:
        # Renamed from the last to the first: who sees the first part finds all of them.
        written = sum(write_gguf(o, stack.enter_context(atomic_path(o.path)), advance) for o in outputs)
        if source.current_marks() != source.marks:
            raise ReapcError(f"{source.path}: the file was changed while it was read", hint="prune it again")
    return written


def _norms(source: GgufSource, layer: LayerSpec) -> NDArray[Any]:
    """The L2 norm of each expert's row of the router (see ``router_norms``)."""
    norms: NDArray[Any] = np.linalg.norm(source.router(layer.index), axis=1)
    return norms


def _check_engine(source: GgufSource, count: int, dissolve: bool) -> None:
    """CannotBeDone for counts that llama.cpp would compute wrongly with, or stop at."""
    spec, where = source.spec, f"{source.path}: {count} experts"
    if count != spec.num_experts and (reason := fixed_experts(spec)):
        raise CannotBeDone(f"{where} of {spec.num_experts}: {reason}")
    # src/llama-model.cpp: GGML_ASSERT(n_expert_groups < n_expert)
    groups = 1 if dissolve else spec.n_group
    if f"{source.arch}.expert_group_count" in source.header.fields and count <= groups:
        raise CannotBeDone(f"{where}: llama.cpp stops at a model that has no more experts than groups ({groups})")


class _Counts:
    """What the metadata say of a pruned file."""

    def __init__(self, source: GgufSource, count: int, with_mtp: bool, dissolve: bool) -> None:
        self.source, spec = source, source.spec
        self.numbers = {"expert_count": count}
        if dissolve and spec.n_group > 1:
            self.numbers |= {"expert_group_count": 1, "expert_group_used_count": 1}
        self.layers = spec.num_layers + len(spec.mtp_layers)
        self.drops_mtp = bool(spec.mtp_layers) and not with_mtp
        if self.drops_mtp:
            self.layers = spec.num_layers
            self.numbers |= {"block_count": spec.num_layers, "nextn_predict_layers": 0}

    def keeps(self, tensor: GgufTensorInfo) -> bool:
        """Whether the tensor is not one of an MTP layer that is left out."""
        match = _LAYER.fullmatch(tensor.name)
        return match is None or int(match[1]) < self.layers

    def values(self, file: GgufFile, tensors: int, merged: bool) -> dict[str, bytes]:
        """The metadata of a part; ``tensors``: of all parts. ``merged``: all of them become one."""
        values, arch = raw_values(file), f"{self.source.arch}."
        numbers = {arch + key: number for key, number in self.numbers.items()} | {"split.tensors.count": tensors}
        for key in numbers.keys() & values.keys():
            values[key] = with_number(values[key], file.order, numbers[key], f"{file.path}: {key}")
        if self.drops_mtp:
            for key in self._lists(file):
                values[key] = shortened(values[key], file.order, self.layers)
        return {key: value for key, value in values.items() if not merged or key not in _SPLIT_KEYS}

    def _lists(self, file: GgufFile) -> Iterator[str]:
        """The keys of arrays that have a value for each layer, MTP layers among them."""
        spec, arch = self.source.spec, f"{self.source.arch}."
        for key, value in file.fields.items():
            name = key.removeprefix(arch)
            if not key.startswith(arch) or not isinstance(value, list) or name in _OTHER_LISTS:
                continue
            if len(value) == spec.num_layers + len(spec.mtp_layers):
                if name not in _LAYER_KEYS:
                    raise CannotBeDone(
                        f"{file.path}: {key} has {len(value)} values, as many as there are layers: whether to leave "
                        "out the MTP layers' is not known",
                        hint="keep the MTP layers: --mtp prune",
                    )
                yield key


def _outputs(
    source: GgufSource, kept: Kept, out: Path, counts: _Counts, values: Mapping[int, NDArray[Any]] | None
) -> list[GgufOutput]:
    """The files to write."""
    files = source.header.files
    planned = [
        tuple(_pruned(source, file, tensor, kept, values) for tensor in file.tensors if counts.keeps(tensor))
        for file in files
    ]
    total = sum(len(tensors) for tensors in planned)
    names = _names(out, source.header)
    merged = len(names) < len(files)
    if merged:
        planned = [tuple(tensor for tensors in planned for tensor in tensors)]
    return [
        GgufOutput(path, counts.values(file, total, merged), tensors, alignment_of(file), file.order, file.version)
        for path, file, tensors in zip(names, files, planned, strict=False)
    ]


def _names(out: Path, header: GgufHeader) -> list[Path]:
    """The files that are written: one, or where ``out`` is named as the first of several, as many as were read."""
    if out.suffix != ".gguf":
        raise ReapcError(f"--out {out}: a name that ends in .gguf is expected", hint=f"--out {out}.gguf")
    names, parts = part_names(out), len(header.files)
    if names[:1] != (out,) or len(names) not in (1, parts):
        raise ReapcError(
            f"--out {out}: {header.path} has {parts} part{'s' * (parts > 1)}",
            hint=f"NAME-00001-of-{parts:05}.gguf for as many, or NAME.gguf for one file"
            if parts > 1
            else "NAME.gguf; llama-gguf-split cuts it afterwards",
        )
    return list(names)


def _pruned(
    source: GgufSource, file: GgufFile, tensor: GgufTensorInfo, kept: Kept, values: Mapping[int, NDArray[Any]] | None
) -> GgufTensor:
    """What becomes of a tensor."""
    name, start, size = tensor.name, tensor.start, tensor.data_bytes
    place = source.places.get(name)
    if place is None:
        return GgufTensor(name, tensor.type, tensor.shape, file.path, ((start, start + size),))
    if place.kind == "table":
        return GgufTensor(name, tensor.type, tensor.shape, file.path, data=source.table(name, kept, values))
    experts, each = kept[place.layer], size // source.spec.num_experts
    shape = (*tensor.shape[: place.axis], len(experts), *tensor.shape[place.axis + 1 :])
    ranges = tuple((start + each * expert, start + each * (expert + 1)) for expert in experts)
    return GgufTensor(name, tensor.type, shape, file.path, ranges)
