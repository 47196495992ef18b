"""FP8 checkpoints by a plain streaming cast: one tensor in memory at a time, no calibration.

Two layouts, both e4m3 with scales in float32: ``fp8-block`` has a scale per 128 x 128 tile, as DeepSeek, Qwen and GLM
publish (``weight_scale_inv``, quant_method "fp8"); ``fp8`` has one per output channel, compressed-tensors'
"float-quantized" with activations scaled per token as they come, as GLM-4.5-FP8 is published. A scale is the largest
magnitude over 448, the largest number that e4m3 holds (OCP 8-bit floating point specification, E4M3).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.checkpoint.atomic import atomic_path, refuse_existing, require_room
from reapc.checkpoint.reader import INDEX, Checkpoint
from reapc.checkpoint.side_files import copy_side_files
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.formats.layout import parts, stored
from reapc.formats.weights import FP8_BLOCK, WeightFormat
from reapc.progress import Progress
from reapc.quantize.source import refuse_quantized

if TYPE_CHECKING:
    import torch

LARGEST = 448.0
METHODS = ("fp8-block", "fp8")


def cast_blocks(weight: torch.Tensor, block: int = FP8_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as e4m3 and the float32 scale of every ``block`` x ``block`` tile, (ceil, ceil)."""
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    tiles = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scales = _scales(tiles.abs().amax(dim=(1, 3)))
    scaled = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return to_e4m3(scaled), scales


def cast_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as e4m3 and one float32 scale per row, (rows, 1)."""
    values = weight.float()
    scales = _scales(values.abs().amax(dim=1, keepdim=True))
    return to_e4m3(values / scales), scales


def _scales(largest: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    import torch

    # torch's cast of a value above 448 is NaN, and division may round up to just above it
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def quantization_config(method: str, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` that engines read; ``ignored`` are the linears that stay as they are."""
    if method == "fp8-block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": ignored,
        }
    scheme = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": "channel", "dynamic": False},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ignored,
    }


def quantize(source: Path, out: Path, fmt: WeightFormat, progress: Progress) -> dict[str, Any]:
    """Writes ``source`` (bf16, fp16 or fp32) to the folder ``out`` in ``fmt`` ("fp8-block" or "fp8"), atomically.

    MTP layers are cast like the rest; whatever the format does not cover is copied. Returns facts for the manifest.
    ReapcError where the source is quantized already or ``out`` exists."""
    checkpoint = Checkpoint(source)
    refuse_quantized(checkpoint.config, source)
    if fmt.method not in METHODS:
        raise ReapcError(f"{fmt.name} is not an FP8 format", hint=f"one of {', '.join(METHODS)}")
    if reason := weights.misfit(fmt, checkpoint.spec):
        raise ReapcError(f"{source}: {fmt.name}: {reason}")
    refuse_existing(out)
    start = time.monotonic()
    covered, ignored = _covered(checkpoint, fmt)
    if "lm_head" not in ignored:  # tied to the embedding on disk, but engines still have a module of that name
        ignored.append("lm_head")
    require_room(out.parent, weights.checkpoint_bytes(fmt, checkpoint.spec, mtp=True), f"the {fmt.label} checkpoint")
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        copy_side_files(checkpoint, partial)
        config = {**checkpoint.config, "quantization_config": quantization_config(fmt.method, ignored)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shards = _shards(checkpoint, covered)
        with progress.task(f"cast to {fmt.label}", checkpoint.bytes, "B") as advance:
            for name, slots in shards.items():
                tensors = _tensors(checkpoint, covered, name, advance)
                write_streamed(partial / name, slots, tensors, checkpoint.metadata[name])
        if (checkpoint.folder / INDEX).is_file():
            write_index(partial, shards)
    return {"tool": "reapc", "method": "round to nearest", "seconds": time.monotonic() - start}


def _covered(checkpoint: Checkpoint, fmt: WeightFormat) -> tuple[dict[str, WeightFormat], list[str]]:
    """The format of every tensor to cast, by name, and the modules of the matrices that stay."""
    covered: dict[str, WeightFormat] = {}
    ignored = []
    for tensor, _, found in stored(fmt, checkpoint.spec, mtp=True):
        if found is not None and tensor.name in checkpoint.entries:
            covered[tensor.name] = found
        elif tensor.name.endswith(".weight") and len(tensor.shape) == 2 and tensor.role != "embedding":
            ignored.append(tensor.module)
    fused = next((name for name in covered if not name.endswith(".weight")), None)
    if fused is not None:
        raise ReapcError(
            f"{checkpoint.folder}: {fused} holds the experts of a layer in one tensor: this version casts experts "
            "that are stored one by one",
            exit_code=1,
        )
    return covered, ignored


def _shards(checkpoint: Checkpoint, covered: dict[str, WeightFormat]) -> dict[str, list[Slot]]:
    shards: dict[str, list[Slot]] = {}
    for entry in checkpoint.in_order():
        slots = shards.setdefault(checkpoint.shard_of[entry.name].name, [])
        if (found := covered.get(entry.name)) is None:
            slots.append(Slot(entry.name, entry.dtype, entry.shape))
            continue
        rows, columns = entry.shape
        module = entry.name.removesuffix("weight")
        slots += [Slot(module + part.suffix, part.dtypes[0], part.shape) for part in parts(found, rows, columns)]
    return shards


def _tensors(
    checkpoint: Checkpoint, covered: dict[str, WeightFormat], shard: str, advance: Callable[[float], None]
) -> Iterator[torch.Tensor]:
    for entry in checkpoint.in_order():
        if checkpoint.shard_of[entry.name].name != shard:
            continue
        if (found := covered.get(entry.name)) is None:
            yield checkpoint.tensor(entry.name)
        else:
            weight = checkpoint.checked_tensor(entry.name)
            yield from cast_blocks(weight) if found.method == "fp8-block" else cast_channels(weight)
        advance(entry.bytes)
