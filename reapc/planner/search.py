"""Chooses engine, format and number of experts: every legal combination is sized per device, what fits is ranked.

Within one engine and format more experts are never worse, so only the largest count that fits is a candidate, and the
largest that keeps llama.cpp's fused router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from reapc.arch import ModelSpec
from reapc.engines import llamacpp, vllm, vllm_rules
from reapc.errors import CannotBeDone
from reapc.formats import weights
from reapc.formats.gguf_sizes import sizes as sizes_of
from reapc.formats.gguf_types import DEFAULT_TYPES, TYPES
from reapc.formats.stored import AsStored
from reapc.plan import Candidate, EngineName, Plan, Refusal
from reapc.planner import prior
from reapc.planner.question import Question, from_recipe, kept_counts, native_format
from reapc.planner.reasons import nothing_fits, reasons
from reapc.recipe import Recipe
from reapc.units import format_bytes

Layouts = llamacpp.Layouts | vllm.Layouts
MAX_RUNNERS_UP = 3
USUAL_RATIO = 0.25


@lru_cache(maxsize=128)
def loss_method(engine: EngineName, fmt: str) -> str:
    """The prior's curve for a format."""
    if engine == "llama.cpp":
        if fmt in ("BF16", "F16", "F32"):
            return "plain"
        if fmt.startswith("MXFP4"):
            return "mxfp4"
        if fmt in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
            return "gguf-legacy"
        return "gguf-iq" if fmt.startswith("IQ") else "gguf-k"
    parsed = weights.parse(fmt)
    assert parsed is not None
    return parsed.method


def quantization_loss(spec: ModelSpec, engine: EngineName, fmt: str, bits: float) -> float:
    """The prior's cost of the format; nothing for the one that the checkpoint is published in."""
    native = native_format(spec)
    if fmt == native:
        return 0.0
    if fmt == "MXFP4_MOE" and native == "mxfp4:experts":  # the experts' blocks are kept, the rest becomes Q8_0
        return prior.quantization_loss("gguf-k", TYPES["Q8_0"].bits_per_weight)
    parsed = weights.parse(fmt) if engine == "vllm" else None
    other = None
    if parsed and parsed.overrides:
        other = weights.other_bits(parsed, spec)
    elif parsed and parsed.experts_only:
        other = prior.UNQUANTIZED_BITS
    return prior.quantization_loss(loss_method(engine, fmt), bits, other)


def kv_choices(engine: EngineName, requested: str) -> tuple[str, ...]:
    """Cache types of an engine that a request admits."""
    return llamacpp.kv_choices(requested) if engine == "llama.cpp" else vllm_rules.kv_choices(requested)


def fixed_experts(engine: EngineName, spec: ModelSpec) -> str | None:
    """Why an engine serves the published expert count only, or None."""
    return llamacpp.fixed_experts(spec) if engine == "llama.cpp" else vllm_rules.fixed_experts(spec)


