"""llama.cpp's memory beside the weights: KV cache and recurrent state (exact), compute buffers (an upper bound).

Read in llama.cpp 0c1e57098 (src/llama-kv-cache*.cpp, llama-memory-recurrent.cpp, ggml-alloc.c and the graphs in
src/models); what it was compared with is in docs/memory.md and tests/test_llamacpp_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reapc.arch.spec import GgufPart, LayerKind, LayerSpec, ModelSpec
from reapc.engines import data

_DATA = data.load("llamacpp")
_MEMORY: dict[str, int] = _DATA["memory"]
KV_TYPES: dict[str, dict[str, int]] = _DATA["kv"]
MICRO_BATCH_TOKENS = _MEMORY["micro_batch_tokens"]
STATE_ELEMENT_BYTES = 4  # conv and recurrent state are F32
_CACHE_ENTRIES = 1024


def padded_context(context: int) -> int:
    """Tokens of one slot: llama.cpp rounds up to 256."""
    pad = _MEMORY["context_pad_tokens"]
    return -(-context // pad) * pad


def cache_entries(window: int | None, stride: int, context: int) -> int:
    """Cells of one slot: the padded context, or on sliding layers the window and a micro-batch, padded."""
    cells = padded_context(context)
    if window is not None:
        cells = min(cells, padded_context(window + MICRO_BATCH_TOKENS))
    return cells if stride == 1 else padded_context(-(-cells // stride))


def kv_layer_bytes(kind: LayerKind, context: int, concurrency: int, kv: str) -> int:
    """KV cache of one layer over all slots, exact."""
    block, size = KV_TYPES[kv]["block"], KV_TYPES[kv]["bytes"]
    return sum(
        cache_entries(stream.window, stream.stride, context) * concurrency * (stream.elements // block * size)
        for stream in kind.cache
    )


def state_layer_bytes(kind: LayerKind, concurrency: int) -> int:
    """State of one layer over all slots, exact."""
    return STATE_ELEMENT_BYTES * (kind.conv_elements + kind.recurrent_elements) * concurrency


@dataclass(frozen=True, slots=True)
class _Activations:
    """What a graph keeps at once: float32 elements of one token, states of one sequence."""

    base_elements: int  # wherever in a layer
    ffn_elements: int  # in the widest FFN
    layer_elements: int  # in the widest FFN or attention
    recurrent_elements: int  # in the widest recurrent mixer, without its state
    state_elements: int
    tail_elements: int  # below the logits
    windows: tuple[int, ...]
    indexed: bool


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
        if part.name in ("attn_output.weight", "ssm_out.weight"):
            elements += part.shape[1]
        elif part.name == "attn_k_b.weight":
            elements += 2 * part.shape[0] * latent
        elif len(part.shape) == 2 and "conv" not in part.name:
            elements += 2 * part.shape[0]
    return elements


def _ffn(kind: LayerKind, top_k: int) -> tuple[int, int]:
    """The widest of routed experts, shared expert and dense MLP: inputs of the activation, its result, and the output;
    and of that what still lies in the buffer when the layer ends: an intermediate or output of the chosen experts."""
    widest = last = 0
    for roles, times in ((("expert",), top_k), (("shared_expert",), 1), (("dense_mlp",), 1)):
        inner = out = width = 0
        for part in _matrices(kind, *roles):
            if "down" in part.name:
                out, width = part.shape[-2], part.shape[-1]
            else:
                inner += part.shape[-2]
        gated = width if inner > width else 0  # an activation of one input overwrites it
        widest = max(widest, times * (inner + gated + out))
        last = max(last, times * max(width, out))
    return widest, last


def _read(spec: ModelSpec) -> _Activations:
    hidden, kinds = spec.hidden_size, {id(layer.kind): layer.kind for layer in spec.layers}.values()
    # input, residual stream, normed input, result, and one more for what is left of the buffer in pieces
    base = 5 * hidden
    parts = {part.name for kind in kinds for group in kind.tensors for part in group.gguf}
    if any(name.startswith("attn_res_score") for name in parts):
        # Kimi-K3 keeps the residual stream of every 12th layer (attn_res_block_size), and norms all of them at once.
        base += 2 * hidden * -(-spec.num_layers // 12)
    ffn = [_ffn(kind, spec.top_k) for kind in kinds]
    latent = [sum(p.shape[0] for p in _matrices(kind, "other") if len(p.shape) == 2) for kind in kinds]
    widest = max(total + extra for (total, _), extra in zip(ffn, latent, strict=True))
    streams = {stream for kind in kinds for stream in kind.cache}
    return _Activations(
        base_elements=base,
        ffn_elements=base + widest,
        layer_elements=base + max([widest, *(_mixer(kind) for kind in kinds if not kind.recurrent_elements)]),
        recurrent_elements=base + max([0, *(_mixer(kind) for kind in kinds if kind.recurrent_elements)]),
        # gathered and new, of convolution and recurrence
        state_elements=2 * max(kind.conv_elements + kind.recurrent_elements for kind in kinds),
        tail_elements=base + hidden + max(last for _, last in ffn),
        windows=tuple({stream.window for stream in streams if stream.window is not None}),
        indexed=any(stream.kind == "index" for stream in streams),
    )


def scratch_elements(spec: ModelSpec) -> int:
    """Float32 activations of one token that experts keep at once, wherever they are computed."""
    return _activations(spec).ffn_elements + 2 * spec.num_experts


INDEX_TOP_K = 2048  # index_topk of the published models with a DSA indexer


def workspace_bytes(
    spec: ModelSpec, context: int, *, output: bool, copies: int = 1, concurrency: int = 1, layers: int | None = None
) -> int:
    """Compute buffer of one device: an upper bound from the shapes.

    ``copies``: of the inputs, 4 where cards work as a pipeline. ``concurrency``: slots; they share a micro-batch, only
    recurrent states grow with them. ``layers``: how many layers are here (default: all), for what DSA keeps per layer.
    """
    alive, cells = _activations(spec), padded_context(context)
    tokens = min(MICRO_BATCH_TOKENS, cells * concurrency)
    # attention masks in f16, over the whole context and over the sliding windows
    masks = 2 * tokens * (cells + sum(cache_entries(window, 1, context) for window in alive.windows))
    fixed = 0
    indexed = 0
    if alive.indexed:
        # DSA: a mask of its own, scores in f32, and in every layer zeros in f32 that are never freed
        masks *= 2
        indexed = 4 * tokens * cells
        fixed = 4 * tokens * min(INDEX_TOP_K, cells) * ((spec.num_layers if layers is None else layers) + 1)
    router = 2 * spec.num_experts
    widest = 4 * tokens * (alive.layer_elements + router)
    if alive.state_elements:
        state = STATE_ELEMENT_BYTES * alive.state_elements * concurrency
        widest = max(widest, state + 4 * tokens * alive.recurrent_elements)
    layer = masks * copies + indexed + widest
    if output:
        # The logits come last, behind the last layer's result. That lies where the last FFN found room: in the holes
        # between its own tensors, or in the one that the masks left (copies of inputs are kept).
        hole = min(masks + 4 * tokens * alive.base_elements, 4 * tokens * (alive.ffn_elements + router))
        tail = max(hole, 4 * tokens * (alive.tail_elements + router))
        logits = 4 * tokens * spec.vocab_size + tail + (masks * copies if copies > 1 else 0)
        layer = max(layer, logits)
    return fixed + layer
