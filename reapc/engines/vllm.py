"""vLLM: parallel layouts that it accepts, and what every card holds.

Read in vLLM 0.33.0 (facts/vllm-legality.md; ``vllm.toml``); none of it was run on a card by us. Weights and KV are
exact from shapes, the rest is a model and carries its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, NamedTuple

from reapc.arch import LayerKind, ModelSpec, TensorGroup
from reapc.arch.spec import DTYPE_BYTES
from reapc.engines import data
from reapc.engines.cache import spread
from reapc.engines.render import render
from reapc.formats import weights
from reapc.formats.weights import WeightFormat
from reapc.plan import DeviceBytes, Placement, Plan
from reapc.recipe import Recipe, ServeSection
from reapc.target import Target

NAME = "vllm"
MIB = 2**20
_DATA = data.load("vllm")
_MEMORY = _DATA["memory"]
BLOCK_TOKENS: int = _MEMORY["block_tokens"]
MAX_BATCHED_TOKENS: int = _MEMORY["max_batched_tokens"]
GPU_MEMORY_UTILIZATION: float = _MEMORY["utilization"]
KV_TYPES: dict[str, dict[str, Any]] = _DATA["kv"]
SLOW = "slow: the generic moe_wna16 kernel, Marlin refuses this group"


def utilization(target: Target) -> float:
    """--gpu-memory-utilization, a fraction of the card's total: less where not all of that is free."""
    return min(GPU_MEMORY_UTILIZATION, int(target.vram / target.total_bytes * 1000) / 1000)


def kv_type(requested: str) -> str:
    """The value of --kv-cache-dtype: f16 and bf16 are the model's own type, "auto"."""
    return "auto" if requested in ("native", "auto", "f16", "bf16") else requested


def kv_choices(requested: str) -> tuple[str, ...]:
    """Cache types to try, best first: a request of "auto" admits fp8."""
    return ("auto", "fp8") if requested == "auto" else (kv_type(requested),)


def refusal(spec: ModelSpec, fmt: WeightFormat, target: Target, serve: ServeSection, kv: str) -> str | None:
    """Why vLLM cannot serve this in any layout, or None."""
    if not target.gpus:
        return "vLLM needs a GPU here: without one reapc serves with llama.cpp"
    if isinstance(serve.tensor_parallel, int) and serve.tensor_parallel > target.gpus:
        return f"tensor parallelism over {serve.tensor_parallel} cards, and the target has {target.gpus}"
    if target.kind != "cuda":
        return f"vLLM is planned for CUDA cards only; the target's cards are {target.kind}"
    if kv not in KV_TYPES:
        return f"vLLM has no {kv} KV cache (it has {', '.join(KV_TYPES)})"
    card = target.capability
    stated = target.compute_capability or "not stated"
    roads = [_DATA["roads"][name] for name in serve.experimental]
    needed: dict[str, str] = _DATA["capability"]
    for road in roads:
        if "kv" in road and kv not in road["kv"]:
            return f"the experimental road takes a KV cache of {', '.join(road['kv'])} only"
    if spec.sparse_attention:
        lowest = min([needed["sparse-attention"], *(road.get("sparse-attention", "99.0") for road in roads)], key=_key)
        if card is None or card < _key(lowest):
            return f"{needed['sparse-reason']}; the target's compute capability is {stated}"
    minimum = _key(KV_TYPES[kv]["capability"])
    if kv != "auto" and (card is None or card < minimum):
        return f"an {kv} KV cache needs compute capability {KV_TYPES[kv]['capability']}; the target says {stated}"
    wanted = needed[fmt.name if fmt.method == "plain" else fmt.method]
    if card is not None and card < _key(wanted):
        return f"{fmt.name} needs compute capability {wanted}; the target has {target.compute_capability}"
    if fmt.method in _DATA["bits"] and fmt.bits not in _DATA["bits"][fmt.method]:
        allowed = ", ".join(map(str, _DATA["bits"][fmt.method]))
        return f"vLLM loads {fmt.method} with {allowed} bits, not {fmt.bits}"
    return weights.misfit(fmt, spec)


def fixed_experts(spec: ModelSpec) -> str | None:
    """Why only the published expert count can be served, or None."""
    reason: str | None = _DATA["fixed_experts"].get(spec.family)
    return reason


@lru_cache(maxsize=64)
def _key(text: str) -> tuple[int, int]:
    return data.capability(text) or (0, 0)


class Layout(NamedTuple):
    """Tensor, pipeline and expert parallel degrees; ``tp * pp`` cards are used, the rest stays idle."""

    tp: int
    pp: int
    ep: int