def served_counts(engine: EngineName, spec: ModelSpec, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Those of ``counts`` that an engine serves."""
    whole = (spec.num_experts,)
    return counts if fixed_experts(engine, spec) is None or spec.num_experts not in counts else whole


def legal(question: Question, engine: EngineName, fmt: str, kv: str) -> str | None:
    """Why this cannot be served at any expert count, or None."""
    spec, target, serve = question.spec, question.target, question.serve
    if engine == "llama.cpp":
        if question.keeps_mtp:
            return 'prune.mtp = "prune" is for vLLM: reapc plans llama.cpp without MTP layers'
        return llamacpp.refusal(spec, fmt, target, serve, kv, question.imatrix)
    parsed = question.format(fmt)
    assert parsed is not None
    if question.stored is not None and parsed is question.stored and question.stored.refusal:
        return question.stored.refusal
    return vllm_rules.refusal(spec, parsed, target, serve, kv)


def layouts_of(question: Question, engine: EngineName, fmt: str, kv: str) -> Layouts:
    """The sizes of a legal combination, for any expert count."""
    if engine == "llama.cpp":
        return llamacpp.Layouts(question.spec, fmt, kv, question.target, question.serve, question.imatrix)
    parsed = question.format(fmt)
    assert parsed is not None
    return vllm.Layouts(question.spec, parsed, kv, question.target, question.serve, question.keeps_mtp)


def least_bytes(question: Question, engine: EngineName, fmt: str) -> int:
    """A lower bound of the weights: the routed experts alone at the fewest allowed, at the format's least bits."""
    if engine == "llama.cpp":
        bits = TYPES["IQ3_XXS" if fmt == "IQ3_XS" else DEFAULT_TYPES[fmt]].bits_per_weight
    else:
        bits = float(min(weights.parse(fmt).widths, default=weights.KEPT_BITS))  # type: ignore[union-attr]
    return int(question.spec.expert_weights * min(question.counts) * bits / 8)


@dataclass
class Found:
    """Everything that a search saw: what fits, what is illegal, and the smallest of what is too large."""

    fitting: list[Candidate]
    refused: list[Refusal]
    smallest: list[Candidate]


def candidate(question: Question, engine: EngineName, fmt: str, kv: str, sizes: Layouts, kept: int) -> Candidate:
    """The configuration with its placement and predicted loss."""
    serve, spec = question.serve, question.spec
    placement = sizes.place(kept)
    loss = prior.combined(
        quantization_loss(spec, engine, fmt, sizes.bits),
        question.prune_loss(kept),
        prior.kv_loss(kv),
        router_cost(spec, engine, kept),
    )
    return Candidate(
        engine=engine,
        format=fmt,
        experts_kept=kept,
        prune_ratio=1 - kept / spec.num_experts,
        context=serve.context,
        concurrency=serve.concurrency,
        kv_dtype=kv,
        file_bytes=sizes.file_bytes(kept),
        weights_bytes=sizes.weights_bytes(kept),
        kv_bytes=sum(device.kv_bytes for device in placement.devices),
        bits_per_expert_weight=sizes.bits,
        predicted_loss=loss,
        decode_tokens_per_second_ceiling=sizes.decode_ceiling(kept, placement),
        placement=placement,
    )


def search(question: Question, *, exhaustive: bool = True) -> Found:
    """Every legal combination of ``question``. Not ``exhaustive``: formats in the order of their own loss, without
    sizing what cannot fit, nor what would lose more than the best found even with every expert (``smallest`` then holds
    only what was sized)."""
    found = Found([], [], [])
    total = sum(device.capacity_bytes for device in question.target.devices) + question.target.ram
    whole = (question.spec.num_experts,)
    best = inf
    for bound, engine, fmt in _in_order(question, exhaustive):
        counts = question.counts
        fixed = fixed_experts(engine, question.spec)
        if fixed is not None and counts != whole:
            if whole[0] not in counts:
                found.refused.append(Refusal(engine=engine, format=fmt, reason=fixed))
                continue
            counts = whole
        for kv in kv_choices(engine, question.serve.kv_cache):
            reason = legal(question, engine, fmt, kv)
            if reason is None and not exhaustive and (least := least_bytes(question, engine, fmt)) > total:
                reason = (
                    f"with {min(counts)} of {whole[0]} experts, the fewest allowed, the experts alone need "
                    f"{format_bytes(least)}, and all memory is {format_bytes(total)}"
                )
            if reason is None and bound > best:
                continue
            sizes = None if reason else layouts_of(question, engine, fmt, kv)
            if isinstance(sizes, vllm.Layouts):
                reason = sizes.refusal
            if reason or sizes is None:
                found.refused.append(Refusal(engine=engine, format=fmt, reason=reason or ""))
                continue
            kept = _largest_fitting(sizes, counts)
            if kept is None:
                worst = candidate(question, engine, fmt, kv, sizes, counts[-1])
                found.smallest.append(worst)
                lack = _lack(worst, question.spec)
                found.refused.append(Refusal(engine=engine, format=fmt, experts=counts[-1], reason=lack))
                continue
            for count in {kept, _fused(question.spec, engine, counts, kept)}:
                item = candidate(question, engine, fmt, kv, sizes, count)
                found.fitting.append(item)
                best = min(best, item.predicted_loss) if not exhaustive else best
            if best == 0:
                return found
    return found


def _in_order(question: Question, exhaustive: bool) -> list[tuple[float, EngineName, str]]:
    """The engines and formats to try, each with the loss that it has with every expert; the least first unless all are
    tried anyway. A format that the model's shapes do not admit gets no loss: it is refused when its turn comes."""
    if exhaustive:
        return [(0.0, engine, fmt) for engine, fmt in question.pairs]
    spec, found = question.spec, []
    for engine, fmt in question.pairs:
        bits = _bits(question, engine, fmt)
        found.append((0.0 if bits is None else quantization_loss(spec, engine, fmt, bits), engine, fmt))
    return sorted(found, key=lambda row: row[0])


def _bits(question: Question, engine: EngineName, fmt: str) -> float | None:
    """Mean bits per expert weight of a format, None where the model cannot be stored in it."""
    spec = question.spec
    if engine == "llama.cpp":
        return sizes_of(spec, fmt, question.imatrix).expert_bits if spec.gguf_arch else None
    parsed = question.format(fmt)
    if parsed is None or weights.misfit(parsed, spec):
        return None
    return weights.expert_bits(parsed, spec)


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Best first: least loss, then more experts, faster, smaller; one per engine, format and cache type."""
    ordered = sorted(
        candidates,
        key=lambda c: (
            c.predicted_loss, -c.experts_kept, len(c.placement.notes), c.placement.offloaded_layers,
            -(c.decode_tokens_per_second_ceiling or 0.0), c.file_bytes,
        ),
    )  # fmt: skip
    seen: set[tuple[str, str, str]] = set()
    result = []
    for item in ordered:
        key = (item.engine, item.format, item.kv_dtype)
        if key not in seen:
            seen.add(key)
            result.append(item)
    return result


def _largest_fitting(sizes: Layouts, counts: tuple[int, ...]) -> int | None:
    """The first of ``counts`` (descending) that fits, by bisection: fewer experts never need more bytes."""
    if sizes.fits(counts[0]):
        return counts[0]
    low, high = 1, len(counts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sizes.fits(counts[middle]) else (middle + 1, high)
    return counts[low] if low < len(counts) else None


def router_cost(spec: ModelSpec, engine: EngineName, kept: int) -> float:
    """The cost of a count that loses llama.cpp's fused CUDA top-k; nothing where the whole model had none. The same on
    every target: a card beside the RAM would add it otherwise, and more memory must never cost more."""
    whole = prior.router_cost(spec.num_experts, engine, "cuda")
    return max(0.0, prior.router_cost(kept, engine, "cuda") - whole)


def _fused(spec: ModelSpec, engine: EngineName, counts: tuple[int, ...], kept: int) -> int:
    """The largest allowed count up to ``kept`` without a router cost."""
    return next((n for n in counts if n <= kept and router_cost(spec, engine, n) == 0), kept)


def _lack(item: Candidate, spec: ModelSpec) -> str:
    """Which device is fullest and by how much, at the fewest experts allowed."""
    device = item.placement.fullest
    return (
        f"with {item.experts_kept} of {spec.num_experts} experts, the fewest allowed, {device.name} needs "
        f"{format_bytes(device.used_bytes)} and has {format_bytes(device.capacity_bytes)}: "
        f"{format_bytes(-device.free_bytes)} too much"
    )


def answer(question: Question, criterion: str = "reap") -> Plan:
    """The plan for a question; CannotBeDone with the smallest changes that would help when nothing fits."""
    found = search(question)
    if not found.fitting:
        raise _hopeless(question, found)
    ranked = rank(found.fitting)
    source = "measured" if question.measured is not None else "prior"
    return Plan(
        model=question.model,
        family=question.spec.family,
        target=question.target.name,
        num_experts=question.spec.num_experts,
        top_k=question.spec.top_k,
        criterion=criterion,
        chosen=ranked[0],
        loss_source=source,
        reasons=tuple([*reasons(question, ranked, found.refused, source), *_usual(question, ranked[0])]),
        runners_up=tuple(ranked[1 : 1 + MAX_RUNNERS_UP]),
        refused=tuple(found.refused),
    )


def _usual(question: Question, best: Candidate) -> list[str]:
    """Where the recipe allows more pruning than people usually dare: what the usual ratio gives, and would need."""
    if question.max_ratio <= USUAL_RATIO or question.counts_fixed:
        return []
    spec = question.spec
    counts = kept_counts(spec, max_ratio=USUAL_RATIO)
    usual = f"With {USUAL_RATIO:.0%} pruned ({min(counts)} of {spec.num_experts} experts)"
    lines: list[str] = []
    needs: list[str] = []
    if best.prune_ratio > USUAL_RATIO:
        fitting = rank(search(replace(question, counts=counts)).fitting)
        if fitting:
            other = fitting[0]
            lines.append(f"{usual} or less the best is {other.engine} {other.format}, KL {other.predicted_loss:.4f}.")
    for engine, fmt in reversed(question.pairs):
        if engine != best.engine or legal(question, engine, fmt, best.kv_dtype) or len(needs) == MAX_RUNNERS_UP:
            continue
        sizes = layouts_of(question, engine, fmt, best.kv_dtype)
        if isinstance(sizes, vllm.Layouts) and not sizes.legal:
            continue
        fullest = sizes.place(min(counts)).fullest
        if fullest.free_bytes < 0:
            needs.append(f"{fmt} {format_bytes(fullest.used_bytes)}")
    if needs:
        has = format_bytes(best.placement.fullest.capacity_bytes)
        lines.append(f"{usual} the fullest device, which has {has}, would need: {', '.join(needs)}.")
    return lines


def nearest_fits(question: Question, best: list[Candidate]) -> Callable[[Question], bool]:
    """A test whether the first of ``best`` fits in a changed question, at the fewest experts that it allows."""

    def fits(changed: Question) -> bool:
        for item in best:
            recounted = changed.counts != question.counts
            if recounted and fixed_experts(item.engine, changed.spec):
                continue
            if layouts_of(changed, item.engine, item.format, item.kv_dtype).fits(min(changed.counts)):
                return True
        return False

    return fits


def _hopeless(question: Question, found: Found) -> CannotBeDone:
    best = sorted(found.smallest, key=lambda c: max(d.used_bytes for d in c.placement.devices))[:1]
    return nothing_fits(question, best, found.refused, nearest_fits(question, best))


def make_plan(
    recipe: Recipe,
    spec: ModelSpec,
    model_name: str,
    measured: Callable[[int], float] | None = None,
    *,
    buildable: bool = False,
    stored: AsStored | None = None,
) -> Plan:
    """The plan of a recipe. ``buildable``: only what this version of ``reapc build`` can write. ``stored``: the
    checkpoint's own format with its bytes, where it is at hand."""
    question = from_recipe(recipe, spec, model_name, measured, buildable, stored)
    return answer(question, "reap" if recipe.prune.method == "auto" else recipe.prune.method)
