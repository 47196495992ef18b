"""Who writes a weight format: the one table that the planner (what may be built) and the quantizer's call both read."""

from __future__ import annotations

from typing import Literal, NamedTuple

from reapc.arch import ModelSpec
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


def writer(fmt: WeightFormat, method: str = "auto", spec: ModelSpec | None = None) -> Writer | None:
    """Who writes ``fmt`` for a recipe's quantize.method (and of this model); None where nobody does."""
    wanted = METHOD_TOOLS.get(method)
    for found in WRITERS.get(fmt.method, ()):
        able = spec is None or unable(found.tool, spec) is None
        if wanted in (None, found.tool) and set(fmt.widths) <= set(found.bits) and able:
            return found
    return None


def unable(tool: Tool, spec: ModelSpec) -> str | None:
    """Why the tool cannot quantize a model of this build, or None."""
    kinds = {id(layer.kind): layer.kind for layer in spec.layers}.values()
    if any(g.role == "expert" and g.linears and g.expert_axis is not None for kind in kinds for g in kind.tensors):
        return "the model keeps the experts of a layer in one tensor, and this version quantizes them one by one"
    if tool == "auto-round" and any(k.recurrent_elements for k in kinds) and any(k.cache for k in kinds):
        return (
            "AutoRound 0.16 gives every layer the attention mask of the first, which fails where linear and full "
            "attention are mixed (seen with Qwen3-Next)"
        )
    return None


def why_not(fmt: WeightFormat, spec: ModelSpec | None = None) -> str | None:
    """Why `reapc build` cannot write ``fmt`` (of this model), or None where it can (bf16 and fp16 are the checkpoint
    itself)."""
    if not fmt.quantized:
        return None if fmt.name == "bf16" else "a checkpoint is written in the dtype that it has"
    if fmt.method not in WRITERS:
        return f"no quantizer is driven for {fmt.method} yet"
    if writer(fmt) is None:
        allowed = sorted({bits for found in WRITERS[fmt.method] for bits in found.bits})
        return f"its quantizer writes {', '.join(map(str, allowed))} bits"
    if spec is not None and writer(fmt, spec=spec) is None:
        return unable(WRITERS[fmt.method][0].tool, spec)
    return None
