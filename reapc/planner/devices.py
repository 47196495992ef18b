"""A plan's devices as budgets of an allocation, and the plan with the allocation in the place of its file type."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone
from reapc.formats import gguf
from reapc.formats.gguf_rules import EMBEDDINGS
from reapc.plan import HOST, Plan
from reapc.planner.allocate import Problem
from reapc.planner.tensor_groups import FileParts
from reapc.target import Target

_UNBOUNDED = 1 << 60  # of a host whose RAM nobody stated


class Devices:
    """Where the tensors of a llama.cpp plan lie. CannotBeDone where experts are offloaded: what a card stages then
    depends on the types that are still to be chosen."""

    def __init__(self, plan: Plan, spec: ModelSpec, target: Target) -> None:
        place = plan.chosen.placement
        if place.offloaded_layers:
            raise CannotBeDone(
                f"quantize.allocate = true, and the plan keeps the experts of {place.offloaded_layers} layers in RAM "
                "beside the cards: that is not allocated in this version",
                hint="set quantize.allocate = false, or a target that holds the model on its cards or in RAM",
            )
        self.devices = place.devices
        names = [device.name for device in place.devices]
        used = [index for index, device in enumerate(place.devices) if device.used_bytes and device.name != HOST]
        if not used:  # everything in the RAM beside idle cards
            used = [names.index(HOST)]
        self.of_layer: list[int] = []
        for device, count in zip(used, place.layers_per_device, strict=True):
            self.of_layer += [device] * count
        self.last = used[-1]
        on_host = HOST in names and names.index(HOST) != self.last
        self.host = names.index(HOST) if on_host else self.last
        # A tied output matrix is a second copy of the embeddings on the last card, which is the tighter one.
        self.copied = on_host and (spec.tied_embeddings or target.unified)

    def of(self, name: str) -> int:
        """The device of a tensor by its name."""
        layer, short = gguf.part_layer(name)
        if layer >= 0:
            return self.of_layer[layer]
        return self.host if short in EMBEDDINGS and not self.copied else self.last

    def budgets(self, problem: Problem, parts: FileParts) -> Problem:
        """``problem`` with what each device has left for weights, in the place of one budget. File bytes stand for
        those in memory: never fewer, by the padding."""
        counts = problem.experts.tolist()
        capacity = np.zeros((len(counts), len(self.devices)), np.int64)
        for index, device in enumerate(self.devices):
            room = device.capacity_bytes - device.used_bytes + device.weights_bytes if device.given else _UNBOUNDED
            for case, count in enumerate(counts):
                own = sum(t.data_bytes(kind, count) for t, kind in parts.kept if self.of(t.name) == index)
                capacity[case, index] = room - own
        device_of = np.array([self.of(group.tensors[0].name) for group in parts.groups], np.int64)
        return replace(problem, device=np.tile(device_of, (len(counts), 1)), capacity=capacity)

    def planned(
        self,
        plan: Plan,
        spec: ModelSpec,
        parts: FileParts,
        groups: dict[str, str],
        count: int,
        loss: float,
        bits: float,
    ) -> Plan:
        """The plan with these types: its bytes, devices, count and loss."""
        held = [0] * len(self.devices)
        for tensor, kind in parts.kept:
            held[self.of(tensor.name)] += tensor.data_bytes(kind, count)
        embedding = 0
        for group in parts.groups:
            stored = group.stored(groups[group.name])
            size = sum(t.data_bytes(stored[t.name], count) for t in group.tensors)
            held[self.of(group.tensors[0].name)] += size
            embedding += size if group.part == "embedding" else 0
        if self.copied:
            held[self.host] += embedding
        devices = []
        for device, weights in zip(self.devices, held, strict=True):
            grown = weights - device.weights_bytes
            capacity = device.capacity_bytes if device.given else device.capacity_bytes + grown
            devices.append(device.model_copy(update={"weights_bytes": weights, "capacity_bytes": capacity}))
        short = next((device for device in devices if device.free_bytes < 0), None)
        if short is not None:
            raise CannotBeDone(
                f"the allocation needs {-short.free_bytes} bytes more than {short.name} has",
                hint="set quantize.allocate = false",
            )
        old = plan.chosen
        total = sum(held) - (embedding if self.copied else 0)
        chosen = old.model_copy(
            update={
                "experts_kept": count,
                "prune_ratio": 1 - count / spec.num_experts,
                "file_bytes": parts.bytes_of(groups, count) + gguf.file_overhead_bytes(spec, "Q8_0"),
                "weights_bytes": total,
                "bits_per_expert_weight": bits,
                "predicted_loss": loss,
                "placement": old.placement.model_copy(update={"devices": tuple(devices)}),
                # its bytes per token were those of the uniform type
                "decode_tokens_per_second_ceiling": None,
            }
        )
        reason = (
            f"Types were allocated tensor by tensor, {bits:.2f} bits per kept expert weight: the uniform choice was "
            f"{old.format} with {old.experts_kept} experts."
        )
        return plan.model_copy(update={"chosen": chosen, "reasons": (reason, *plan.reasons)})
