"""What is published of a quantizer's output: its packed linears, and everything else as the source has it.

A quantizer saves a model as it loaded it: renamed config keys, a new tokenizer file, kept tensors cast to another
dtype, its own notes. So nothing but the packed tensors is taken from its folder, each one checked against the shape
that the format predicts; kept tensors, config keys and side files come from the source, and ``quantization_config`` is
written from the layout that the planner sized (``formats/layout.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.checkpoint.atomic import refuse_existing, require_room
from reapc.checkpoint.config import checkpoint_config
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.shards import Shards
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.formats.layout import Part, parts, stored
from reapc.formats.weights import WeightFormat
from reapc.quantize.source import refuse_quantized

if TYPE_CHECKING:
    import torch

Modules = dict[str, WeightFormat | None]


def open_source(source: Path, fmt: WeightFormat, out: Path) -> Checkpoint:
    """The checkpoint; ReapcError where it is quantized already, the format does not divide it, or ``out`` is there."""
    refuse_quantized(checkpoint_config(source), source)  # first: a quantized one lacks the tensors of its 16 bit layout
    checkpoint = Checkpoint(source)
    refuse_existing(out)
    if reason := weights.misfit(fmt, checkpoint.spec):
        raise ReapcError(
            f"{checkpoint.folder}: {fmt.name}: {reason}", hint=weights.dividing_groups(fmt, checkpoint.spec)
        )
    require_room(out.parent, 3 * weights.checkpoint_bytes(fmt, checkpoint.spec), f"the {fmt.label} checkpoint")
    return checkpoint


def linears(checkpoint: Checkpoint, fmt: WeightFormat) -> Modules:
    """The module of every matrix but the embeddings, and the plain format that it gets; None: it stays as it is.

    Routers, head, MTP layers and vision stay. ReapcError where experts are fused on disk or a linear is too narrow
    for the quantizers."""
    found: Modules = {}
    embeddings = set()
    for item in stored(fmt, checkpoint.spec):
        tensor = item.tensor
        if item.format is not None:
            if not tensor.name.endswith(".weight"):
                raise ReapcError(
                    f"{checkpoint.folder}: {tensor.name} holds the experts of a layer in one tensor: this version "
                    "quantizes experts that are stored one by one",
                    exit_code=1,
                )
            if any(side % weights.SIDE for side in tensor.shape):
                raise ReapcError(
                    f"{checkpoint.folder}: {fmt.name}: {tensor.module} is {list(tensor.shape)}: the quantizers take "
                    f"sides that are multiples of {weights.SIDE}",
                    hint="leave the part as it is: NAME+PART=16 (see `reapc formats`), or take FP8 or GGUF",
                )
            found[tensor.module] = item.format
        elif tensor.role == "embedding":
            embeddings.add(tensor.name)
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) == 2 and name.endswith(".weight") and name not in embeddings:
            found.setdefault(name.removesuffix(".weight"), None)
    if not any(found.values()):
        raise ReapcError(f"{checkpoint.folder}: {fmt.name}: every part of the model is left as it is")
    return found


def default_of(fmt: WeightFormat, modules: Modules) -> WeightFormat:
    """The format of a config's top level, from which its lists of exceptions start: the commonest."""
    counts: dict[WeightFormat, int] = {}
    for item in modules.values():
        if item is not None:
            counts[item] = counts.get(item, 0) + 1
    return max(counts, key=lambda item: (counts[item], item.bits == fmt.bits))


def publish(
    checkpoint: Checkpoint, raw: Path, out: Path, modules: Modules, quantization_config: Mapping[str, Any]
) -> None:
    """Writes the published checkpoint to the new folder ``out`` from ``raw``, what the quantizer saved.

    CannotBeDone where a linear was not quantized as planned, or came out damaged."""
    saved = _Raw(raw)
    out.mkdir(parents=True)
    copy_side_files(checkpoint, out)
    config = {**checkpoint.config, "quantization_config": dict(quantization_config)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: dict[str, list[tuple[Slot, bool]]] = {}
    for entry in checkpoint.in_order():
        slots = shards.setdefault(checkpoint.shard_of[entry.name].name, [])
        module = entry.name.removesuffix(".weight")
        fmt = modules.get(module) if entry.name.endswith(".weight") else None
        if fmt is None:
            slots.append((Slot(entry.name, entry.dtype, entry.shape), False))
        else:
            rows, columns = entry.shape
            slots += [(saved.slot(module, part), True) for part in parts(fmt, rows, columns)]
    for name, slots in shards.items():
        tensors = (saved.checked(slot) if packed else checkpoint.tensor(slot.name) for slot, packed in slots)
        write_streamed(out / name, [slot for slot, _ in slots], tensors, checkpoint.metadata[name] or {"format": "pt"})
    if (checkpoint.folder / INDEX).is_file():
        write_index(out, {name: [slot for slot, _ in slots] for name, slots in shards.items()})
    _sync(out)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class _Raw(Shards):
    """The tensors that a quantizer saved."""

    def slot(self, module: str, part: Part) -> Slot:
        """The announced tensor of a packed linear; CannotBeDone where it is missing or has another shape."""
        name = f"{module}.{part.suffix}"
        entry = self.entries.get(name)
        if entry is None:
            left = "it was left unquantized" if f"{module}.weight" in self.entries else "it is not in its output"
            raise CannotBeDone(
                f"the quantizer did not write {name}: {left}",
                hint="this architecture is not one that this version of the quantizer knows; "
                "take another quantize.method or leave the part in 16 bit with NAME+PART=16",
            )
        # AutoRound computes in float32 on a CPU without bf16, and its compressed-tensors then has scales of that.
        dtype = "F16" if entry.dtype == "F32" and "F16" in part.dtypes else entry.dtype
        if entry.shape != part.shape or dtype not in part.dtypes:
            raise CannotBeDone(
                f"the quantizer wrote {name} as {entry.dtype} {list(entry.shape)}, "
                f"{' or '.join(part.dtypes)} {list(part.shape)} was planned"
            )
        return Slot(name, dtype, entry.shape)

    def checked(self, slot: Slot) -> torch.Tensor:
        """The tensor, refused when a scale is not a number or the columns are not in their order."""
        import torch

        tensor = self.stored_tensor(slot.name)
        if slot.dtype == "F16":
            tensor = tensor.to(torch.float16)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CannotBeDone(
                f"the quantizer wrote scales that are no numbers: {slot.name}",
                hint="more calibration text, or GPTQ's damp_percent raised, or another quantize.method",
            )
        if slot.name.endswith(".g_idx") and not bool((tensor[1:] >= tensor[:-1]).all()):
            raise CannotBeDone(f"the quantizer reordered the columns of {slot.name}, which vLLM refuses (desc_act)")
        return tensor


def experts_parts(modules: Modules) -> Iterator[tuple[str, WeightFormat | None]]:
    """The path of each layer's experts ("model.layers.3.mlp.experts") and their one format."""
    seen = set()
    for module, fmt in modules.items():
        head, found, tail = module.rpartition(".experts.")
        if found and tail.split(".", 1)[0].isdigit() and head not in seen:
            seen.add(head)
            yield f"{head}.experts", fmt