def layouts(target: Target, tensor_parallel: int | str = "auto") -> Iterator[Layout]:
    """Every layout over at most all cards: more cards first, more tensor parallelism first; with a ``tensor_parallel``
    degree only those."""
    degrees = range(1, target.gpus + 1) if isinstance(tensor_parallel, str) else (tensor_parallel,)
    pairs = [(tp, pp) for tp in degrees for pp in range(1, target.gpus // tp + 1)]
    for tp, pp in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], -pair[0])):
        if target.nodes > 1 and tp > target.gpus // target.nodes:
            continue
        yield Layout(tp, pp, 1)
        if tp > 1:
            yield Layout(tp, pp, tp)


def _kinds(spec: ModelSpec) -> list[LayerKind]:
    return list({id(layer.kind): layer.kind for layer in spec.layers}.values())


def layout_refusal(spec: ModelSpec, layout: Layout) -> str | None:
    """Why the model's shapes do not divide over this layout, or None."""
    tp, pp, ep = layout
    if pp > spec.num_layers:
        return f"{spec.num_layers} layers do not make {pp} pipeline stages"
    if tp == 1:
        return None
    if spec.num_heads % tp:
        return f"{spec.num_heads} attention heads do not divide over {tp} cards"
    for kind in _kinds(spec):
        for stream in kind.cache:
            if stream.heads and stream.heads % tp and tp % stream.heads:
                return f"{stream.heads} KV heads neither divide over {tp} cards nor are a divisor of {tp}"
        if kind.state_heads and kind.state_heads % tp:
            return f"{kind.state_heads} linear-attention heads do not divide over {tp} cards"
        for group in kind.tensors:
            if reason := _undivided(group, tp, ep):
                return reason
    return None


def _undivided(group: TensorGroup, tp: int, ep: int) -> str | None:
    for rows, columns in group.linears:
        match group.parallel:
            case "column" if rows % tp:
                size = rows
            case "row" if columns % tp:
                size = columns
            case "expert" if ep == 1 and rows % tp:
                return f"experts of {rows} columns do not divide over {tp} cards"
            case "expert_row" if ep == 1 and columns % tp:
                return f"experts of {columns} columns do not divide over {tp} cards"
            case _:
                continue
        return f"{group.name.removesuffix('.weight')}: {size} does not divide over {tp} cards"
    return None


def format_refusal(spec: ModelSpec, fmt: WeightFormat, layout: Layout) -> tuple[str | None, bool]:
    """(why this layout cannot hold the format, whether it is served by the slow kernel)."""
    if not fmt.quantized:
        return None, False
    tp, _, ep = layout
    expert_tp = 1 if ep > 1 else tp
    width = spec.expert_intermediate_size // expert_tp
    slow = False
    if fmt.method in ("gptq", "ct", "auto-round"):
        marlin = _DATA["marlin"]
        inner = max(64, fmt.group_size) if fmt.method == "auto-round" else fmt.group_size
        hidden = {
            columns for k in _kinds(spec) for g in k.tensors if g.parallel == "expert" for _, columns in g.linears
        }
        fits = width % inner == 0
        if fmt.bits in marlin["bits"]:
            fits = fits and all(size % marlin["hidden_multiple"] == 0 for size in hidden)
            slow = not fits
            if slow and (width % 32 or any(size % 32 for size in hidden)):
                return _narrow(fmt, spec, width, expert_tp, 32), False
        elif not fits:
            return _narrow(fmt, spec, width, expert_tp, inner), False
    elif fmt.method == "fp8-block" and width % weights.FP8_BLOCK:
        return _narrow(fmt, spec, width, expert_tp, weights.FP8_BLOCK), False
    elif fmt.method in ("nvfp4", "mxfp4") and width % fmt.group_size:
        return _narrow(fmt, spec, width, expert_tp, fmt.group_size), False
    if tp > 1 and not fmt.experts_only:
        unit = weights.FP8_BLOCK if fmt.method == "fp8-block" else fmt.group_size
        for kind in _kinds(spec):
            for group in kind.tensors:
                for rows, columns in group.linears if unit else ():
                    size = columns // tp if group.parallel == "row" else 0
                    if group.parallel == "column" and fmt.method == "fp8-block":
                        size = rows // tp
                    if size % unit:
                        name = group.name.removesuffix(".weight")
                        return f"{name}: {size} columns per card do not divide into groups of {unit}", False
    return None, slow


