"""A plan's devices as budgets of an allocation, and the plan with the allocation in the place of its file type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reapc.arch import ModelSpec
from reapc.engines import llamacpp
from reapc.engines.llamacpp_memory import cache_refusal
from reapc.errors import CannotBeDone
from reapc.formats import gguf
from reapc.formats.gguf_rules import EMBEDDINGS
from reapc.plan import HOST, Placement, Plan
from reapc.planner import prior
from reapc.planner.allocate import Ints, Problem
from reapc.planner.tensor_groups import FileParts
from reapc.recipe import ServeSection
from reapc.target import Target

_UNBOUNDED = 1 << 60  # of a host whose RAM nobody stated


class Devices:
    """Where the tensors of a llama.cpp plan lie, and the KV cache of every type that ``serve`` admits. CannotBeDone
    where experts are offloaded: what a card stages then depends on the types that are still to be chosen."""

    def __init__(self, plan: Plan, spec: ModelSpec, target: Target, serve: ServeSection) -> None:
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
        kinds = [k for k in llamacpp.kv_choices(serve.kv_cache) if cache_refusal(spec, k, serve.concurrency) is None]
        self.caches = {kind: self._cache(plan, spec, target, serve, kind) for kind in kinds}

    def _cache(self, plan: Plan, spec: ModelSpec, target: Target, serve: ServeSection, kind: str) -> list[int]:
        """Bytes of a cache of this type on each device."""
        layers = llamacpp.Layouts(spec, plan.chosen.format, kind, target, serve, True).kv_bytes
        held = [0] * len(self.devices)
        for device, size in zip(self.of_layer, layers, strict=True):
            held[device] += size
        return held

    def of(self, name: str) -> int:
        """The device of a tensor by its name."""
        layer, short = gguf.part_layer(name)
        if layer >= 0:
            return self.of_layer[layer]
        return self.host if short in EMBEDDINGS and not self.copied else self.last

    def budgets(self, problem: Problem, parts: FileParts, losses: Mapping[str, float] | None = None) -> Problem:
        """``problem`` with what each device has left for weights, in the place of one budget, beside a cache of every
        type; ``losses``: what each costs in nats, the prior's where nothing was measured. File bytes stand for those in
        memory: never fewer, by the padding."""
        counts = problem.experts.tolist()
        capacity = np.zeros((len(counts), len(self.devices)), np.int64)
        for index, device in enumerate(self.devices):
            others = device.used_bytes - device.weights_bytes - device.kv_bytes
            room = device.capacity_bytes - others if device.given else _UNBOUNDED
            for case, count in enumerate(counts):
                own = sum(t.data_bytes(kind, count) for t, kind in parts.kept if self.of(t.name) == index)
                capacity[case, index] = room - own
        device_of = np.array([self.of(group.tensors[0].name) for group in parts.groups], np.int64)
        placed = replace(problem, device=np.tile(device_of, (len(counts), 1)), capacity=capacity)

        def beside(kind: str) -> Ints:
            left: Ints = capacity - np.array(self.caches[kind], np.int64)
            return left

        return placed.with_caches(losses or self.prior_losses(), beside)

    def prior_losses(self) -> dict[str, float]:
        """What the prior says of every type of cache that may be served."""
        return {kind: prior.kv_loss(kind) for kind in self.caches}

    def planned(self, plan: Plan, spec: ModelSpec, parts: FileParts, taken: Taken) -> Plan:
        """The plan with what was taken: its bytes, devices, count, KV type and loss."""
        held = [0] * len(self.devices)
        for tensor, kind in parts.kept:
            held[self.of(tensor.name)] += tensor.data_bytes(kind, taken.experts)
        embedding = 0
        for group in parts.groups:
            stored = group.stored(taken.groups[group.name])
            size = sum(t.data_bytes(stored[t.name], taken.experts) for t in group.tensors)
            held[self.of(group.tensors[0].name)] += size
            embedding += size if group.part == "embedding" else 0
        if self.copied:
            held[self.host] += embedding
        devices = []
        for device, weights, cache in zip(self.devices, held, self.caches[taken.kv], strict=True):
            grown = weights - device.weights_bytes
            capacity = device.capacity_bytes if device.given else device.capacity_bytes + grown
            update = {"weights_bytes": weights, "kv_bytes": cache, "capacity_bytes": capacity}
            devices.append(device.model_copy(update=update))
        total = sum(held) - (embedding if self.copied else 0)
        placement = plan.chosen.placement.model_copy(update={"devices": tuple(devices)})
        return carried(
            plan, spec, taken, placement, f"mix of GGUF types, {8 * total / _weights(spec, taken.experts):.2f} bits",
            file_bytes=parts.bytes_of(taken.groups, taken.experts) + gguf.file_overhead_bytes(spec, "Q8_0"),
            weights_bytes=total,
            # its bytes per token were those of the uniform type
            decode_tokens_per_second_ceiling=None,
        )  # fmt: skip


class Taken(NamedTuple):
    """What of an allocation the plan says: ``groups`` the option of each, ``bits`` the mean of a kept expert weight."""

    groups: dict[str, str]
    experts: int
    kv: str
    loss: float
    bits: float


def carried(plan: Plan, spec: ModelSpec, taken: Taken, placement: Placement, name: str, **bytes_: Any) -> Plan:
    """``plan`` with the allocation in the place of its format. CannotBeDone where it does not fit after all."""
    short = next((device for device in placement.devices if device.given and device.free_bytes < 0), None)
    if short is not None:
        raise CannotBeDone(
            f"the allocation needs {-short.free_bytes} bytes more than {short.name} has",
            hint="set quantize.allocate = false",
        )
    old = plan.chosen
    chosen = old.model_copy(
        update={
            "format": f"{name} per weight",
            "experts_kept": taken.experts,
            "prune_ratio": 1 - taken.experts / spec.num_experts,
            "kv_dtype": taken.kv,
            "kv_bytes": sum(device.kv_bytes for device in placement.devices),
            "bits_per_expert_weight": taken.bits,
            "predicted_loss": taken.loss,
            "placement": placement,
            **bytes_,
        }
    )
    how = "tensor by tensor" if old.engine == "llama.cpp" else "part by part"
    cache = was = ""
    if taken.kv != old.kv_dtype:
        cache, was = f" and {cache_name(taken.kv)}", f" and {cache_name(old.kv_dtype)}"
    reason = (
        f"Types were allocated {how}, {taken.bits:.2f} bits per kept expert weight{cache}: the uniform choice "
        f"was {old.format} with {old.experts_kept} experts{was}."
    )
    return plan.model_copy(update={"chosen": chosen, "reasons": (reason, *plan.reasons)})


def cache_name(kind: str) -> str:
    """A KV type in words; vLLM calls the model's own type "auto"."""
    return "a KV cache in the model's own type" if kind == "auto" else f"a KV cache in {kind}"


def _weights(spec: ModelSpec, count: int) -> int:
    return spec.with_experts(count).parameters
