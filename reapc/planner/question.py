"""What is asked of the planner: a model, a target, how it is to be served, and which formats and expert counts may be
tried. Made from a recipe, or from the options of ``reapc fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights, writers
from reapc.formats.gguf_types import DEFAULT_TYPES
from reapc.formats.published import published_format
from reapc.formats.stored import AsStored, as_published
from reapc.formats.weights import WeightFormat
from reapc.plan import EngineName
from reapc.planner import prior
from reapc.recipe import Recipe, ServeSection
from reapc.schema import nearest
from reapc.target import Target

ENGINES: tuple[EngineName, ...] = ("vllm", "llama.cpp")
GGUF_AUTO = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS",
    "IQ2_XXS",
)  # fmt: skip
VLLM_AUTO = (
    "bf16", "fp8-block", "fp8", "int8",
    *(f"auto-round-w{bits}g{group}" for bits in (8, 6, 5, 4, 3, 2) for group in weights.GROUPS),
    *(f"auto-round-w{bits}g{group}:experts" for bits in (4, 3, 2) for group in weights.GROUPS),
    *(f"ct-w{bits}g{group}" for bits in (8, 4, 3, 2) for group in weights.GROUPS),
    *(f"gptq-w{bits}g{group}" for bits in (8, 4) for group in weights.GROUPS),
    "nvfp4", "mxfp4",
)  # fmt: skip
MIXTRAL_EXPERTS = 8  # llama-quantize takes any model with 8 experts for Mixtral
_METHODS = {"auto_round": ("auto-round", "ct"), "gptq": ("gptq",), "fp8": ("fp8", "fp8-block")}
# What the quantizers call their output formats, as our methods.
EXPORTS = {"auto_round": "auto-round", "auto_gptq": "gptq", "gptq": "gptq", "llm_compressor": "ct"}


@dataclass(frozen=True)
class Question:
    """``counts`` are the expert counts that may be kept, largest first; ``pairs`` the engines and formats to try.
    ``measured`` gives the loss of pruning to a count where it was measured. ``counts_fixed`` and ``formats_fixed``
    say that the user fixed them. ``stored`` is the format that the checkpoint is published in, None where that is
    16 bit or not known. ``keeps_mtp``: MTP layers stay in the result."""

    model: str
    spec: ModelSpec
    target: Target
    serve: ServeSection
    pairs: tuple[tuple[EngineName, str], ...]
    counts: tuple[int, ...]
    imatrix: bool = True
    max_ratio: float = 0.25
    measured: Callable[[int], float] | None = None
    counts_fixed: bool = False
    formats_fixed: bool = False
    stored: AsStored | None = None
    keeps_mtp: bool = False

    def format(self, name: str) -> WeightFormat | None:
        """The format of this name for this checkpoint; None for llama.cpp's."""
        return self.stored if self.stored is not None and name == self.stored.name else weights.parse(name)

    def prune_loss(self, kept: int) -> float:
        """The predicted cost of keeping ``kept`` experts."""
        total = self.spec.num_experts
        if kept == total:
            return 0.0
        return self.measured(kept) if self.measured is not None else prior.pruning_loss(1 - kept / total)


@lru_cache(maxsize=256)
def check_format(name: str) -> tuple[EngineName, str]:
    """The engine and canonical name of a format; ReapcError (exit 2) names the nearest known ones. In llama.cpp's
    spelling BF16 is a GGUF file, in lower case bf16 is a checkpoint."""
    if name in DEFAULT_TYPES:
        return "llama.cpp", name
    if parsed := weights.parse(name):
        return "vllm", parsed.name
    upper = name.upper()
    if upper in DEFAULT_TYPES:
        return "llama.cpp", upper
    known = [*weights.names(), *DEFAULT_TYPES]
    guess = nearest(name.lower(), known) or nearest(upper, known)
    raise ReapcError(f"unknown format {name!r}", hint=f"{guess}`reapc formats` lists them")


def floor_count(value: float) -> int:
    """floor, but 0.3 * 10 = 2.9999999999999996 counts as 3."""
    return floor(value + 1e-9)