def _narrow(fmt: WeightFormat, spec: ModelSpec, width: int, tp: int, unit: int) -> str:
    each = f"experts of {spec.expert_intermediate_size} columns leave {width} per card over {tp} cards, "
    return each + f"which {fmt.name} cannot hold: multiples of {unit} are needed"


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers per pipeline stage: even, the remainder goes to the stages before the last (vLLM's get_pp_indices)."""
    counts = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        counts[-i] += 1
    return counts


def activation_bytes(spec: ModelSpec, tp: int, sequences: int) -> int:
    """Peak of the dummy forward over MAX_BATCHED_TOKENS tokens: a model, not measured.

    Per token: hidden state, residual and their copies (6 hidden), the routed experts' inner rows (3 * top-k * width
    / TP) and outputs (2 * top-k * hidden), or a layer's widest linears, all bf16; plus float32 logits, twice, of one
    token per sequence.
    """
    hidden, top_k = spec.hidden_size, spec.top_k
    moe = top_k * (3 * spec.expert_intermediate_size // tp + 2 * hidden)
    widest = 0
    for kind in _kinds(spec):
        split = [(g, rows) for g in kind.tensors if g.role in ("attention", "dense_mlp") for rows, _ in g.linears]
        widest = max(widest, sum(rows if g.parallel in ("replicate", "row") else ceil(rows / tp) for g, rows in split))
    return MAX_BATCHED_TOKENS * (6 * hidden + max(moe, 2 * widest)) * 2 + 2 * 4 * sequences * spec.vocab_size


class _Cost(NamedTuple):
    """One layer on one card: bytes that stay, bytes per expert of the model, KV and state bytes, experts' share."""

    fixed: int
    per_expert: int
    kv: int
    state: int
    replicated: int  # per-expert bytes that every rank holds for all experts (router rows)


class Layouts:
    """Where the bytes of one model in one format go, for any expert count and every legal layout."""

    def __init__(self, spec: ModelSpec, fmt: WeightFormat, kv: str, target: Target, serve: ServeSection) -> None:
        self.spec, self.fmt, self.kv, self.target, self.serve = spec, fmt, kv, target, serve
        self._costs: dict[tuple[int, int], list[_Cost]] = {}
        self.legal: list[tuple[Layout, bool]] = []
        self.reasons: list[str] = []
        for layout in layouts(target, serve.tensor_parallel):
            reason, slow = layout_refusal(spec, layout), False
            if reason is None:
                reason, slow = format_refusal(spec, fmt, layout)
            if reason is None:
                self.legal.append((layout, slow))
            else:
                self.reasons.append(f"TP{layout.tp}: {reason}")

    @property
    def refusal(self) -> str | None:
        """Why no layout is legal, or None."""
        if self.legal:
            return None
        return f"no layout over {self.target.gpus} cards: {'; '.join(dict.fromkeys(self.reasons))}"

    @cached_property
    def bits(self) -> float:
        """Mean bits per weight of the routed experts."""
        return weights.expert_bits(self.fmt, self.spec)

    @cached_property
    def _checkpoint(self) -> tuple[int, int]:
        one, two = (weights.checkpoint_bytes(self.fmt, self.spec.with_experts(n)) for n in (1, 2))
        return 2 * one - two, two - one

    def weights_bytes(self, kept: int) -> int:
        """Tensor bytes of the checkpoint with ``kept`` experts."""
        fixed, unit = self._checkpoint
        return fixed + unit * kept

    def file_bytes(self, kept: int) -> int:
        """Bytes on disk; safetensors headers are left out."""
        return self.weights_bytes(kept)

    def fits(self, kept: int) -> bool:
        """Whether some legal layout fits."""
        return any(self._fits(layout, kept) for layout, _ in self.legal)

    def place(self, kept: int) -> Placement:
        """The layout to serve with: of those that fit, Marlin before the slow kernel, more cards, experts split rather
        than dealt out; where none fits, the one that lacks least."""
        fitting = [(layout, slow) for layout, slow in self.legal if self._fits(layout, kept)]
        if fitting:
            layout, slow = min(fitting, key=lambda pair: pair[1])
            return self._placement(layout, kept, slow)
        tried = [self._placement(layout, kept, slow) for layout, slow in self.legal]
        return max(tried, key=lambda placement: placement.fullest.free_bytes)

    def _kind_cost(self, kind: LayerKind, tp: int, ep: int) -> _Cost:
        fixed = unit = replicated = 0
        for group in kind.tensors:
            heads = _kv_heads(kind, self.spec)
            held = weights.shard(self.fmt, group, tp, ep, heads)
            fixed += held.fixed
            if group.role == "expert":
                unit += held.per_expert
            else:
                replicated += held.per_expert
        fixed += _copied_keys(self.fmt, kind, tp, ep, _kv_heads(kind, self.spec))
        size = KV_TYPES[self.kv]["bytes"]
        tokens = 0
        for stream in kind.cache:
            entries = stream.entries(self.serve.context)
            # blocks of a sequence, and one null block
            blocks = -(-entries // BLOCK_TOKENS) * self.serve.concurrency + 1
            # DSA's indexer keys are always fp8 with a float32 scale per 128 (vLLM's DeepseekV32IndexerCache)
            dsa = stream.kind == "index" and self.spec.latent_attention
            entry = stream.elements + 4 * ceil(stream.elements / 128) if dsa else 0
            tokens += blocks * BLOCK_TOKENS * (entry or spread(stream, tp) * size)
        element = DTYPE_BYTES.get(kind.recurrent_dtype, 2)
        state = ceil((kind.conv_elements * 2 + kind.recurrent_elements * element) / (tp if kind.state_heads else 1))
        return _Cost(fixed, unit, tokens, state * self.serve.concurrency, replicated)

    def _layer_costs(self, tp: int, ep: int) -> list[_Cost]:
        key = (tp, 2 if ep > 1 else 1)
        if key not in self._costs:
            per_kind = {id(kind): self._kind_cost(kind, tp, ep) for kind in _kinds(self.spec)}
            self._costs[key] = [per_kind[id(layer.kind)] for layer in self.spec.layers]
        return self._costs[key]

    def _outside(self, layout: Layout) -> tuple[int, int]:
        """Weights outside the layers: on the first stage, and on the last (both where there is one stage)."""
        first = last = 0
        for group in self.spec.outer:
            size = weights.shard(self.fmt, group, layout.tp, layout.ep, self.spec.num_kv_heads).fixed
            if group.role == "embedding":
                first += size
                if self.spec.tied_embeddings and layout.pp > 1:
                    last += size
            else:
                last += size
        return first + 2 * self.spec.vision_parameters, last

    def _reserved(self, layout: Layout) -> tuple[int, int]:
        """Workspace and overhead of a card."""
        many = layout.tp * layout.pp > 1
        absorbed = 0
        if self.spec.latent_attention:  # MLA keeps kv_b_proj once more, in 16 bit, absorbed for decoding
            kv_b = [_kv_b_parameters(layer.kind) for layer in self.spec.layers]
            absorbed = 2 * ceil(sum(kv_b) / layout.pp / layout.tp) + 2 * max(kv_b)
        overhead = _MEMORY["overhead_many_cards" if many else "overhead_one_card"]
        reserve = self.target.vram - int(self.target.total_bytes * utilization(self.target))
        return activation_bytes(self.spec, layout.tp, self.serve.concurrency) + absorbed, overhead + reserve

    def _layer_bytes(self, layout: Layout, kept: int) -> list[int]:
        held = -(-kept // layout.ep)
        return [
            c.fixed + c.per_expert * held + c.replicated * kept + c.kv + c.state
            for c in self._layer_costs(layout.tp, layout.ep)
        ]

    def _stages(self, layout: Layout, costs: list[int], room: int) -> list[int] | None:
        """Layers per stage: vLLM's own division where it fits, else any that does (VLLM_PP_LAYER_PARTITION)."""
        first, last = self._outside(layout)
        even = stage_layers(len(costs), layout.pp)
        start = 0
        for stage, count in enumerate(even):
            size = sum(costs[start : start + count])
            size += (first if stage == 0 else 0) + (last if stage == layout.pp - 1 else 0)
            start += count
            if size > room:
                break
        else:
            return even
        return _partition(costs, layout.pp, first, last, room) if layout.pp > 1 else None

    def _fits(self, layout: Layout, kept: int) -> bool:
        workspace, overhead = self._reserved(layout)
        room = self.target.vram - workspace - overhead
        return self._stages(layout, self._layer_bytes(layout, kept), room) is not None

    def _placement(self, layout: Layout, kept: int, slow: bool) -> Placement:
        tp, pp, ep = layout
        workspace, overhead = self._reserved(layout)
        room = self.target.vram - workspace - overhead
        counts = self._stages(layout, self._layer_bytes(layout, kept), room) or stage_layers(self.spec.num_layers, pp)
        costs, (first, last) = self._layer_costs(tp, ep), self._outside(layout)
        held = -(-kept // ep)
        devices, start = [], 0
        for stage, count in enumerate(counts):
            part = costs[start : start + count]
            start += count
            weight = sum(c.fixed + c.per_expert * held + c.replicated * kept for c in part)
            weight += (first if stage == 0 else 0) + (last if stage == pp - 1 else 0)
            for rank in range(tp):
                devices.append(
                    DeviceBytes(
                        name=self.target.devices[stage * tp + rank].name,
                        capacity_bytes=self.target.vram,
                        weights_bytes=weight,
                        kv_bytes=sum(c.kv for c in part),
                        state_bytes=sum(c.state for c in part),
                        workspace_bytes=workspace,
                        overhead_bytes=overhead,
                    )
                )
        devices += [
            DeviceBytes(name=device.name, capacity_bytes=self.target.vram) for device in self.target.devices[tp * pp :]
        ]
        return Placement(
            tensor_parallel=tp,
            pipeline_parallel=pp,
            expert_parallel=ep,
            layers_per_device=tuple(counts),
            devices=tuple(devices),
            notes=(SLOW,) if slow else (),
        )

    def decode_ceiling(self, kept: int, placement: Placement) -> float | None:
        """Tokens per second of one sequence if every byte it reads came at full bandwidth: the ranks of a stage read at
        once, the stages one after another. None where the bandwidth is not known."""
        if not self.target.bandwidth:
            return None
        tp, ep = placement.tensor_parallel, placement.expert_parallel
        total = 0
        for cost in self._layer_costs(tp, ep):
            # dealt-out experts: the chosen ones lie on several ranks at best
            chosen = -(-self.spec.top_k // ep)
            total += cost.fixed + cost.replicated * kept + cost.per_expert * chosen
            total += (cost.kv + cost.state) // self.serve.concurrency
        total += self._outside(Layout(tp, placement.pipeline_parallel, ep))[1]
        return self.target.bandwidth / total


def _copied_keys(fmt: WeightFormat, kind: LayerKind, tp: int, ep: int, kv_heads: int) -> int:
    """Bytes of k_proj once more: where a layer has no v_proj (Gemma-4's full layers), vLLM loads K into V's rows too."""
    names = {group.name: group for group in kind.tensors if group.parallel == "kv" and group.linears}
    key = next((group for name, group in names.items() if name.endswith("k_proj.weight")), None)
    if key is None or any(name.endswith("v_proj.weight") for name in names):
        return 0
    return weights.shard(fmt, key, tp, ep, kv_heads).fixed


def _kv_b_parameters(kind: LayerKind) -> int:
    return sum(group.unit_parameters for group in kind.tensors if group.name.endswith("kv_b_proj.weight"))


def _kv_heads(kind: LayerKind, spec: ModelSpec) -> int:
    """The KV heads that this kind's k and v rows are made of."""
    return max((stream.heads for stream in kind.cache), default=0) or spec.num_kv_heads


def _partition(costs: list[int], parts: int, first: int, last: int, room: int) -> list[int] | None:
    """Consecutive layers per stage, at least one each, none above ``room``; None when there is no such split."""
    counts, index = [], 0
    for part in range(parts):
        left = room - (first if part == 0 else 0) - (last if part == parts - 1 else 0)
        count = 0
        while index < len(costs) - (parts - 1 - part) and costs[index] <= left:
            left -= costs[index]
            index += 1
            count += 1
        if not count:
            return None
        counts.append(count)
    return counts if index == len(costs) else None


def _geforce(target: Target) -> bool:
    """GeForce cards, whose custom all-reduce over PCIe is unreliable; told by the name where a recipe wrote it."""
    return target.geforce or ("RTX" in target.card and "PRO" not in target.card and "Ada" not in target.card)


def serve_script(plan: Plan, model_path_relative: str, recipe: Recipe) -> str:
    """The text of serve.sh."""
    chosen = plan.chosen
    place = chosen.placement
    tp, pp = place.tensor_parallel, place.pipeline_parallel
    used = place.devices[: tp * pp]
    partition = list(place.layers_per_device)
    values: dict[str, Any] = {
        "gpus": len(used),
        # vLLM refuses to start unless its whole share of a card is free
        "needs": [-(-int(recipe.target.total_bytes * utilization(recipe.target)) // MIB) for _ in used],
        "tp": tp,
        "pp": pp,
        "ep": place.expert_parallel > 1,
        "partition": ",".join(map(str, partition)) if partition != stage_layers(sum(partition), pp) else "",
        "context": chosen.context,
        "sequences": chosen.concurrency,
        "kv": chosen.kv_dtype,
        "utilization": utilization(recipe.target),
        "batched": MAX_BATCHED_TOKENS,
        "no_custom_all_reduce": _geforce(recipe.target) and len(used) > 1,
    }
    return render("vllm.sh.j2", plan, model_path_relative, recipe, values)
