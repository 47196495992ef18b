"""llama.cpp: what llama-server accepts, and where it puts every byte (``-sm layer``, experts in RAM where needed).

Read in llama.cpp 0c1e57098 (facts/llamacpp-memory.md) and checked with llama-server and llama-fit-params.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from reapc.arch import LayerKind, ModelSpec
from reapc.engines import data
from reapc.engines.llamacpp_memory import (
    KV_TYPES,
    MICRO_BATCH_TOKENS,
    cache_refusal,
    kv_layer_bytes,
    layer_workspace_bytes,
    padded_context,
    scratch_elements,
    state_layer_bytes,
    workspace_bytes,
)
from reapc.engines.render import render
from reapc.engines.split import fill
from reapc.formats import gguf
from reapc.formats.gguf_sizes import sizes
from reapc.plan import HOST, RAM, DeviceBytes, Placement, Plan
from reapc.recipe import Recipe, ServeSection
from reapc.target import Target

NAME = "llama.cpp"
MIB = 2**20
_DATA = data.load("llamacpp")
NO_WINDOW = frozenset(_DATA["refused"]["no_window"])
NO_TENSOR_SPLIT = frozenset(_DATA["refused"]["split_tensor"])
_MEMORY: dict[str, int] = _DATA["memory"]
BATCH_TOKENS = _MEMORY["batch_tokens"]


def kv_type(requested: str) -> str:
    """The cache type that the request stands for."""
    return "f16" if requested in ("native", "auto") else requested


def kv_choices(requested: str) -> tuple[str, ...]:
    """Cache types to try, best first: "auto" admits quantized ones."""
    return ("f16", "q8_0", "q4_0") if requested == "auto" else (kv_type(requested),)


def refusal(spec: ModelSpec, fmt: str, target: Target, serve: ServeSection, kv: str, imatrix: bool) -> str | None:
    """Why llama.cpp cannot serve this at any expert count, or None."""
    if serve.tensor_parallel != "auto":
        return "serve.tensor_parallel is vLLM's; llama.cpp splits by layer"
    if serve.speculative != "none":
        return "serve.speculative is vLLM's: reapc plans llama.cpp without drafts"
    if spec.gguf_arch is None:
        return f"llama.cpp (version {_DATA['version']}) does not know this architecture ({spec.model_type})"
    if (packed := gguf.native_expert_type(spec)) and fmt not in (f"{packed}_MOE", "BF16", "F16", "F32"):
        return f"its experts are published in {packed}, which llama-quantize refuses to requantize to {fmt}"
    if spec.gguf_arch in ("qwen2moe", "qwen3moe", "qwen3vlmoe") and len(spec.moe_layers) < spec.num_layers:
        return "llama.cpp's converter does not know dense layers in this family, and the model has some"
    if spec.gguf_arch == "qwen3moe" and not spec.norm_topk:
        return "llama.cpp renormalizes the top-k gate weights of this family; this model has norm_topk_prob = false"
    if reason := cache_refusal(spec, kv, serve.concurrency):
        return reason
    if fmt in gguf.NEEDS_IMATRIX and not imatrix:
        return f"{fmt} needs an importance matrix and the recipe says quantize.imatrix = false"
    if target.nodes > 1:
        return "reapc plans llama.cpp on one machine; the target has several"
    return None


# src/models/llama4.cpp: q and k are normalized unless there are just so many experts (Maverick's count).
_LLAMA4_UNNORMALIZED = 128


def fixed_experts(spec: ModelSpec) -> str | None:
    """Why only the published expert count can be served, or None."""
    if spec.gguf_arch == "llama4" and spec.num_experts == _LLAMA4_UNNORMALIZED:
        return (
            f"llama.cpp tells by {_LLAMA4_UNNORMALIZED} experts that a Llama-4 model does not normalize queries and "
            "keys; with fewer it would compute wrongly"
        )
    return None


def _without_window(kind: LayerKind) -> LayerKind:
    """The layer with a full cache: these architectures' loaders read no sliding window."""
    return replace(kind, cache=tuple(replace(stream, window=None) for stream in kind.cache))


