"""Who writes a weight format: the one table that the planner (what may be built) and the quantizer's call both read."""

from __future__ import annotations

from typing import Literal, NamedTuple

from reapc.formats.weights import Method, WeightFormat

Tool = Literal["auto-round", "gptqmodel", "reapc"]


class Writer(NamedTuple):
    """A tool, what it calls the format, and the bit widths that it writes."""

    tool: Tool
    export: str
    bits: tuple[int, ...]


# The first writer of a method is the one that is taken when the recipe names none.
WRITERS: dict[Method, tuple[Writer, ...]] = {
    # 5 to 7 bits: vLLM has kernels, but AutoRound 0.16 packs none of them in its own layout
    "auto-round": (Writer("auto-round", "auto_round", (2, 3, 4, 8)),),
    "ct": (Writer("auto-round", "llm_compressor", (2, 3, 4, 5, 6, 7, 8)),),
    "gptq": (Writer("gptqmodel", "gptq", (4, 8)), Writer("auto-round", "auto_gptq", (4, 8))),
    "fp8": (Writer("reapc", "compressed-tensors", (8,)),),
    "fp8-block": (Writer("reapc", "fp8", (8,)),),
}
# quantize.method of a recipe -> the tool that it means
METHOD_TOOLS: dict[str, Tool] = {"auto_round": "auto-round", "gptq": "gptqmodel", "fp8": "reapc"}


def writer(fmt: WeightFormat, method: str = "auto") -> Writer | None:
    """Who writes ``fmt`` for a recipe's quantize.method; None where nobody does."""
    wanted = METHOD_TOOLS.get(method)
    for found in WRITERS.get(fmt.method, ()):
        if wanted in (None, found.tool) and set(fmt.widths) <= set(found.bits):
            return found
    return None


def why_not(fmt: WeightFormat) -> str | None:
    """Why `reapc build` cannot write ``fmt``, or None where it can (bf16 and fp16 are the checkpoint itself)."""
    if not fmt.quantized:
        return None if fmt.name == "bf16" else "a checkpoint is written in the dtype that it has"
    if fmt.method not in WRITERS:
        return f"no quantizer is driven for {fmt.method} yet"
    if writer(fmt) is None:
        allowed = sorted({bits for found in WRITERS[fmt.method] for bits in found.bits})
        return f"its quantizer writes {', '.join(map(str, allowed))} bits"
    return None
