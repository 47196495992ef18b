"""vLLM: what every card holds in each layout that it accepts (``vllm_rules.py``); its script is ``vllm_launch.py``.

Read in vLLM 0.33.0 (facts/vllm-legality.md; ``vllm.toml``); none of it was run on a card by us. Weights and KV are
exact from shapes, the rest is a model and carries its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import ceil
from typing import NamedTuple

from reapc.arch import LayerKind, ModelSpec
from reapc.arch.spec import DTYPE_BYTES
from reapc.engines.cache import spread
from reapc.engines.split import fill
from reapc.engines.vllm_rules import DATA, KV_TYPES, Layout, format_refusal, kinds_of, layout_refusal, layouts
from reapc.formats import shards, weights
from reapc.formats.weights import WeightFormat
from reapc.plan import DeviceBytes, Placement
from reapc.recipe import ServeSection
from reapc.target import Target

NAME = "vllm"
MIB = 2**20
_MEMORY = DATA["memory"]
BLOCK_TOKENS: int = _MEMORY["block_tokens"]
MAX_BATCHED_TOKENS: int = _MEMORY["max_batched_tokens"]
FLOAT32_ROUTER = frozenset(DATA["float32_router"]["families"])
GPU_MEMORY_UTILIZATION: float = _MEMORY["utilization"]
SLOW = "slow: the generic moe_wna16 kernel, Marlin refuses this group"


def utilization(target: Target) -> float:
    """--gpu-memory-utilization, a fraction of the card's total: less where not all of that is free."""
    return min(GPU_MEMORY_UTILIZATION, int(target.vram / target.total_bytes * 1000) / 1000)


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
    for kind in kinds_of(spec):
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


class _Draft(NamedTuple):
    """Bytes of the MTP layers on one card of the last stage."""

    weights: int
    kv: int
    state: int


