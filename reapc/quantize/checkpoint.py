"""A checkpoint in a safetensors format: the tool that ``formats/writers.py`` names, called the way it wants."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.weights import WeightFormat
from reapc.formats.writers import Tool, Writer, why_not, writer
from reapc.progress import Progress
from reapc.quantize import worker
from reapc.stream.tokens import Tokens
from reapc.units import format_bytes

PACKAGES: dict[Tool, tuple[str, ...]] = {
    "auto-round": ("auto-round", "compressed-tensors"),
    "gptqmodel": ("gptqmodel",),
}
DEFAULT_ITERS = 200  # AutoRound's own


def writer_for(fmt: WeightFormat, method: str = "auto", spec: ModelSpec | None = None) -> Writer:
    """Who writes ``fmt`` for a recipe's quantize.method (and of this model); ReapcError where nobody does."""
    found = writer(fmt, method, spec)
    if found is None:
        reason = why_not(fmt, spec) or f"quantize.method = {method!r} writes other formats"
        raise ReapcError(
            f"{fmt.name} cannot be written: {reason}",
            hint="`reapc formats` lists what can",
        )
    return found


def versions(found: Writer) -> dict[str, str]:
    """Versions of the packages that the tool needs; CannotBeDone (exit 1) where one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES.get(found.tool, ())}
    except importlib.metadata.PackageNotFoundError as error:
        raise CannotBeDone(
            f"{found.tool} writes this format, and the package {error.name} is not installed",
            hint="pip install -c constraints.txt 'reapc[quantizers]'",
        ) from error


def needed_bytes(spec: ModelSpec, found: Writer) -> int:
    """Memory that the tool needs for the pruned model: AutoRound and GPTQModel load all of it (0: it streams)."""
    return 0 if found.tool == "reapc" else worker.needed_bytes(spec, found.tool)


def require_memory(spec: ModelSpec, found: Writer, available_bytes: int) -> None:
    """CannotBeDone, before anything was computed, when the tool needs more memory than there is."""
    needed = needed_bytes(spec, found)
    if needed > available_bytes:
        raise CannotBeDone(
            f"{found.tool} loads the whole pruned model: about {format_bytes(needed)} of RAM, and "
            f"{format_bytes(available_bytes)} are available here",
            hint="build on a machine with more RAM, prune more, or take a format that streams: quantize.method = "
            '"gguf" or "fp8"',
        )


def quantize(
    source: Path,
    out: Path,
    fmt: WeightFormat,
    tokens: Tokens,
    progress: Progress,
    *,
    method: str = "auto",
    iters: int | None = None,
    seed: int = 0,
    threads: int = 0,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Writes the 16 bit checkpoint ``source`` to the folder ``out`` in ``fmt``; ``method`` is a recipe's
    quantize.method, ``iters`` AutoRound's tuning steps, ``scratch`` a folder that survives an interruption: AutoRound
    goes on after its last finished layer, the others start again. Returns facts for the manifest."""
    found = writer_for(fmt, method)
    installed = versions(found)
    if found.tool == "reapc":
        from reapc.quantize import fp8

        facts = fp8.quantize(source, out, fmt, progress)
    elif found.tool == "auto-round":
        from reapc.quantize import auto_round

        steps = DEFAULT_ITERS if iters is None else iters
        facts = auto_round.quantize(
            source, out, fmt, tokens, progress, export=found.export, iters=steps, seed=seed, threads=threads,
            scratch=scratch,
        )  # fmt: skip
    else:
        from reapc.quantize import gptq

        facts = gptq.quantize(source, out, fmt, tokens, progress, seed=seed, threads=threads, scratch=scratch)
    return {**facts, "tool": found.tool, "export": found.export, "versions": installed}
