"""Chooses engine, format and number of experts: every legal combination is sized per device, what fits is ranked.

Within one engine and format more experts are never worse, so only the largest count that fits is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor
from types import ModuleType
from typing import Literal

from reapc.arch import ModelSpec
from reapc.engines import llamacpp, vllm
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import gguf, safetensors
from reapc.plan import Candidate, Placement, Plan, Refusal
from reapc.planner import prior
from reapc.recipe import Recipe
from reapc.target import Target
from reapc.units import format_bytes

EngineName = Literal["llama.cpp", "vllm"]
ENGINES: dict[EngineName, ModuleType] = {"llama.cpp": llamacpp, "vllm": vllm}
GGUF_AUTO = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS")
NOT_YET = {"auto_round": "AutoRound", "gptq": "GPTQ"}
MIXTRAL_EXPERTS = 8  # llama-quantize takes any model with 8 experts for Mixtral
MAX_RUNNERS_UP = 3


@dataclass
class _Search:
    """One question: the model, what is wanted, and the sizes that were computed on the way."""

    recipe: Recipe
    spec: ModelSpec
    measured: Callable[[int], float] | None
    specs: dict[int, ModelSpec] = field(default_factory=dict)

    def pruned(self, kept: int) -> ModelSpec:
        if kept not in self.specs:
            self.specs[kept] = self.spec if kept == self.spec.num_experts else self.spec.with_experts(kept)
        return self.specs[kept]

    def prune_loss(self, kept: int) -> float:
        if kept == self.spec.num_experts:
            return 0.0
        if self.measured is not None:
            return self.measured(kept)
        return prior.pruning_loss(1 - kept / self.spec.num_experts)

    def place(self, engine: EngineName, fmt: str, kept: int, target: Target | None = None) -> Placement:
        placement: Placement = ENGINES[engine].place(self.pruned(kept), fmt, target or self.recipe.target, self.recipe)
        return placement

    def candidate(self, engine: EngineName, fmt: str, kept: int) -> Candidate:
        spec, serve = self.pruned(kept), self.recipe.serve
        placement = self.place(engine, fmt, kept)
        if engine == "llama.cpp":
            tensors = gguf.tensor_types(spec, fmt, self.recipe.quantize.imatrix)
            bits, weights = gguf.expert_bits(tensors), sum(tensor.data_bytes for tensor in tensors)
            data = gguf.weights_bytes(spec, fmt, self.recipe.quantize.imatrix)
            file_bytes = data + gguf.file_overhead_bytes(spec, fmt)
        else:
            bits, weights = prior.UNQUANTIZED_BITS, safetensors.checkpoint_bytes(spec)
            file_bytes = weights
        return Candidate(
            engine=engine,
            format=fmt,
            experts_kept=kept,
            prune_ratio=1 - kept / self.spec.num_experts,
            context=serve.context,
            concurrency=serve.concurrency,
            kv_dtype=ENGINES[engine].kv_type(serve.kv_cache),
            file_bytes=file_bytes,
            weights_bytes=weights,
            kv_bytes=sum(device.kv_bytes for device in placement.devices),
            bits_per_expert_weight=bits,
            predicted_loss=prior.quantization_loss(bits) + self.prune_loss(kept),
            placement=placement,
        )


def kept_counts(recipe: Recipe, spec: ModelSpec) -> list[int]:
    """Expert counts that the recipe allows, largest first; ReapcError where it leaves fewer than top-k."""
    total, top_k, prune = spec.num_experts, spec.top_k, recipe.prune
    if prune.method == "none":
        return [total]
    if prune.experts != "auto" or prune.ratio != "auto":
        kept, asked = total, f"prune.experts = {prune.experts}"
        if prune.experts != "auto":
            kept = prune.experts
        elif prune.ratio != "auto":
            kept, asked = total - _floor(total * prune.ratio), f"prune.ratio = {prune.ratio}"
        if kept > total:
            raise ReapcError(f"{asked}: the model has {total} experts", hint=f"at most {total}")
        if kept < top_k:
            raise ReapcError(
                f"{asked} leaves {kept} of {total} experts, and every token is sent to {top_k}",
                hint=f"the largest ratio possible is {_round_down((total - top_k) / total)} ({top_k} experts)",
            )
        counts = [kept]
    else:
        lowest = max(top_k, total - _floor(total * prune.max_ratio))
        counts = list(range(total, lowest - 1, -1))
    grouped = [kept for kept in counts if kept % spec.n_group == 0]
    if not grouped:
        raise ReapcError(f"{counts[0]} experts do not divide into the router's {spec.n_group} groups")
    return grouped


def _floor(value: float) -> int:
    return floor(value + 1e-9)  # 0.3 * 10 is 2.9999999999999996


def _round_down(ratio: float) -> float:
    return floor(ratio * 10_000) / 10_000


def wanted_formats(recipe: Recipe) -> list[tuple[EngineName, str]]:
    """Pairs of engine and format that the recipe admits; CannotBeDone for a quantizer that is not there yet."""
    quantize, serve = recipe.quantize, recipe.serve
    if quantize.method in NOT_YET:
        raise CannotBeDone(
            f'quantize.method = "{quantize.method}": the {NOT_YET[quantize.method]} driver is not in this version',
            hint='quantize.method = "gguf" quantizes for llama.cpp; "none" keeps bf16',
        )
    plain: list[tuple[EngineName, str]] = [("vllm", safetensors.UNQUANTIZED), ("llama.cpp", "BF16")]
    pairs = list(plain)
    if quantize.format != "auto":
        fmt = gguf.check_format(quantize.format)
        pairs = plain if fmt == "BF16" else [("llama.cpp", fmt)]
        if quantize.method == "none" and fmt != "BF16":
            raise ReapcError(f'quantize.format = "{quantize.format}" but quantize.method = "none"')
    elif quantize.method != "none":
        names: Sequence[str] = GGUF_AUTO if quantize.bits == "auto" else tuple(gguf.DEFAULT_TYPES)
        pairs = [plain[0], *(("llama.cpp", name) for name in names)]
        if quantize.method == "gguf":
            pairs = [pair for pair in pairs if pair[1] not in ("BF16", safetensors.UNQUANTIZED)]
    if quantize.bits != "auto":
        pairs = [pair for pair in pairs if _nominal_bits(pair[1]) == quantize.bits]
        if not pairs:
            raise CannotBeDone(
                f"quantize.bits = {quantize.bits}: no such format (1 to 6, 8 or 16 bits), or another key excludes it"
            )
    if serve.engine != "auto":
        chosen = [pair for pair in pairs if pair[0] == serve.engine]
        if not chosen:
            names = [pair[1] for pair in pairs]
            raise CannotBeDone(
                f'serve.engine = "{serve.engine}" cannot serve {", ".join(names)}',
                hint='GGUF needs serve.engine = "llama.cpp"; vLLM serves quantize.method = "none" in this version',
            )
        pairs = chosen
    return pairs


def _nominal_bits(fmt: str) -> int:
    """The number in a format's name: 4 for Q4_K_M, 16 for bf16."""
    return int("".join(c for c in fmt.split("_")[0] if c.isdigit()))