def kept_counts(
    spec: ModelSpec, *, ratio: float | None = None, experts: int | None = None, max_ratio: float = 0.25,
    none: bool = False, dissolve_groups: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """Expert counts that may be kept, largest first; ReapcError where the request leaves fewer than top-k, or counts
    that the router's groups cannot hold (``dissolve_groups``: there is one group)."""
    total, top_k = spec.num_experts, spec.top_k
    if none:
        return (total,)
    if experts is not None or ratio is not None:
        asked = f"prune.experts = {experts}" if experts is not None else f"prune.ratio = {ratio}"
        kept = experts if experts is not None else total - floor_count(total * (ratio or 0.0))
        if kept > total:
            raise ReapcError(f"{asked}: the model has {total} experts", hint=f"at most {total}")
        if kept < top_k:
            largest = floor((total - top_k) / total * 10_000) / 10_000
            raise ReapcError(
                f"{asked} leaves {kept} of {total} experts, and every token is sent to {top_k}",
                hint=f"the largest ratio possible is {largest} ({top_k} experts)",
            )
        counts: Sequence[int] = (kept,)
    else:
        counts = range(total, max(top_k, total - floor_count(total * max_ratio)) - 1, -1)
    grouped = tuple(kept for kept in counts if dissolve_groups or spec.fits_groups(kept))
    if not grouped:
        least = next(n for n in range(1, total + 1) if spec.fits_groups(n))
        raise ReapcError(
            f"{counts[0]} experts do not divide into the router's {spec.n_group} groups, or {spec.topk_group} of them "
            f"hold fewer than the {top_k} experts that a token needs",
            hint=f"a multiple of {spec.n_group} is needed, at least {least}; prune.dissolve_groups = true gives the "
            "groups up, which changes the routing",
        )
    # llama-quantize would take a model pruned to 8 for Mixtral; only an explicit request gets it
    if len(grouped) > 1 and total != MIXTRAL_EXPERTS:
        grouped = tuple(kept for kept in grouped if kept != MIXTRAL_EXPERTS)
    return grouped


def native_format(spec: ModelSpec) -> str | None:
    """The format that the checkpoint is published in, where it is quantized: it costs nothing to keep."""
    name = published_format(spec) if spec.quantization else None
    return None if name in ("bf16", "fp16") else name


def auto_pairs(spec: ModelSpec, engine: str = "auto", buildable: bool = False) -> tuple[tuple[EngineName, str], ...]:
    """Every engine and format that is tried when nothing is fixed."""
    pairs: list[tuple[EngineName, str]] = [("vllm", name) for name in VLLM_AUTO]
    pairs += [("llama.cpp", name) for name in GGUF_AUTO]
    native = native_format(spec)
    if native is not None and native not in VLLM_AUTO:
        pairs = [("vllm", native), *pairs]
    if native == "mxfp4:experts":
        pairs.append(("llama.cpp", "MXFP4_MOE"))
    return tuple(pair for pair in pairs if engine in ("auto", pair[0]) and (not buildable or writable(pair[1], spec)))


def writable(name: str, spec: ModelSpec | None = None) -> bool:
    """Whether `reapc build` of this version can write the format (of such a model), or copy what is in it already; the
    planner knows more."""
    fmt = weights.parse(name)
    if fmt is None:
        return name in DEFAULT_TYPES
    return writers.why_not(fmt, spec) is None or (spec is not None and name == native_format(spec))


def format_pairs(name: str, engine: str) -> tuple[tuple[EngineName, str], ...]:
    """The engine and format that a name means; exit code 1 when ``engine`` cannot serve it."""
    owner, fmt = check_format(name)
    if fmt in ("bf16", "BF16"):
        both: list[tuple[EngineName, str]] = [("vllm", "bf16"), ("llama.cpp", "BF16")]
        return tuple(pair for pair in both if engine in ("auto", pair[0]))
    if engine not in ("auto", owner):
        raise CannotBeDone(
            f'serve.engine = "{engine}" cannot serve {fmt}',
            hint=f"{fmt} is served by {owner}; GGUF types need llama.cpp, the others vLLM",
        )
    return ((owner, fmt),)


def from_recipe(
    recipe: Recipe, spec: ModelSpec, model: str, measured: Callable[[int], float] | None = None,
    buildable: bool = False, stored: AsStored | None = None,
) -> Question:  # fmt: skip
    """The question that a recipe asks. ``buildable`` leaves only formats that this version can write. ``stored``: the
    checkpoint's own format as counted in its files; without it the config tells."""
    prune, serve = recipe.prune, recipe.serve
    if serve.context > spec.max_context:
        raise ReapcError(
            f"serve.context = {serve.context}: the model knows {spec.max_context} positions",
            hint=f"at most {spec.max_context}",
        )
    if serve.speculative == "mtp" and not spec.mtp_layers:
        raise ReapcError(
            f'serve.speculative = "mtp": {model} stores no multi-token-prediction layers that reapc knows',
            hint='remove it, or set "none"',
        )
    if serve.speculative == "mtp" and buildable and prune.mtp != "prune":
        raise CannotBeDone(
            'serve.speculative = "mtp", but prune.mtp = "drop" leaves out the MTP layers that would draft',
            hint='set prune.mtp = "prune", or serve.speculative = "none"',
        )
    counts = kept_counts(
        spec,
        ratio=None if prune.ratio == "auto" else prune.ratio,
        experts=None if prune.experts == "auto" else prune.experts,
        max_ratio=prune.max_ratio,
        none=prune.method == "none",
        dissolve_groups=prune.dissolve_groups,
    )
    return Question(
        model=model,
        spec=spec,
        target=recipe.target,
        serve=serve,
        pairs=_recipe_pairs(recipe, spec, buildable),
        counts=counts,
        imatrix=recipe.quantize.imatrix,
        max_ratio=prune.max_ratio,
        measured=measured,
        counts_fixed=prune.method == "none" or prune.ratio != "auto" or prune.experts != "auto",
        formats_fixed=(recipe.quantize.method, recipe.quantize.format, recipe.quantize.bits) != ("auto",) * 3,
        stored=stored or as_published(spec),
        keeps_mtp=prune.mtp == "prune" and bool(spec.mtp_layers),
    )


def _recipe_pairs(recipe: Recipe, spec: ModelSpec, buildable: bool) -> tuple[tuple[EngineName, str], ...]:
    quantize = recipe.quantize
    pairs = _with_mixed(_named_pairs(recipe, spec), quantize.mixed)
    if quantize.bits != "auto":
        pairs = tuple(pair for pair in pairs if nominal_bits(pair[1]) == quantize.bits)
    if not pairs and quantize.method in ("gguf", *_METHODS):
        raise CannotBeDone(
            f'serve.engine = "{recipe.serve.engine}" cannot serve what quantize.method = "{quantize.method}" writes '
            f"with bits = {quantize.bits}, group_size = {quantize.group_size}",
            hint='GGUF needs serve.engine = "llama.cpp"; AutoRound, GPTQ and FP8 need "vllm"',
        )
    if not pairs:
        raise CannotBeDone(
            f"quantize.bits = {quantize.bits}: no such format (1 to 6, 8 or 16 bits), or another key excludes it"
        )
    if buildable:
        ours = tuple(pair for pair in pairs if writable(pair[1], spec))
        if not ours:
            fmt = weights.parse(pairs[0][1])
            raise CannotBeDone(
                f"this version of reapc cannot write {pairs[0][1]}: "
                f"{writers.why_not(fmt, spec) if fmt else 'no writer'}",
                hint=f'quantize.method = {_written_by(spec)} quantizes to formats that it can; "none" keeps bf16',
            )
        return ours
    return pairs


def _written_by(spec: ModelSpec) -> str:
    """The general methods that can write such a model."""
    return '"gguf"' if writers.unable("auto-round", spec) else '"auto_round" or "gguf"'


def _named_pairs(recipe: Recipe, spec: ModelSpec) -> tuple[tuple[EngineName, str], ...]:
    """What method, format and group size admit."""
    quantize, serve = recipe.quantize, recipe.serve
    if quantize.format not in ("auto", *EXPORTS):
        pairs = format_pairs(quantize.format, serve.engine)
        fmt = weights.parse(pairs[0][1])
        if quantize.method == "none" and pairs[0][1] not in ("bf16", "BF16", native_format(spec)):
            raise ReapcError(f'quantize.format = "{quantize.format}" but quantize.method = "none"')
        if quantize.method in _METHODS and (not fmt or writers.writer(fmt, quantize.method) is None):
            raise ReapcError(
                f'quantize.format = "{quantize.format}" is not what quantize.method = "{quantize.method}" writes',
                hint="remove one of the two",
            )
        return pairs
    if quantize.method == "none":
        return _kept_pairs(spec, serve.engine)
    pairs = auto_pairs(spec, serve.engine)
    if quantize.bits != "auto" and serve.engine in ("auto", "llama.cpp"):
        pairs = (*(p for p in pairs if p[0] == "vllm"), *(("llama.cpp", name) for name in DEFAULT_TYPES))
    if quantize.method == "gguf":
        return tuple(pair for pair in pairs if pair[0] == "llama.cpp" and pair[1] not in ("BF16", "F16", "F32"))
    methods = _METHODS.get(quantize.method)
    if quantize.format != "auto":
        method = EXPORTS[quantize.format]
        if quantize.method == "gptq" and method != "gptq":
            raise ReapcError(f'quantize.format = "{quantize.format}" but quantize.method = "gptq"')
        methods = (method,)
    if methods is not None:
        pairs = tuple(p for p in pairs if p[0] == "vllm" and (f := weights.parse(p[1])) and f.method in methods)
    if quantize.group_size != "auto":
        pairs = tuple(p for p in pairs if (f := weights.parse(p[1])) and f.group_size == quantize.group_size)
    return pairs


def _kept_pairs(spec: ModelSpec, engine: str) -> tuple[tuple[EngineName, str], ...]:
    """The formats that nothing is quantized for: the checkpoint's own in vLLM, and what the converter makes of it."""
    if not spec.quantization:
        return format_pairs("bf16", engine)
    native = native_format(spec)
    pairs: list[tuple[EngineName, str]] = [("vllm", native)] if native else []
    pairs.append(("llama.cpp", "BF16"))
    found = tuple(pair for pair in pairs if engine in ("auto", pair[0]))
    if not found:
        raise CannotBeDone(
            f'quantize.method = "none": the checkpoint is published with quant_method = '
            f"{spec.quantization.get('quant_method')!r}, in a layout that reapc does not plan in vLLM as it is",
            hint='quantize.format = "bf16" decodes it; `reapc prune` copies its bytes all the same',
        )
    return found


def _with_mixed(pairs: tuple[tuple[EngineName, str], ...], mixed: dict[str, int]) -> tuple[tuple[EngineName, str], ...]:
    """The vLLM formats with the other widths that quantize.mixed asks for; those without such a width are left out."""
    if not mixed:
        return pairs
    suffix = "".join(f"+{part}={bits}" for part, bits in mixed.items())
    found: list[tuple[EngineName, str]] = []
    problem: ReapcError | None = None
    for engine, name in pairs:
        fmt = weights.parse(name) if engine == "vllm" else None
        if fmt is None or not fmt.quantized:
            continue
        try:
            parsed = weights.parse(name + suffix)
        except ReapcError as error:
            problem = problem or error
            continue
        assert parsed is not None
        found.append((engine, parsed.name))
    if not found and problem is not None:
        raise problem
    return tuple(found)


def nominal_bits(fmt: str) -> int:
    """The number in a format's name: 4 for Q4_K_M, 3 for auto-round-w3g128, 16 for bf16."""
    if parsed := weights.parse(fmt):
        return parsed.bits
    return int("".join(c for c in fmt.split("_")[0] if c.isdigit()))
