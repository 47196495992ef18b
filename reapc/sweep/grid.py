"""What a sweep builds: for every budget in bytes, each format with as many experts as fit."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.formats.gguf_sizes import sizes as sizes_of
from reapc.formats.gguf_types import ALIASES, DEFAULT_TYPES, NEEDS_IMATRIX, UNQUANTIZED
from reapc.planner.question import kept_counts
from reapc.units import format_bytes, parse_bytes

# One type for each step of bits, every fourth of a bit or so, the better of two at a step.
USUAL_TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "IQ2_M", "IQ2_S",
    "IQ2_XS", "IQ2_XXS", "IQ1_M",
)  # fmt: skip
_BPW = re.compile(r"(\d+(?:\.\d+)?)(?:bpw)?$")


@dataclass(frozen=True)
class Budget:
    """``name`` as it was asked for; ``bytes`` of tensor data."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Mix:
    """A format, how many experts stay, who chose them (``criterion``, "" where all stay) and whether they are healed.
    ``bytes``: of tensor data, as predicted. ``types``: GGUF type by tensor, where the allocator chose them. ``refit``:
    healed after quantization. ``label``: what it is called, where its format has too long a name."""

    format: str
    kept: int
    bytes: int
    criterion: str = ""
    healed: bool = False
    types: tuple[tuple[str, str], ...] = ()
    refit: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """For people and for file names."""
        ways = ("healed" if self.healed else "", "refit" if self.refit else "")
        return "-".join(part for part in (self.label or self.format, f"{self.kept}e", self.criterion, *ways) if part)

    @property
    def quantized(self) -> bool:
        """Whether it has fewer than 16 bits."""
        parsed = weights.parse(self.format) if not self.is_gguf else None
        return self.format not in UNQUANTIZED if parsed is None else parsed.quantized

    @property
    def is_gguf(self) -> bool:
        return bool(self.types) or self.format in DEFAULT_TYPES


def parse_budgets(text: str, spec: ModelSpec) -> list[Budget]:
    """Budgets from "2.0,2.5bpw,12GB": bits per weight are over all weights of the whole model, so that pruning one
    does not change what the figure means."""
    found = []
    for part in (piece.strip() for piece in text.split(",")):
        if match := _BPW.match(part):
            found.append(Budget(f"{float(match[1]):g} bpw", math.floor(float(match[1]) * spec.parameters / 8)))
        else:
            try:
                size = parse_bytes(part, zero=False)
            except ValueError as error:
                raise ReapcError(
                    f"--budgets {part}: neither bits per weight nor a size: {error}",
                    hint="for example 2.5,3.0bpw or 12GB",
                ) from error
            found.append(Budget(format_bytes(size), size))
    return sorted(found, key=lambda budget: budget.bytes)


def parse_ratios(text: str) -> list[float]:
    """Ratios from "0.25,0.5", or "0.1..0.9" in tenths."""
    try:
        if ".." in text:
            low, high = (float(part) for part in text.split(".."))
            ratios = [round(low + k / 10, 4) for k in range(math.floor((high - low) * 10 + 1e-9) + 1)]
        else:
            ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or any(not 0 <= ratio < 1 for ratio in ratios):
        raise ReapcError(f"--ratios {text}: expected ratios from 0 to below 1", hint="for example 0.25,0.5 or 0.1..0.9")
    return ratios


def parse_formats(text: str, spec: ModelSpec) -> tuple[str, ...]:
    """Formats by name; "auto" stands for GGUF's usual types. ReapcError for one that nobody knows, or that this model
    cannot be stored in."""
    found: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if part == "auto":
            found += USUAL_TYPES if spec.gguf_arch else ()
            continue
        parsed = weights.parse(part)
        if parsed is not None and parsed.name == part:  # in lower case: "bf16" is a folder, "BF16" a GGUF file
            if reason := weights.misfit(parsed, spec):
                raise ReapcError(f"--formats {part}: {reason}", hint=weights.dividing_groups(parsed, spec))
            found.append(parsed.name)
            continue
        name = ALIASES.get(part.upper(), part.upper())
        if name not in DEFAULT_TYPES:
            raise ReapcError(f"--formats {part}: no such format", hint="`reapc formats` lists them")
        if spec.gguf_arch is None:
            raise ReapcError(f"--formats {part}: llama.cpp does not know this architecture ({spec.model_type})")
        found.append(name)
    return tuple(dict.fromkeys(found))


def bytes_of(spec: ModelSpec, fmt: str, kept: int, imatrix: bool = True) -> int:
    """Bytes of all tensors with ``kept`` experts."""
    if fmt in DEFAULT_TYPES:
        return sizes_of(spec, fmt, imatrix or fmt in NEEDS_IMATRIX).file_bytes(kept)
    parsed = weights.parse(fmt)
    assert parsed is not None
    return weights.checkpoint_bytes(parsed, spec.with_experts(kept))


def at_budget(
    spec: ModelSpec, budget: Budget, formats: Sequence[str], *, max_ratio: float, mixes: int, dissolve: bool = False
) -> list[Mix]:
    """Of each kind (GGUF, safetensors) the largest format that holds every expert, and the ``mixes`` formats next in
    size with as many experts as fit. CannotBeDone where nothing fits."""
    counts = kept_counts(spec, max_ratio=max_ratio, dissolve_groups=dissolve)
    found: list[Mix] = []
    for kind in (True, False):
        whole: Mix | None = None
        pruned: list[Mix] = []
        for fmt in formats:
            if (fmt in DEFAULT_TYPES) is not kind:
                continue
            fitting = (count for count in counts if bytes_of(spec, fmt, count) <= budget.bytes)
            kept = next(fitting, None)
            if kept is None:
                continue
            mix = Mix(fmt, kept, bytes_of(spec, fmt, kept))
            if kept < spec.num_experts:
                pruned.append(mix)
            elif whole is None or mix.bytes > whole.bytes:
                whole = mix
        found += [whole] if whole else []
        found += sorted(pruned, key=lambda mix: -mix.kept)[:mixes]
    if not found:
        least = min(bytes_of(spec, fmt, counts[-1]) for fmt in formats)
        raise CannotBeDone(
            f"a budget of {budget.name} ({format_bytes(budget.bytes)}): the smallest of the formats needs "
            f"{format_bytes(least)} with {counts[-1]} of {spec.num_experts} experts, the fewest allowed",
            hint="ask for a larger budget, a higher --max-ratio or smaller --formats",
        )
    return found


def at_ratios(spec: ModelSpec, ratios: Sequence[float], formats: Sequence[str], dissolve: bool = False) -> list[Mix]:
    """Every format at every ratio."""
    found = []
    for ratio in ratios:
        (kept,) = kept_counts(spec, ratio=ratio, dissolve_groups=dissolve)
        found += [Mix(fmt, kept, bytes_of(spec, fmt, kept)) for fmt in formats]
    return found