def make_plan(recipe: Recipe, spec: ModelSpec, model_name: str, measured: Callable[[int], float] | None = None) -> Plan:
    """The best configuration that fits; CannotBeDone says what would.

    ``measured``: experts kept -> loss of pruning to that many, in place of the prior's guess.
    """
    if recipe.serve.context > spec.max_context:
        raise ReapcError(
            f"serve.context = {recipe.serve.context}: the model knows {spec.max_context} positions",
            hint=f"serve.context = {spec.max_context} or less",
        )
    counts = kept_counts(recipe, spec)
    search = _Search(recipe, spec, measured)
    fitting: list[Candidate] = []
    refused: list[Refusal] = []
    smallest: list[Candidate] = []
    for engine, fmt in wanted_formats(recipe):
        if reason := ENGINES[engine].legal(spec, fmt, recipe.target, recipe):
            refused.append(Refusal(engine=engine, format=fmt, reason=reason))
            continue
        allowed = _without_mixtral(counts, spec) if engine == "llama.cpp" else counts
        kept = _largest_fitting(search, engine, fmt, allowed)
        if kept is None:
            low = search.candidate(engine, fmt, allowed[-1])
            smallest.append(low)
            refused.append(Refusal(engine=engine, format=fmt, experts=low.experts_kept, reason=_lack(low, spec)))
        else:
            fitting.append(search.candidate(engine, fmt, kept))
    if recipe.quantize.method == "auto" and recipe.serve.engine != "llama.cpp" and recipe.target.gpus:
        reason = "its quantizer driver is not in this version"
        refused += [Refusal(engine="vllm", format=name, reason=reason) for name in NOT_YET]
    if not fitting:
        raise _nothing_fits(search, smallest, refused)
    ranked = sorted(fitting, key=lambda c: (c.predicted_loss, -c.experts_kept, c.file_bytes))
    best = ranked[0]
    source = "measured" if measured is not None else "prior"
    return Plan(
        model=model_name,
        family=spec.family,
        target=recipe.target.name,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        criterion="reap" if recipe.prune.method == "auto" else recipe.prune.method,
        chosen=best,
        loss_source=source,
        reasons=tuple(_reasons(best, ranked[1:], refused, spec, source)),
        runners_up=tuple(ranked[1 : 1 + MAX_RUNNERS_UP]),
        refused=tuple(refused),
    )


def _without_mixtral(counts: list[int], spec: ModelSpec) -> list[int]:
    """``counts`` without 8, which llama-quantize treats as Mixtral; a single count that was asked for stays."""
    if spec.num_experts == MIXTRAL_EXPERTS or len(counts) == 1:
        return counts
    return [kept for kept in counts if kept != MIXTRAL_EXPERTS]