class Layouts:
    """Where the bytes of one model in one format go, for any expert count."""

    def __init__(self, spec: ModelSpec, fmt: str, kv: str, target: Target, serve: ServeSection, imatrix: bool) -> None:
        self.spec, self.fmt, self.kv, self.target, self.serve = spec, fmt, kv, target, serve
        self.sizes = sizes(spec, fmt, imatrix)
        per_kind: dict[int, tuple[int, int]] = {}
        for layer in spec.layers:
            kind = _without_window(layer.kind) if spec.gguf_arch in NO_WINDOW else layer.kind
            if id(layer.kind) not in per_kind:
                per_kind[id(layer.kind)] = (
                    kv_layer_bytes(kind, serve.context, serve.concurrency, kv),
                    state_layer_bytes(kind, serve.concurrency),
                )
        self.kv_bytes = [per_kind[id(layer.kind)][0] for layer in spec.layers]
        self.state_bytes = [per_kind[id(layer.kind)][1] for layer in spec.layers]
        self.layer_workspace = layer_workspace_bytes(spec, serve.context, serve.concurrency)
        self.card_overhead = _MEMORY["gpu_overhead"]
        self.host_overhead = _MEMORY["server_base"] + _MEMORY["tokenizer_bytes_per_token"] * spec.vocab_size
        if target.unified:
            self.card_overhead += self.host_overhead

    @cached_property
    def bits(self) -> float:
        """Mean bits per weight of the routed experts."""
        return self.sizes.expert_bits

    def weights_bytes(self, kept: int) -> int:
        """Tensor bytes with ``kept`` experts."""
        return self.sizes.tensors_bytes(kept)

    def file_bytes(self, kept: int) -> int:
        """Bytes of the GGUF file (the tokenizer's part is an estimate)."""
        return self.sizes.file_bytes(kept) + gguf.file_overhead_bytes(self.spec, self.fmt)

    def _layers(self, kept: int) -> list[tuple[int, int]]:
        """(all bytes, the routed experts' bytes) of every layer."""
        now = self.sizes.at(kept)
        return [
            (fixed + unit * kept, routed * kept)
            for fixed, unit, routed in zip(
                now.fixed_bytes, now.per_expert_bytes, now.experts_per_expert_bytes, strict=True
            )
        ]

    def place(self, kept: int) -> Placement:
        """The placement that fits with the fewest layers' experts in RAM, else the one that lacks least."""
        target = self.target
        if not target.gpus:
            return self._in_ram(kept)
        layers = self._layers(kept)
        tried = [self._on_cards(layers, kept, cards, 0) for cards in self._card_counts()]
        for placement in tried:
            if placement.fits:
                return placement
        if target.ram and not target.unified:
            offloaded = self._offloaded(layers, kept)
            if offloaded.fits:
                return offloaded
            in_ram = self._in_ram(kept)
            if in_ram.fits:
                return in_ram
            tried.append(offloaded)
        return max(tried, key=lambda placement: placement.fullest.free_bytes)

    def fits(self, kept: int) -> bool:
        """Whether some placement fits; cheaper than ``place`` on several cards."""
        target = self.target
        if not target.gpus or target.gpus == 1 or target.ram:
            return self.place(kept).fits
        layers = self._layers(kept)
        for cards in self._card_counts():
            costs, limit, last = self._costs(layers, kept, cards, 0)
            if _fill(costs, cards, last, limit) is not None:
                return True
        return False

    def _card_counts(self) -> tuple[int, ...]:
        """As many cards as can hold a layer each (llama.cpp is built for 16); one alone needs no copies of the
        pipeline's inputs, so it may fit where two do not."""
        cards = min(self.target.gpus, self.spec.num_layers, _DATA["max_devices"])
        return (cards, 1) if cards > 1 else (cards,)

    def _workspaces(self, layers: list[tuple[int, int]], cards: int, offloaded: int) -> tuple[int, int]:
        """Workspace of a card, and of the one with the output matrix."""
        # an offloading server stages one layer's experts on the card while it reads a prompt
        staged = max((routed for _, routed in layers[:offloaded]), default=0)
        copies = 4 if cards > 1 and not staged else 1  # pipeline parallelism is off with tensor overrides
        context, slots = self.serve.context, self.serve.concurrency
        plain = workspace_bytes(self.spec, context, output=False, copies=copies, concurrency=slots) + staged
        return plain, workspace_bytes(self.spec, context, output=True, copies=copies, concurrency=slots) + staged

    def _output_bytes(self) -> int:
        """Weights outside the layers that lie on the last card; a tied output matrix is a second copy there."""
        tied = self.sizes.embedding_bytes if self.spec.tied_embeddings or self.target.unified else 0
        return self.sizes.output_bytes + tied

    def _costs(
        self, layers: list[tuple[int, int]], kept: int, cards: int, offloaded: int
    ) -> tuple[list[int], int, int]:
        """Bytes per layer on a card, the room of a card for layers, and what the last card holds besides."""
        plain, output = self._workspaces(layers, cards, offloaded)
        costs = [
            total
            - (routed if index < offloaded else 0)
            + self.kv_bytes[index]
            + self.state_bytes[index]
            + self.layer_workspace[index]
            for index, (total, routed) in enumerate(layers)
        ]
        return costs, self.target.vram - self.card_overhead - plain, self._output_bytes() + output - plain

    def _on_cards(self, layers: list[tuple[int, int]], kept: int, cards: int, offloaded: int) -> Placement:
        target = self.target
        costs, _, last = self._costs(layers, kept, cards, offloaded)
        counts = split_layers(costs, cards, last)
        plain, output = self._workspaces(layers, cards, offloaded)
        devices, start = [], 0
        for index, device in enumerate(target.devices):
            if index >= cards:
                devices.append(DeviceBytes(name=device.name, capacity_bytes=target.vram))
                continue
            stage = range(start, start + counts[index])
            start += counts[index]
            is_last = index == cards - 1
            weights = sum(layers[i][0] - (layers[i][1] if i < offloaded else 0) for i in stage)
            devices.append(
                DeviceBytes(
                    name=device.name,
                    capacity_bytes=target.vram,
                    weights_bytes=weights + (self._output_bytes() if is_last else 0),
                    kv_bytes=sum(self.kv_bytes[i] for i in stage),
                    state_bytes=sum(self.state_bytes[i] for i in stage),
                    workspace_bytes=(output if is_last else plain) + sum(self.layer_workspace[i] for i in stage),
                    overhead_bytes=self.card_overhead,
                )
            )
        if not target.unified:
            devices.append(self._host(sum(routed for _, routed in layers[:offloaded])))
        return Placement(
            pipeline_parallel=cards,
            layers_per_device=tuple(counts),
            offloaded_layers=offloaded,
            devices=tuple(devices),
        )

    def _host(self, experts: int) -> DeviceBytes:
        """The RAM beside cards: token embeddings, and the experts that do not fit on the cards."""
        weights = self.sizes.embedding_bytes + experts
        workspace = BATCH_TOKENS * self.spec.hidden_size * 4
        if experts:
            workspace += scratch_elements(self.spec) * 4 * MICRO_BATCH_TOKENS
        overhead = self.host_overhead + _MEMORY["gpu_overhead"]
        given = bool(self.target.ram)
        return DeviceBytes(
            name=HOST,
            capacity_bytes=self.target.ram if given else weights + workspace + overhead,
            weights_bytes=weights,
            workspace_bytes=workspace,
            overhead_bytes=overhead,
            given=given,
        )

    def _offloaded(self, layers: list[tuple[int, int]], kept: int) -> Placement:
        """The fewest first layers whose experts must go to RAM so that the cards hold the rest."""
        cards = self._card_counts()[0]

        def holds(offloaded: int) -> bool:
            costs, limit, last = self._costs(layers, kept, cards, offloaded)
            return _fill(costs, cards, last, limit) is not None

        low, high = 1, len(layers)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return self._on_cards(layers, kept, cards, high)

    def _in_ram(self, kept: int) -> Placement:
        """Everything in RAM, the cards idle."""
        layers, target = self._layers(kept), self.target
        ram = DeviceBytes(
            name=HOST if target.gpus else RAM,
            capacity_bytes=target.ram,
            weights_bytes=sum(total for total, _ in layers) + self.sizes.embedding_bytes + self.sizes.output_bytes,
            kv_bytes=sum(self.kv_bytes),
            state_bytes=sum(self.state_bytes),
            workspace_bytes=sum(self.layer_workspace)
            + workspace_bytes(self.spec, self.serve.context, output=True, concurrency=self.serve.concurrency),
            overhead_bytes=self.host_overhead,
        )
        idle = [DeviceBytes(name=d.name, capacity_bytes=target.vram) for d in target.devices] if target.gpus else []
        return Placement(layers_per_device=(len(layers),), offloaded_layers=0, devices=(*idle, ram))

    def decode_ceiling(self, kept: int, placement: Placement) -> float | None:
        """Tokens per second of one sequence if every byte it reads came at full bandwidth; None where a bandwidth is
        not known. Cards work one after another (``-sm layer``), so their times add up."""
        target, top_k = self.target, self.spec.top_k
        on_cards = (
            bool(target.gpus)
            and placement.layers_per_device != ()
            and any(d.name != HOST and d.weights_bytes for d in placement.devices)
        )
        card, ram = target.bandwidth, target.host_bandwidth
        seconds = 0.0
        reads_ram = reads_card = 0
        for index, (total, routed) in enumerate(self._layers(kept)):
            chosen = routed * top_k // kept
            rest = total - routed + self.kv_bytes[index] // self.serve.concurrency
            rest += self.state_bytes[index] // self.serve.concurrency
            if not on_cards:
                reads_ram += rest + chosen
            elif index < placement.offloaded_layers:
                reads_card, reads_ram = reads_card + rest, reads_ram + chosen
            else:
                reads_card += rest + chosen
        output = self.sizes.output_bytes + (self.sizes.embedding_bytes if self.spec.tied_embeddings else 0)
        reads_card, reads_ram = (reads_card + output, reads_ram) if on_cards else (reads_card, reads_ram + output)
        for amount, bandwidth in ((reads_card, card), (reads_ram, ram)):
            if amount and not bandwidth:
                return None
            seconds += amount / bandwidth if bandwidth else 0.0
        return 1 / seconds


