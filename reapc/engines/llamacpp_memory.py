"""llama.cpp's memory beside the weights: KV cache and recurrent state (exact), compute buffers (an upper bound).

Read in llama.cpp 0c1e57098 (src/llama-kv-cache*.cpp, llama-memory-recurrent.cpp, ggml-alloc.c and the graphs in
src/models); what it was compared with is in docs/memory.md and tests/test_llamacpp_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from reapc.arch.spec import CacheStream, GgufPart, LayerKind, LayerSpec, ModelSpec
from reapc.engines import data

_DATA = data.load("llamacpp")
_MEMORY: dict[str, int] = _DATA["memory"]
KV_TYPES: dict[str, dict[str, int]] = _DATA["kv"]
MICRO_BATCH_TOKENS = _MEMORY["micro_batch_tokens"]
STATE_ELEMENT_BYTES = 4  # conv and recurrent state are F32
INDEX_TOP_K = 2048  # index_topk of DeepSeek-V3.2 and GLM-5; DeepSeek-V4's are smaller
_CACHE_ENTRIES = 1024


def padded_context(context: int) -> int:
    """Tokens of one slot: llama.cpp rounds up to 256."""
    pad = _MEMORY["context_pad_tokens"]
    return -(-context // pad) * pad


def cache_refusal(spec: ModelSpec, kv: str, concurrency: int) -> str | None:
    """Why llama.cpp would not make this cache for so many slots, or None; all seen with llama-fit-params."""
    if kv not in KV_TYPES:
        return f"llama.cpp has no {kv} KV cache (it has {', '.join(KV_TYPES)})"
    if spec.gguf_arch == "kimi-linear" and MICRO_BATCH_TOKENS % concurrency:
        return f"llama.cpp aborts on this family unless its slots divide {MICRO_BATCH_TOKENS}; {concurrency} do not"
    block = KV_TYPES[kv]["block"]
    if block == 1:
        return None
    heads = {(s.k_elements // max(1, s.heads), s.v_elements // max(1, s.heads)) for s in _streams(spec)}
    if spec.gguf_arch == "kimi-linear":
        # The converter leaves attention.value_length at hidden / heads, and llama_init_from_model checks that.
        heads.add((spec.hidden_size // spec.num_heads, 0))
    for size in sorted({size for pair in heads for size in pair}):
        if size % block:
            return f"a {kv} KV cache needs head sizes that are multiples of {block}, and llama.cpp reads {size} here"
    if spec.gguf_arch == "granitemoe" and spec.num_layers == 24:
        # 1760 nodes and 297 leafs with the rotations of a quantized cache; the scheduler has room for 2053.
        return f"llama.cpp aborts on this model with a {kv} KV cache: its graph is larger than its scheduler's table"
    return None


def _streams(spec: ModelSpec) -> set[CacheStream]:
    return {stream for layer in spec.layers for stream in layer.kind.cache}


def cache_entries(window: int | None, stride: int, context: int) -> int:
    """Cells of one slot: the padded context, or on sliding layers the window and a micro-batch, padded."""
    cells = padded_context(context)
    if window is not None:
        cells = min(cells, padded_context(window + MICRO_BATCH_TOKENS))
    return cells if stride == 1 else padded_context(-(-cells // stride))


def kv_layer_bytes(kind: LayerKind, context: int, concurrency: int, kv: str) -> int:
    """KV cache of one layer over all slots, exact."""
    block, size = KV_TYPES[kv]["block"], KV_TYPES[kv]["bytes"]
    total = 0
    for stream in kind.cache:
        elements = stream.elements
        if stream.kind == "index" and not any(other.kind == "latent" for other in kind.cache):
            elements *= 2  # llama_kv_cache leaves V out for MLA only: MiniMax-M3's indexer has one that nothing reads
        cells = cache_entries(stream.window, stream.stride, context) * concurrency
        total += cells * (elements // block * size)
    return total


def state_layer_bytes(kind: LayerKind, concurrency: int) -> int:
    """State of one layer over all slots, exact."""
    return STATE_ELEMENT_BYTES * (kind.conv_elements + kind.recurrent_elements) * concurrency


class _Cells(NamedTuple):
    """What grows with the cells of one kind of cache: bytes per cell and token, and per cell."""

    window: int | None
    stride: int
    inputs: int  # handed to the graph: masks
    computed: int
    per_cell: int


@dataclass(frozen=True, slots=True)
class _Activations:
    """What a graph keeps at once: float32 elements of one token, states of one sequence."""

    base_elements: int  # wherever in a layer
    ffn_elements: int  # in the widest FFN
    layer_elements: int  # in the widest FFN or attention
    recurrent_elements: int  # in the widest recurrent mixer, without its state
    state_elements: int
    tail_elements: int  # below the logits
    cells: tuple[_Cells, ...]
    index_stride: int  # tokens of a cell that a DSA indexer chooses, 0 without one
    zero_bytes: tuple[int, ...]  # of a chosen cell, for every layer


_activations_of: dict[tuple[int, int], tuple[tuple[LayerSpec, ...], _Activations]] = {}


def _activations(spec: ModelSpec) -> _Activations:
    """The activations of a model; layers that are shared between specs (other expert counts) are read once."""
    key = (id(spec.layers), spec.top_k)
    if key not in _activations_of:
        if len(_activations_of) >= _CACHE_ENTRIES:
            _activations_of.clear()
        _activations_of[key] = (spec.layers, _read(spec))
    return _activations_of[key][1]


def _matrices(kind: LayerKind, *roles: str) -> Iterator[GgufPart]:
    for group in kind.tensors:
        if group.role in roles:
            yield from (part for part in group.gguf if part.name.endswith(".weight") and len(part.shape) > 1)


def _mixer(kind: LayerKind) -> int:
    """Attention or a recurrent mixer: every projection twice (its result, and normed, rotated, convolved or gated),
    what goes into the last matrix, and for absorbed MLA the queries in latent space before and after the rope part
    joins."""
    elements = 0
    latent = max((stream.k_elements for stream in kind.cache if stream.kind == "latent"), default=0)
    for part in _matrices(kind, "attention"):
        if part.name in ("attn_output.weight", "attn_output_b.weight", "ssm_out.weight"):
            elements += part.shape[1]
        elif part.name == "attn_k_b.weight":
            elements += 2 * part.shape[0] * latent
        elif len(part.shape) == 2 and "conv" not in part.name and part.name != "attn_output_a.weight":
            elements += 2 * part.shape[0]
    return elements


def _ffn(kind: LayerKind, top_k: int) -> tuple[int, int]:
    """The widest of routed experts, shared expert and dense MLP: inputs of the activation, its result, and the output;
    and of that what still lies in the buffer when the layer ends: an intermediate or output of the chosen experts."""
    widest = last = 0
    for role, times in (("expert", top_k), ("shared_expert", 1), ("dense_mlp", 1)):
        inner = out = width = 0
        for part in _matrices(kind, role):
            if "down" in part.name:
                out, width = part.shape[-2], part.shape[-1]
            else:
                inner += part.shape[-2]
        gated = width if inner > width else 0  # an activation of one input overwrites it
        widest = max(widest, times * (inner + gated + out))
        last = max(last, times * max(width, out))
    latent = sum(part.shape[0] for part in _matrices(kind, "other") if part.name.startswith("ffn_"))
    return widest + latent, last


def _residual(spec: ModelSpec, kinds: list[LayerKind]) -> int:
    """Input, residual stream, normed input, result, and one more for what is left of the buffer in pieces."""
    base = 5 * spec.hidden_size
    if spec.gguf_arch == "qwen3vlmoe":
        base += 3 * spec.hidden_size  # the input has room for what three layers of the vision tower add (deepstack)
    for kind in kinds:
        for group in kind.tensors:
            for part in group.gguf:
                if part.name.startswith("attn_res_score"):
                    # Kimi-K3 keeps the residual stream of every 12th layer (attn_res_block_size), and norms them all.
                    return base + 2 * spec.hidden_size * -(-spec.num_layers // 12)
                if part.name.startswith("hc_attn_fn"):
                    # DeepSeek-V4's hyper-connections: several residual streams, before and after a layer.
                    return base + 2 * part.shape[-1]
    return base


def _grows_with_cells(kinds: list[LayerKind]) -> tuple[_Cells, ...]:
    # by (window, stride, whether it is an indexer's): layers of one kind share their masks, and what they compute
    found: dict[tuple[int | None, int, bool], _Cells] = {}
    for kind in kinds:
        latent = any(stream.kind == "latent" for stream in kind.cache)
        for stream in kind.cache:
            window, stride, index = stream.window, stream.stride, stream.kind == "index"
            if index and latent:
                # DSA: a mask of its own in f16; scores in f32, later a mask of what was chosen
                grows = _Cells(window, stride, 2, 4, 0)
            elif index:
                # MiniMax-M3: a mask by position in f32; the mask in f32, and the choice of every index head twice
                heads = sum(p.shape[0] for p in _matrices(kind, "attention") if p.name == "indexer.q_proj.weight")
                grows = _Cells(window, stride, 4, 4 + 8 * heads // stream.k_elements, 0)
            elif stride > 1:
                # DeepSeek-V4: the compressed keys, and their mask, are joined with those of the window
                grows = _Cells(window, stride, 2, 2, 2 * stream.k_elements)
            else:
                grows = _Cells(window, stride, 2, 0, 0)  # the attention mask in f16
            found[window, stride, index] = grows
    if found and all(cells.stride == 1 for cells in found.values()):
        # There is a mask of the whole context even where every layer slides, and some loaders read no window.
        found.setdefault((None, 1, False), _Cells(None, 1, 2, 0, 0))
    return tuple(found.values())


def _read(spec: ModelSpec) -> _Activations:
    kinds = list({id(layer.kind): layer.kind for layer in spec.layers}.values())
    base = _residual(spec, kinds)
    ffn = [_ffn(kind, spec.top_k) for kind in kinds]
    widest = max(elements for elements, _ in ffn)
    recurrent = [kind for kind in kinds if not kind.cache]
    strides = {stream.stride for stream in _streams(spec) if stream.kind == "index"}
    stride = max(strides, default=0) if spec.latent_attention else 0
    # GLM-5.2's layers without an indexer use another one's choice; DeepSeek-V4's do without.
    choosing = [stride == 1 or any(s.kind == "index" for s in layer.kind.cache) for layer in spec.layers]
    return _Activations(
        base_elements=base,
        ffn_elements=base + widest,
        layer_elements=base + max([widest, *(_mixer(kind) for kind in kinds if kind.cache)]),
        recurrent_elements=base + max([0, *(_mixer(kind) for kind in recurrent)]),
        # gathered and new, of convolution and recurrence
        state_elements=2 * max(kind.conv_elements + kind.recurrent_elements for kind in kinds),
        tail_elements=6 * spec.hidden_size + max(last for _, last in ffn),
        cells=_grows_with_cells(kinds),
        index_stride=stride,
        zero_bytes=tuple((4 if stride == 1 else 2) * chooses for chooses in choosing),
    )


def scratch_elements(spec: ModelSpec) -> int:
    """Float32 activations of one token that experts keep at once, wherever they are computed."""
    return _activations(spec).ffn_elements + 2 * spec.num_experts


def _micro_batch(context: int, concurrency: int) -> int:
    """Tokens that one graph computes."""
    return min(MICRO_BATCH_TOKENS, padded_context(context) * concurrency)


def layer_workspace_bytes(spec: ModelSpec, context: int, concurrency: int = 1) -> list[int]:
    """What each layer adds to the compute buffer of its device: for DSA a zero for every cell that a token may choose,
    which the graph keeps per layer and never frees."""
    alive = _activations(spec)
    if not alive.index_stride:
        return [0] * spec.num_layers
    chosen = min(INDEX_TOP_K, padded_context(context) // alive.index_stride)
    tokens = _micro_batch(context, concurrency)
    return [zero * tokens * chosen for zero in alive.zero_bytes]


def workspace_bytes(spec: ModelSpec, context: int, *, output: bool, copies: int = 1, concurrency: int = 1) -> int:
    """Compute buffer of one device without what ``layer_workspace_bytes`` adds: an upper bound from the shapes.

    ``copies``: of the inputs, 4 where cards work as a pipeline. ``concurrency``: slots; they share a micro-batch, only
    recurrent states grow with them.
    """
    alive = _activations(spec)
    tokens = _micro_batch(context, concurrency)
    unit = 4 * tokens
    inputs = computed = 0
    for part in alive.cells:
        entries = cache_entries(part.window, part.stride, context)
        inputs += entries * part.inputs * tokens
        computed += entries * (part.computed * tokens + part.per_cell)
    kept = 0
    if copies > 1:  # of masks and of what the card before hands over; these are never freed
        kept = inputs * (copies - 1) + unit * (copies - 1) * (alive.base_elements - 4 * spec.hidden_size)
    router = 2 * spec.num_experts
    widest = unit * (alive.layer_elements + router)
    if alive.state_elements:
        state = STATE_ELEMENT_BYTES * alive.state_elements * concurrency
        widest = max(widest, state + unit * alive.recurrent_elements)
    needed = inputs + computed + widest
    if output:
        # The logits come last, behind the last layer's result. That lies where the last FFN found room: in the holes
        # between its own tensors, or in the one that the masks left.
        hole = min(inputs + computed + unit * alive.base_elements, unit * (alive.ffn_elements + router))
        tail = max(hole, unit * (alive.tail_elements + router))
        needed = max(needed, unit * spec.vocab_size + tail + (inputs if copies > 1 else 0))
    needed += kept
    return needed + needed // 64  # alignment, and what small tensors break off