def _largest_fitting(search: _Search, engine: EngineName, fmt: str, counts: list[int]) -> int | None:
    """The first of ``counts`` (descending) that fits, by bisection: fewer experts never need more bytes."""
    low, high = 0, len(counts)
    while low < high:
        middle = (low + high) // 2
        if all(d.free_bytes >= 0 for d in search.place(engine, fmt, counts[middle]).devices):
            high = middle
        else:
            low = middle + 1
    return counts[low] if low < len(counts) else None


def _lack(candidate: Candidate, spec: ModelSpec) -> str:
    """Which device is fullest and by how much, at the fewest experts allowed."""
    device = min(candidate.placement.devices, key=lambda d: d.free_bytes)
    return (
        f"with {candidate.experts_kept} of {spec.num_experts} experts, the fewest allowed, {device.name} needs "
        f"{format_bytes(device.used_bytes)} and has {format_bytes(device.capacity_bytes)}: "
        f"{format_bytes(-device.free_bytes)} too much"
    )


def _needed_capacity(search: _Search, candidate: Candidate) -> int:
    """The smallest bytes per device (card, or RAM) with which ``candidate`` fits, exact by bisection."""
    target = search.recipe.target
    key = "vram" if target.gpus else "ram"
    names = {device.name for device in target.devices}

    def fits(capacity: int) -> bool:
        resized = target.model_copy(update={key: capacity})
        devices = search.place(candidate.engine, candidate.format, candidate.experts_kept, resized).devices
        return all(d.free_bytes >= 0 for d in devices if d.name in names)

    low, high = 0, 2 * sum(device.used_bytes for device in candidate.placement.devices)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _nothing_fits(search: _Search, smallest: list[Candidate], refused: list[Refusal]) -> CannotBeDone:
    recipe, spec = search.recipe, search.spec
    if not smallest:
        lines = "; ".join(f"{r.engine} {r.format}: {r.reason}" for r in refused)
        return CannotBeDone(f"nothing can serve this on {recipe.target.name}: {lines}")
    best = min(smallest, key=lambda c: max(d.used_bytes for d in c.placement.devices))
    short = min(best.placement.devices, key=lambda d: d.free_bytes)
    need = _needed_capacity(search, best)
    key, each = ("target.vram", " per card") if recipe.target.gpus else ("target.ram", "")
    if short.name == "host RAM":
        key, need, each = "target.ram", short.used_bytes, " of host RAM"
    relax = [f"{key} = {need}"]
    if best.experts_kept > spec.top_k and recipe.prune.ratio == "auto" and recipe.prune.experts == "auto":
        relax.append(
            'prune.method (now "none")' if recipe.prune.method == "none"
            else f"a larger prune.max_ratio (now {recipe.prune.max_ratio})"
        )  # fmt: skip
    elif best.experts_kept > spec.top_k:
        relax.append("a larger prune.ratio" if recipe.prune.ratio != "auto" else "a smaller prune.experts")
    if recipe.quantize.method != "auto" or recipe.quantize.format != "auto" or recipe.quantize.bits != "auto":
        relax.append('fewer bits (quantize.method, format, bits = "auto")')
    relax.append(f"a smaller serve.context (now {recipe.serve.context}) or serve.concurrency")
    return CannotBeDone(
        f"{search.recipe.model.source} does not fit {recipe.target.name}: the smallest configuration allowed "
        f"({best.engine} {best.format}, {best.experts_kept} of {spec.num_experts} experts, context {best.context}) "
        f"needs {need} bytes ({format_bytes(need)}){each}, and {short.name} has {format_bytes(short.capacity_bytes)}",
        hint=f"it would fit with {'; or try '.join(relax)}",
    )


def _reasons(
    best: Candidate, others: list[Candidate], refused: list[Refusal], spec: ModelSpec, source: str
) -> list[str]:
    """Why this one, in sentences with figures."""
    device = min(best.placement.devices, key=lambda d: d.free_bytes)
    lines = [
        f"{best.engine} {best.format} with {best.experts_kept} of {spec.num_experts} experts has the lowest predicted "
        f"loss of what fits: KL {best.predicted_loss:.4f} nats per token "
        f"({'the cost of pruning was measured' if source == 'measured' else 'a prior, not a promise'}).",
        f"The fullest device, {device.name}, holds {format_bytes(device.used_bytes)} of "
        f"{format_bytes(device.capacity_bytes)}; {format_bytes(device.free_bytes)} stay free.",
    ]
    if best.experts_kept < spec.num_experts:
        lines.append(
            f"All {spec.num_experts} experts do not fit in {best.format}; {best.experts_kept} is the most that does."
        )
    if others:
        other = others[0]
        lines.append(
            f"Next best: {other.engine} {other.format}, {other.experts_kept} experts, KL {other.predicted_loss:.4f}."
        )
    too_large = [r.format for r in refused if r.experts is not None]
    if too_large:
        lines.append(f"Too large even at the fewest experts allowed: {', '.join(too_large)}.")
    return lines
