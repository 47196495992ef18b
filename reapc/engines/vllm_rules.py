"""What vLLM accepts: formats, cards, and how a model's shapes divide over tensor, pipeline and expert parallelism.

Read in vLLM 0.33.0 (facts/vllm-legality.md); what a release can do is data, in ``vllm.toml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from reapc.arch import LayerKind, ModelSpec, TensorGroup
from reapc.engines import data
from reapc.formats import weights
from reapc.formats.weights import WeightFormat
from reapc.recipe import ServeSection
from reapc.target import Target

DATA = data.load("vllm")
KV_TYPES: dict[str, dict[str, Any]] = DATA["kv"]


def kv_type(requested: str) -> str:
    """The value of --kv-cache-dtype: f16 and bf16 are the model's own type, "auto"."""
    return "auto" if requested in ("native", "auto", "f16", "bf16") else requested


def kv_choices(requested: str) -> tuple[str, ...]:
    """Cache types to try, best first: a request of "auto" admits fp8."""
    return ("auto", "fp8") if requested == "auto" else (kv_type(requested),)


def refusal(spec: ModelSpec, fmt: WeightFormat, target: Target, serve: ServeSection, kv: str) -> str | None:
    """Why vLLM cannot serve this in any layout, or None."""
    if not target.gpus:
        return "vLLM needs a GPU here: without one reapc serves with llama.cpp"
    if isinstance(serve.tensor_parallel, int) and serve.tensor_parallel > target.gpus:
        return f"tensor parallelism over {serve.tensor_parallel} cards, and the target has {target.gpus}"
    if target.kind != "cuda":
        return f"vLLM is planned for CUDA cards only; the target's cards are {target.kind}"
    if kv not in KV_TYPES:
        return f"vLLM has no {kv} KV cache (it has {', '.join(KV_TYPES)})"
    card = target.capability
    stated = target.compute_capability or "not stated"
    roads = [DATA["roads"][name] for name in serve.experimental]
    needed: dict[str, str] = DATA["capability"]
    if serve.speculative == "mtp" and spec.family not in DATA["speculative"]["families"]:
        return f"vLLM {DATA['version']} has no multi-token prediction for this family ({spec.family})"
    for road in roads:
        if "kv" in road and kv not in road["kv"]:
            return f"the experimental road takes a KV cache of {', '.join(road['kv'])} only"
    if spec.sparse_attention:
        lowest = min([needed["sparse-attention"], *(road.get("sparse-attention", "99.0") for road in roads)], key=_key)
        if card is None or card < _key(lowest):
            return f"{needed['sparse-reason']}; the target's compute capability is {stated}"
    minimum = _key(KV_TYPES[kv]["capability"])
    if kv != "auto" and (card is None or card < minimum):
        return f"an {kv} KV cache needs compute capability {KV_TYPES[kv]['capability']}; the target says {stated}"
    wanted = needed[fmt.name if fmt.method == "plain" else fmt.method]
    if card is not None and card < _key(wanted):
        return f"{fmt.name} needs compute capability {wanted}; the target has {target.compute_capability}"
    for bits in fmt.widths if fmt.method in DATA["bits"] else ():
        if bits not in DATA["bits"][fmt.method]:
            allowed = ", ".join(map(str, DATA["bits"][fmt.method]))
            return f"vLLM loads {fmt.method} with {allowed} bits, not {bits}"
    return weights.misfit(fmt, spec)


def fixed_experts(spec: ModelSpec) -> str | None:
    """Why only the published expert count can be served, or None."""
    reason: str | None = DATA["fixed_experts"].get(spec.family)
    return reason


@lru_cache(maxsize=64)
def _key(text: str) -> tuple[int, int]:
    return data.capability(text) or (0, 0)


class Layout(NamedTuple):
    """Tensor, pipeline and expert parallel degrees; ``tp * pp`` cards are used, the rest stays idle."""

    tp: int
    pp: int
    ep: int


