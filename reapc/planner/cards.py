"""A vLLM plan's cards as budgets of an allocation, what can be served there, and the plan with the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from reapc.arch import ModelSpec
from reapc.arch.spec import LayerKind, TensorGroup
from reapc.engines import vllm, vllm_rules
from reapc.engines.vllm_rules import Layout
from reapc.errors import CannotBeDone
from reapc.formats import shards, weights, writers
from reapc.formats.weights import GROUPS, Method, WeightFormat
from reapc.plan import Plan
from reapc.planner import prior
from reapc.planner.allocate import Ints, Problem
from reapc.planner.checkpoint_units import KEPT, CheckpointParts, Unit, checkpoint_parts, stored_as
from reapc.planner.devices import Taken, carried
from reapc.planner.question import Question

_INTEGERS = ("auto-round", "ct", "gptq")


class Cards:
    """Where the layers of a vLLM plan lie: in its layout of cards, whatever the widths. One rank of each pipeline stage
    stands for all of it, since they hold as much."""

    def __init__(self, plan: Plan, question: Question) -> None:
        place = plan.chosen.placement
        self.question = question
        self.layout = Layout(place.tensor_parallel, place.pipeline_parallel, place.expert_parallel)
        self.stages = place.layers_per_device
        self.slow = vllm.SLOW in place.notes
        self.stage_of = [stage for stage, count in enumerate(self.stages) for _ in range(count)]
        self._known: dict[tuple[str, str, tuple[int, ...]], Ints] = {}
        self._kinds: dict[TensorGroup, LayerKind] = {
            group: layer.kind for layer in question.spec.layers for group in layer.kind.tensors
        }

    def methods(self, method: str = "auto") -> list[CheckpointParts]:
        """The units of a checkpoint of each method that the question's formats are of, a writer of the recipe's
        quantize.method writes, and vLLM serves in the layout."""
        vllm_formats = (name for engine, name in self.question.pairs if engine == "vllm")
        found = parts_of_methods(
            self.question.spec, vllm_formats, lambda fmt: self._written(fmt, method) and self._legal(fmt),
            self._refusal, self.question.keeps_mtp,
        )  # fmt: skip
        if not found:
            raise CannotBeDone(
                "quantize.allocate = true, and no format that can be written leaves anything to choose on this target",
                hint="set quantize.allocate = false, or leave quantize.method and group_size out",
            )
        return found

    def _written(self, fmt: WeightFormat, method: str) -> bool:
        return writers.writer(fmt, method, self.question.spec) is not None

    def _legal(self, fmt: WeightFormat) -> bool:
        """Whether the card has kernels for it: what depends on shapes is asked for each unit."""
        question = self.question
        reason = vllm_rules.refusal(question.spec, fmt, question.target, question.serve, "auto")
        return reason is None or reason == weights.misfit(fmt, question.spec)

    def _refusal(self, fmt: WeightFormat, group: TensorGroup) -> str | None:
        reason, slow = vllm_rules.group_refusal(self.question.spec, fmt, group, self.layout)
        return vllm.SLOW if reason is None and slow and not self.slow else reason

    def caches(self) -> dict[str, float]:
        """The KV types that may be served, with the prior's loss of each."""
        question = self.question
        plain = weights.plain("plain", weights.KEPT_BITS, 0)
        kinds = vllm_rules.kv_choices(question.serve.kv_cache)
        return {
            kind: prior.kv_loss(kind)
            for kind in kinds
            if vllm_rules.refusal(question.spec, plain, question.target, question.serve, kind) is None
        }

    def _sizes(self, fmt: WeightFormat, kv: str) -> vllm.Layouts:
        question = self.question
        return vllm.Layouts(question.spec, fmt, kv, question.target, question.serve, question.keeps_mtp)

    def rank_bytes(self, unit: Unit, kind: str) -> Callable[[int], int]:
        """What one rank holds of a unit, by the number of experts."""
        fmt, (tp, _, ep) = stored_as(kind), self.layout
        fixed = each = 0
        for group in unit.groups:
            heads = vllm.heads_of(self._kinds[group], self.question.spec)
            held = shards.shard(fmt, group, tp, ep, heads, unit.layer)
            fixed, each = fixed + held.fixed, each + held.per_expert
        if unit.part == "attention":
            layer = self._kinds[unit.groups[0]]
            fixed += vllm.copied_keys(fmt, layer, tp, ep, vllm.heads_of(layer, self.question.spec), unit.layer)
        return lambda count: fixed + each * -(-count // ep)

    def _free(self, parts: CheckpointParts, kv: str, counts: tuple[int, ...]) -> Ints:
        """(counts, stages) bytes that are free on a card with every unit in 16 bit; less than none where it is full."""
        drafting = (
            parts.method if self.question.serve.speculative == "mtp" else ""
        )  # only what drafts differs by method
        key = (drafting, kv, counts)
        if key not in self._known:
            sizes, tp = self._sizes(parts.unquantized, kv), self.layout.tp
            rows = [sizes.placed(self.layout, count, self.stages).devices for count in counts]
            free = [[devices[stage * tp].free_bytes for stage in range(self.layout.pp)] for devices in rows]
            self._known[key] = np.array(free, np.int64)
        return self._known[key]

    def budgets(self, problem: Problem, parts: CheckpointParts, types: tuple[str, ...]) -> Problem:
        """``problem`` with the bytes of a rank and what the cards of each stage have left for the units, beside a cache
        of every type."""
        counts = problem.experts.tolist()
        whole = parts.tabulate(counts, (KEPT,), self.rank_bytes)[:, :, 0]
        stage = np.array([self.stage_of[unit.layer] for unit in parts.groups])
        units = np.stack([whole[:, stage == index].sum(axis=1) for index in range(self.layout.pp)], axis=1)

        def beside(kind: str) -> Ints:
            left: Ints = self._free(parts, kind, tuple(counts)) + units
            return left

        caches = self.caches()
        placed = replace(
            problem,
            bytes=parts.tabulate(counts, types, self.rank_bytes),
            device=np.tile(stage, (len(counts), 1)),
            capacity=np.zeros((len(counts), self.layout.pp), np.int64),
        )
        return placed.with_caches(caches, beside)

    def planned(self, plan: Plan, parts: CheckpointParts, taken: Taken) -> Plan:
        """The plan with what was taken: its bytes, devices, count, KV type and loss."""
        fmt = parts.format(taken.groups)
        sizes = self._sizes(fmt, taken.kv)
        refused = vllm_rules.format_refusal(self.question.spec, fmt, self.layout)[0]
        assert refused is None, refused
        placement = sizes.placed(self.layout, taken.experts, self.stages, self.slow)
        total = sizes.weights_bytes(taken.experts)
        bits = 8 * total / self.question.spec.with_experts(taken.experts).parameters
        return carried(
            plan, self.question.spec, taken, placement, f"mix of {parts.method} widths, {bits:.2f} bits",
            file_bytes=sizes.file_bytes(taken.experts),
            weights_bytes=total,
            decode_tokens_per_second_ceiling=sizes.decode_ceiling(taken.experts, placement),
        )  # fmt: skip


def parts_of_methods(
    spec: ModelSpec,
    names: Iterable[str],
    admitted: Callable[[WeightFormat], bool],
    served: Callable[[WeightFormat, TensorGroup], str | None],
    mtp: bool = False,
) -> list[CheckpointParts]:
    """The units of a checkpoint of each method that quantized formats among ``names`` are of, in every width that is
    ``admitted`` and the group sizes named; methods that leave nothing to choose are left out. ``served`` as in
    ``checkpoint_parts``."""
    named: dict[Method, set[int]] = {}
    for fmt in map(weights.parse, names):
        if fmt is not None and fmt.quantized and not fmt.overrides:
            named.setdefault(fmt.method, set()).add(fmt.group_size)
    found: list[CheckpointParts] = []
    for method, groups in named.items():
        try:
            formats = [fmt for fmt in _plain(method, groups) if admitted(fmt)]
            found.append(checkpoint_parts(spec, method, formats, served, mtp))
        except CannotBeDone:
            continue
    return found


def _plain(method: Method, groups: set[int]) -> list[WeightFormat]:
    """Every plain format of a method with these group sizes, the widest first."""
    if method not in _INTEGERS:
        return [weights.plain(method, 8, group) for group in groups]
    widths = {bits for writer in writers.WRITERS.get(method, ()) for bits in writer.bits}
    allowed = [group for group in GROUPS if group in groups]
    return [weights.plain(method, bits, group) for bits in sorted(widths, reverse=True) for group in allowed]
