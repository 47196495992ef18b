"""Why a plan was chosen, and the smallest changes that would make an impossible one possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reapc.arch import ModelSpec
from reapc.engines import llamacpp
from reapc.errors import CannotBeDone
from reapc.formats.gguf import native_expert_type
from reapc.plan import HOST, Candidate, Refusal
from reapc.planner.question import Question, kept_counts, writable
from reapc.units import format_bytes

Fits = Callable[[Question], bool]
MAX_LISTED = 12


def reasons(question: Question, ranked: list[Candidate], refused: list[Refusal], source: str) -> list[str]:
    """Why the first of ``ranked``, in sentences with figures."""
    best, total = ranked[0], question.spec.num_experts
    device = best.placement.fullest
    lines = [
        f"{best.engine} {best.format} with {best.experts_kept} of {total} experts has the lowest predicted "
        f"loss of what fits: KL {best.predicted_loss:.4f} nats per token "
        f"({'the cost of pruning was measured' if source == 'measured' else 'a prior, not a promise'}).",
        f"The fullest device, {device.name}, holds {format_bytes(device.used_bytes)} of "
        f"{format_bytes(device.capacity_bytes)}; {format_bytes(device.free_bytes)} stay free.",
    ]
    if best.experts_kept < total and not question.counts_fixed:
        lines.append(f"All {total} experts do not fit in {best.format}; {best.experts_kept} is the most that does.")
    if best.engine == "llama.cpp" and best.placement.pipeline_parallel > 1:
        lines.append(split_reason(question.spec))
    if best.placement.offloaded_layers:
        lines.append(
            f"The experts of the first {best.placement.offloaded_layers} layers lie in RAM: decoding waits for it."
        )
    lines += [f"Note: {note}." for note in best.placement.notes]
    if len(ranked) > 1:
        other = ranked[1]
        lines.append(
            f"Next best: {other.engine} {other.format}, {other.experts_kept} experts, KL {other.predicted_loss:.4f}."
        )
    lines += _source_reasons(question, ranked, refused)
    if not writable(best.format, question.spec):
        ours = next((item for item in ranked if writable(item.format, question.spec)), None)
        instead = f"it would take {ours.engine} {ours.format}, {ours.experts_kept} experts" if ours else "nothing fits"
        lines.append(f"`reapc build` of this version cannot write {best.format} yet: {instead}.")
    too_large = list(dict.fromkeys(r.format for r in refused if r.experts is not None))
    if too_large:
        rest = f" and {len(too_large) - MAX_LISTED} more" if len(too_large) > MAX_LISTED else ""
        lines.append(f"Too large even at the fewest experts allowed: {', '.join(too_large[:MAX_LISTED])}{rest}.")
    lines += engine_refusals(refused)
    return lines


def _source_reasons(question: Question, ranked: list[Candidate], refused: list[Refusal]) -> list[str]:
    """What becomes of a checkpoint that is published quantized."""
    stored, best = question.stored, ranked[0]
    if stored is None or not stored.quantized:
        return []
    own = f"{stored.name} is what the checkpoint is published in"
    if (best.engine, best.format) == ("vllm", stored.name):
        return [f"{own}: kept experts are copied byte for byte, and nothing is quantized again."]
    decoded = "this plan starts from its weights decoded to 16 bit"
    if best.engine == "llama.cpp" and (packed := native_expert_type(question.spec)):
        decoded = f"llama.cpp's converter keeps its experts in {packed}"
    other = next((item for item in ranked if (item.engine, item.format) == ("vllm", stored.name)), None)
    if other is not None:
        kept = f"{other.experts_kept} of its experts would fit, KL {other.predicted_loss:.4f}"
        return [f"{own}: copied as it is, {kept}; {decoded}."]
    reason = next((r.reason for r in refused if (r.engine, r.format) == ("vllm", stored.name)), None)
    if reason is not None:
        return [f"{own}, and cannot stay so in vLLM: {reason}; {decoded}."]
    return [f"{own}, which the recipe does not ask for; {decoded}."]


def split_reason(spec: ModelSpec) -> str:
    """How several cards share the work in llama.cpp, and why not otherwise."""
    lines = "The cards hold whole layers and work one after another (-sm layer)"
    if spec.gguf_arch in llamacpp.NO_TENSOR_SPLIT:
        return f"{lines}: -sm tensor is not implemented for {spec.gguf_arch}."
    return f"{lines}; -sm tensor is experimental and not planned."


def engine_refusals(refused: list[Refusal]) -> list[str]:
    """One sentence per engine that can serve none of its formats for one reason."""
    lines = []
    for engine in dict.fromkeys(refusal.engine for refusal in refused):
        own = [r for r in refused if r.engine == engine]
        causes = {r.reason for r in own}
        if len(causes) == 1 and own[0].experts is None and len(own) > 1:
            lines.append(f"{engine} cannot serve it here: {own[0].reason}.")
    return lines


def needed_capacity(question: Question, fits: Fits, kind: str) -> int:
    """The smallest bytes per card (``kind`` "vram") or of RAM with which it fits, exact by bisection."""
    low, high = 0, 1 << 20
    while not fits(replace(question, target=question.target.model_copy(update={kind: high}))):
        high *= 2
        if high > 1 << 50:
            return 0
    while low < high:
        middle = (low + high) // 2
        if fits(replace(question, target=question.target.model_copy(update={kind: middle}))):
            high = middle
        else:
            low = middle + 1
    return high


def _fewer_experts(question: Question, fits: Fits) -> int | None:
    """The largest count below those allowed that fits."""
    spec = question.spec
    counts = [n for n in kept_counts(spec, max_ratio=1 - spec.top_k / spec.num_experts) if n < min(question.counts)]
    low, high = 0, len(counts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(replace(question, counts=(counts[middle],))) else (middle + 1, high)
    return counts[low] if low < len(counts) else None


def _less_context(question: Question, fits: Fits) -> int | None:
    """The largest context (a multiple of 256) that fits."""
    low, high = 0, question.serve.context // 256
    while low < high:
        middle = (low + high + 1) // 2
        shorter = question.serve.model_copy(update={"context": middle * 256})
        low, high = (middle, high) if fits(replace(question, serve=shorter)) else (low, middle - 1)
    return low * 256 or None


def nothing_fits(
    question: Question, smallest: list[Candidate], refused: list[Refusal], fits: Fits, *, options: bool = False
) -> CannotBeDone:
    """The error for a question without an answer: what is lacking, and the smallest changes that would fit.
    ``smallest`` holds the nearest configuration, or nothing when none is legal. ``options``: changes are named as
    options of ``reapc fit``, not as keys of a recipe."""
    target, spec = question.target, question.spec
    if not smallest:
        own = (
            engine_refusals(refused)
            or list(dict.fromkeys(f"{r.engine} {r.format}: {r.reason}." for r in refused))[:MAX_LISTED]
        )
        return CannotBeDone(f"nothing can serve {question.model} on {target.name}: {' '.join(own)}")
    best = smallest[0]
    short = best.placement.fullest
    kind = "ram" if not target.gpus or (short.name == HOST and target.ram) else "vram"
    need = needed_capacity(question, fits, kind)
    each = {"ram": "", "vram": " per card"}[kind]
    ways = [f"--{kind} {need}B" if options else f'target.{kind} = "{need}B"'] if need else []
    if best.experts_kept > spec.top_k and (fewer := _fewer_experts(question, fits)):
        if question.counts_fixed:
            ways.append(f"--experts {fewer}" if options else f"prune.experts = {fewer}")
        else:
            ratio = -(-(spec.num_experts - fewer) * 10_000 // spec.num_experts) / 10_000
            key = f"--max-ratio {ratio}" if options else f"prune.max_ratio = {ratio}"
            ways.append(f"{key} ({fewer} experts; now {question.max_ratio})")
    if shorter := _less_context(question, fits):
        key = f"--context {shorter}" if options else f"serve.context = {shorter}"
        ways.append(f"{key} (now {question.serve.context})")
    if question.formats_fixed:
        ways.append("no --format" if options else 'fewer bits (quantize.method, format, bits = "auto")')
    if target.gpus and not target.ram and not target.unified and best.engine == "llama.cpp":
        ways.append(f"{'--ram' if options else 'target.ram'}, to keep experts in the host's RAM")
    return CannotBeDone(
        f"{question.model} does not fit {target.name}: the smallest configuration allowed ({best.engine} "
        f"{best.format}, {best.experts_kept} of {spec.num_experts} experts, context {best.context}) needs "
        f"{need} bytes ({format_bytes(need)}){each}, and {short.name} has {format_bytes(short.capacity_bytes)}",
        hint=f"it would fit with {'; or '.join(ways)}",
    )