class Layouts:
    """Where the bytes of one model in one format go, for any expert count and every legal layout."""

    def __init__(
        self, spec: ModelSpec, fmt: WeightFormat, kv: str, target: Target, serve: ServeSection, keeps_mtp: bool = False
    ) -> None:
        self.spec, self.fmt, self.kv, self.target, self.serve = spec, fmt, kv, target, serve
        self._costs: dict[tuple[int, int], list[_Cost]] = {}
        # with speculative decoding the MTP layers lie whole on the last stage
        self.drafts = spec.mtp_layers if serve.speculative == "mtp" else ()
        self.keeps_mtp = keeps_mtp or bool(self.drafts)  # the file has them; vLLM loads them for drafting only
        self._drafting: dict[tuple[int, int], list[_Cost]] = {}
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
        mtp = self.keeps_mtp
        one, two = (weights.checkpoint_bytes(self.fmt, self.spec.with_experts(n), mtp=mtp) for n in (1, 2))
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

    def _kind_cost(self, fmt: WeightFormat, kind: LayerKind, tp: int, ep: int, layer: int | None) -> _Cost:
        fixed = unit = replicated = 0
        for group in kind.tensors:
            heads = heads_of(kind, self.spec)
            held = shards.shard(fmt, group, tp, ep, heads, layer)
            fixed += held.fixed
            if group.role == "expert":
                unit += held.per_expert
            else:
                wide = group.role == "router" and not group.dtype and self.spec.family in FLOAT32_ROUTER
                replicated += held.per_expert * (2 if wide else 1)
        fixed += copied_keys(fmt, kind, tp, ep, heads_of(kind, self.spec), layer)
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
            known: dict[tuple[int, int | None], _Cost] = {}
            for layer in self.spec.layers:
                kind = (id(layer.kind), layer.index if self.fmt.by_layer else None)
                if kind not in known:
                    known[kind] = self._kind_cost(self.fmt, layer.kind, tp, ep, kind[1])
                self._costs.setdefault(key, []).append(known[kind])
        return self._costs[key]

    def _draft(self, layout: Layout, kept: int) -> _Draft:
        """What the MTP layers add to each card of the last stage: every tensor that the checkpoint stores for them
        (vLLM may share the embedding and the head, which is not counted on), and a cache like any layer's."""
        if not self.drafts:
            return _Draft(0, 0, 0)
        tp, ep = layout.tp, layout.ep
        key = (tp, 2 if ep > 1 else 1)
        if key not in self._drafting:
            fmt, heads = weights.of_mtp(self.fmt), self.spec.num_kv_heads
            layers = [(layer.kind, layer.index if fmt.by_layer else None) for layer in self.drafts]
            self._drafting[key] = [self._kind_cost(fmt, kind, tp, ep, index) for kind, index in layers]
            outer = sum(shards.shard(fmt, group, tp, ep, heads).fixed for group in self.spec.mtp_outer)
            self._drafting[key].append(_Cost(outer, 0, 0, 0, 0))
        costs, held = self._drafting[key], -(-kept // ep)
        return _Draft(
            sum(c.fixed + c.per_expert * held + c.replicated * kept for c in costs),
            sum(c.kv for c in costs),
            sum(c.state for c in costs),
        )

    def _outside(self, layout: Layout) -> tuple[int, int]:
        """Weights outside the layers: on the first stage, and on the last (both where there is one stage)."""
        first = last = 0
        for group in self.spec.outer:
            size = shards.shard(self.fmt, group, layout.tp, layout.ep, self.spec.num_kv_heads).fixed
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

    def _stages(self, layout: Layout, kept: int, room: int) -> list[int] | None:
        """Layers per stage: vLLM's own division where it fits, else any that does (VLLM_PP_LAYER_PARTITION)."""
        costs = self._layer_bytes(layout, kept)
        first, last = self._outside(layout)
        last += sum(self._draft(layout, kept))
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
        return fill(costs, layout.pp, first, last, room) if layout.pp > 1 else None

    def _fits(self, layout: Layout, kept: int) -> bool:
        workspace, overhead = self._reserved(layout)
        room = self.target.vram - workspace - overhead
        return self._stages(layout, kept, room) is not None

    def _placement(self, layout: Layout, kept: int, slow: bool) -> Placement:
        workspace, overhead = self._reserved(layout)
        room = self.target.vram - workspace - overhead
        counts = self._stages(layout, kept, room) or stage_layers(self.spec.num_layers, layout.pp)
        return self.placed(layout, kept, counts, slow)

    def placed(self, layout: Layout, kept: int, counts: Sequence[int], slow: bool = False) -> Placement:
        """What every card holds with so many layers in each pipeline stage."""
        tp, pp, ep = layout
        workspace, overhead = self._reserved(layout)
        draft = self._draft(layout, kept)
        costs, (first, last) = self._layer_costs(tp, ep), self._outside(layout)
        held = -(-kept // ep)
        devices, start = [], 0
        for stage, count in enumerate(counts):
            part = costs[start : start + count]
            start += count
            weight = sum(c.fixed + c.per_expert * held + c.replicated * kept for c in part)
            drafted = draft if stage == pp - 1 else _Draft(0, 0, 0)
            weight += (first if stage == 0 else 0) + (last + draft.weights if stage == pp - 1 else 0)
            for rank in range(tp):
                devices.append(
                    DeviceBytes(
                        name=self.target.devices[stage * tp + rank].name,
                        capacity_bytes=self.target.vram,
                        weights_bytes=weight,
                        kv_bytes=sum(c.kv for c in part) + drafted.kv,
                        state_bytes=sum(c.state for c in part) + drafted.state,
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


def copied_keys(fmt: WeightFormat, kind: LayerKind, tp: int, ep: int, kv_heads: int, layer: int | None) -> int:
    """Bytes of k_proj once more: where a layer has no v_proj (Gemma-4's full ones), vLLM loads K into V's rows too."""
    names = {group.name: group for group in kind.tensors if group.parallel == "kv" and group.linears}
    key = next((group for name, group in names.items() if name.endswith("k_proj.weight")), None)
    if key is None or any(name.endswith("v_proj.weight") for name in names):
        return 0
    return shards.shard(fmt, key, tp, ep, kv_heads, layer).fixed


def _kv_b_parameters(kind: LayerKind) -> int:
    return sum(group.unit_parameters for group in kind.tensors if group.name.endswith("kv_b_proj.weight"))


def heads_of(kind: LayerKind, spec: ModelSpec) -> int:
    """The KV heads that this kind's k and v rows are made of."""
    return max((stream.heads for stream in kind.cache), default=0) or spec.num_kv_heads