def layouts(target: Target, tensor_parallel: int | str = "auto") -> Iterator[Layout]:
    """Every layout over at most all cards: more cards first, more tensor parallelism first; with a ``tensor_parallel``
    degree only those."""
    degrees = range(1, target.gpus + 1) if isinstance(tensor_parallel, str) else (tensor_parallel,)
    pairs = [(tp, pp) for tp in degrees for pp in range(1, target.gpus // tp + 1)]
    for tp, pp in sorted(pairs, key=lambda pair: (-pair[0] * pair[1], -pair[0])):
        if nodes_used(target, tp, pp) is None:
            continue
        yield Layout(tp, pp, 1)
        if tp > 1:
            yield Layout(tp, pp, tp)


def nodes_used(target: Target, tp: int, pp: int) -> int | None:
    """The fewest machines that ``tp * pp`` cards make, each with as many (vLLM's ranks are dealt out evenly) and none
    with a part of a tensor-parallel group; None where the target has no such number."""
    local = target.gpus // target.nodes
    fitting = (n for n in range(1, target.nodes + 1) if pp % n == 0 and tp * pp <= n * local)
    return next(fitting, None)


def draft_tokens(family: str) -> int:
    """Tokens that the MTP layers draft at once."""
    tokens: dict[str, int] = DATA["speculative"]["tokens"]
    return tokens.get(family, 1)


def kinds_of(spec: ModelSpec) -> list[LayerKind]:
    return list({id(layer.kind): layer.kind for layer in spec.layers}.values())


def layout_refusal(spec: ModelSpec, layout: Layout) -> str | None:
    """Why the model's shapes do not divide over this layout, or None."""
    tp, pp, ep = layout
    if pp > spec.num_layers:
        return f"{spec.num_layers} layers do not make {pp} pipeline stages"
    if tp == 1:
        return None
    if spec.num_heads % tp:
        return f"{spec.num_heads} attention heads do not divide over {tp} cards"
    for kind in kinds_of(spec):
        for stream in kind.cache:
            if stream.heads and stream.heads % tp and tp % stream.heads:
                return f"{stream.heads} KV heads neither divide over {tp} cards nor are a divisor of {tp}"
        if kind.state_heads and kind.state_heads % tp:
            return f"{kind.state_heads} linear-attention heads do not divide over {tp} cards"
        for group in kind.tensors:
            if reason := _undivided(group, tp, ep):
                return reason
    return None


def _undivided(group: TensorGroup, tp: int, ep: int) -> str | None:
    for rows, columns in group.linears:
        match group.parallel:
            case "column" if rows % tp:
                size = rows
            case "row" if columns % tp:
                size = columns
            case "expert" if ep == 1 and rows % tp:
                return f"experts of {rows} columns do not divide over {tp} cards"
            case "expert_row" if ep == 1 and columns % tp:
                return f"experts of {columns} columns do not divide over {tp} cards"
            case _:
                continue
        return f"{group.name.removesuffix('.weight')}: {size} does not divide over {tp} cards"
    return None


def format_refusal(spec: ModelSpec, fmt: WeightFormat, layout: Layout) -> tuple[str | None, bool]:
    """(why this layout cannot hold the format, whether it is served by the slow kernel)."""
    if not fmt.quantized:
        return None, False
    slow = False
    for group, layer in _quantized(spec, fmt):
        stored = fmt.at(group, layer)
        assert stored is not None
        reason, generic = group_refusal(spec, stored, group, layout)
        if reason:
            return reason, False
        slow = slow or generic
    return None, slow


def group_refusal(spec: ModelSpec, stored: WeightFormat, group: TensorGroup, layout: Layout) -> tuple[str | None, bool]:
    """The same of one tensor's linears in a plain format."""
    if group.role == "expert":
        return _expert_refusal(spec, stored, group, 1 if layout.ep > 1 else layout.tp)
    return _dense_refusal(spec, stored, group, layout.tp), False


def _quantized(spec: ModelSpec, fmt: WeightFormat) -> Iterator[tuple[TensorGroup, int | None]]:
    """Every group that the format stores, once for each width that it has; experts first."""
    seen = set()
    placed = [(group, layer) for group, layer, _ in weights.placed_groups(fmt, spec)]
    for group, layer in sorted(placed, key=lambda pair: pair[0].role != "expert"):
        stored = fmt.at(group, layer)
        if stored is not None and (group, stored) not in seen:
            seen.add((group, stored))
            yield group, layer


def _expert_refusal(spec: ModelSpec, fmt: WeightFormat, group: TensorGroup, tp: int) -> tuple[str | None, bool]:
    width = spec.expert_intermediate_size // tp
    if fmt.method in ("gptq", "ct", "auto-round"):
        marlin = DATA["marlin"]
        inner = max(64, fmt.group_size) if fmt.method == "auto-round" else fmt.group_size or 1
        hidden = {columns for _, columns in group.linears} if group.parallel == "expert" else set()
        fits = width % inner == 0
        if fmt.bits in marlin["bits"]:
            slow = not fits or any(size % marlin["hidden_multiple"] for size in hidden)
            if slow and (width % 32 or any(size % 32 for size in hidden)):
                return _narrow(fmt, spec, width, tp, 32), False
            return None, slow
        if not fits:
            return _narrow(fmt, spec, width, tp, inner), False
    elif fmt.method == "fp8-block" and width % weights.FP8_BLOCK:
        return _narrow(fmt, spec, width, tp, weights.FP8_BLOCK), False
    elif fmt.method in ("nvfp4", "mxfp4") and width % fmt.group_size:
        return _narrow(fmt, spec, width, tp, fmt.group_size), False
    return None, False


def _dense_refusal(spec: ModelSpec, fmt: WeightFormat, group: TensorGroup, tp: int) -> str | None:
    name = group.name.removesuffix(".weight")
    unit = weights.FP8_BLOCK if fmt.method == "fp8-block" else fmt.group_size
    for rows, columns in group.linears if unit else ():
        if group.parallel == "row" and tp > 1 and columns // tp % unit:
            return f"{name}: {columns // tp} columns per card do not divide into groups of {unit}"
        # Tiles may not be cut between cards, nor between q, k and v or gate and up, which vLLM joins: of those only the
        # last may end in a part of a tile (seen in vLLM 0.33: its loader runs past the end of the joined scales).
        each = rows // tp
        if group.parallel == "kv":
            each = rows // spec.num_kv_heads * max(1, spec.num_kv_heads // tp)
        cut = tp > 1 or name.endswith(("q_proj", "k_proj", "gate_proj"))
        if fmt.method == "fp8-block" and group.parallel in ("column", "kv") and cut and each % unit:
            return f"{name}: {each} rows per card do not divide into tiles of {unit}"
    return None


def _narrow(fmt: WeightFormat, spec: ModelSpec, width: int, tp: int, unit: int) -> str:
    each = f"experts of {spec.expert_intermediate_size} columns leave {width} per card over {tp} cards, "
    return each + f"which {fmt.name} cannot hold: multiples of {unit} are needed"
