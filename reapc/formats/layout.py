"""Which tensors a checkpoint of a format holds, by name: dtype and shape of each, the quantized ones in their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from reapc.arch import ModelSpec, TensorSpec
from reapc.arch.spec import TensorGroup
from reapc.formats.weights import WeightFormat


class Stored(NamedTuple):
    """One tensor of the 16 bit checkpoint, the group that it belongs to, and the plain format that its linear is stored
    in; ``format`` None where the tensor stays as it is."""

    tensor: TensorSpec
    group: TensorGroup
    format: WeightFormat | None


def stored(fmt: WeightFormat, spec: ModelSpec) -> Iterator[Stored]:
    """Every tensor of the main model (no MTP, no vision), outer ones first."""
    for group in spec.outer:
        for tensor in group.expand("", spec.num_experts, None):
            yield Stored(tensor, group, fmt.at(group))
    for layer in spec.layers:
        for group in layer.kind.tensors:
            found = fmt.at(group, layer.index)
            for tensor in group.expand(f"{layer.prefix}.", spec.num_experts, layer.index):
                yield Stored(tensor, group, found)