def _fill(costs: list[int], parts: int, last_extra: int, limit: int) -> list[int] | None:
    """``fill`` from the last card, which holds ``last_extra`` bytes besides."""
    counts = fill(costs[::-1], parts, last_extra, 0, limit)
    return counts[::-1] if counts else None


def split_layers(costs: list[int], parts: int, last_extra: int) -> list[int]:
    """How many consecutive layers each card gets, at least one, so that the largest sum is smallest.

    ``last_extra`` bytes (output matrix) weigh on the last card. Bisection over the answer; exact.
    """
    if parts == 1:
        return [len(costs)]
    low, high = 0, sum(costs) + max(last_extra, 0)
    while low < high:
        middle = (low + high) // 2
        if _fill(costs, parts, last_extra, middle):
            high = middle
        else:
            low = middle + 1
    counts = _fill(costs, parts, last_extra, high)
    if counts is None:
        raise ValueError(f"{len(costs)} layers cannot be split over {parts} devices")
    return counts


def serve_script(
    plan: Plan,
    model_path_relative: str,
    recipe: Recipe,
    *,
    server_hint: str | None = None,
    python_hint: str | None = None,
    bindings_hint: str | None = None,
    lib_hint: str | None = None,
) -> str:
    """The text of serve.sh. The hints are what the build used: llama-server, or Python with llama-cpp-python."""
    chosen = plan.chosen
    place = chosen.placement
    counts = list(place.layers_per_device)
    cards = [device for device in place.devices if device.name not in (RAM, HOST)]
    used = [device for device in cards if device.used_bytes]
    gpus = len(used)
    needed = used or [device for device in place.devices if device.name in (RAM, HOST)]
    values: dict[str, Any] = {
        "context": padded_context(chosen.context) * chosen.concurrency,
        "slots": chosen.concurrency,
        "kv": chosen.kv_dtype,
        "kv_number": KV_TYPES[chosen.kv_dtype]["ggml"],
        "gpus": gpus,
        "idle_cards": bool(cards) and not gpus,
        "needs": [-(-device.used_bytes // MIB) for device in needed],
        "gpu_layers": sum(counts) + 1 if gpus else 0,
        # llama.cpp counts the output as one more layer, on the last card
        "tensor_split": ",".join(map(str, [*counts[:-1], counts[-1] + 1])) if gpus > 1 else "",
        "cpu_moe": place.offloaded_layers,
        "batch": BATCH_TOKENS,
        "micro_batch": MICRO_BATCH_TOKENS,
        "server_hint": server_hint or "",
        "python_hint": python_hint or "python3",
        "bindings_hint": bindings_hint or "",
        "lib_hint": lib_hint or "",
    }
    return render("llamacpp.sh.j2", plan, model_path_relative, recipe, values)
