"""What a checkpoint is stored in, with the bytes of its files: what a copy with fewer experts will take, exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from reapc.arch.spec import TensorGroup
from reapc.checkpoint.reader import Checkpoint
from reapc.formats import weights
from reapc.formats.packing import Packing
from reapc.formats.published import published_format
from reapc.formats.stored import AsStored, named, placements
from reapc.prune.names import Names


def stored_format(checkpoint: Checkpoint, mtp: bool = False) -> AsStored | None:
    """The format of an open checkpoint ("bf16" for one that is not quantized, whatever its dtype), with the bytes that
    ``prune`` would keep of it; ``mtp``: its MTP layers too. None where reapc has no name for the format."""
    spec, rules = checkpoint.spec, checkpoint.quantization
    name = published_format(spec) if rules is not None else "bf16"
    fmt = weights.parse(name) if name else None
    if fmt is None:
        return None
    disk = kept_bytes(checkpoint, mtp)
    if rules is None:
        return named(fmt, {}, disk, None)

    def packings(group: TensorGroup, prefix: str) -> Iterator[Packing | None]:
        for tensor in group.expand(prefix, spec.num_experts, None):
            linear = checkpoint.packed.get(tensor.name)
            yield linear.packing if linear else None

    placed, mixed = placements(spec, packings)
    refusal = rules.refused_by_vllm
    if mixed is not None:
        refusal = f"the experts of {mixed} are not all stored in one way, which vLLM's fused kernels refuse"
    return named(fmt, placed, disk, refusal)


def kept_bytes(checkpoint: Checkpoint, mtp: bool) -> tuple[int, int]:
    """(bytes of what has no experts, bytes of one expert of every layer together) of the tensors that ``prune`` writes;
    where experts of a layer differ in size, of the largest."""
    names = Names(checkpoint.spec, mtp)
    fixed = 0
    shared: dict[int, int] = defaultdict(int)  # by layer, of each expert's slices of tensors that hold all
    own: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for entry in checkpoint.entries.values():
        if names.is_dropped(entry.name):
            continue
        place = names.place(entry.name)
        if place is None or place.kind == "table":
            fixed += entry.bytes
        elif place.kind == "axis":
            shared[place.layer] += entry.bytes // entry.shape[place.axis]
        else:
            own[place.layer][place.expert] += entry.bytes
    return fixed, sum(shared.values()) + sum(max(sizes.values()) for sizes in own.values())
