"""KV cache and state of a layer in elements and bytes, the same for every engine up to its rounding."""

from __future__ import annotations

from reapc.arch.spec import CacheStream, LayerKind, ModelSpec


def kv_kind(spec: ModelSpec) -> str:
    """What the model keeps of past tokens, in a word: "gqa", "mla", "mla+dsa", "swa+gqa", "hybrid gqa" ..."""
    streams = {stream for layer in spec.layers for stream in layer.kind.cache}
    parts = ["mla" if any(stream.kind == "latent" for stream in streams) else "gqa"]
    if any(stream.stride > 1 for stream in streams):
        parts = ["compressed"]
    if any(stream.kind == "index" for stream in streams):
        parts.append("dsa" if spec.latent_attention else "index")
    if any(stream.window is not None for stream in streams):
        parts.insert(0, "swa")
    kind = "+".join(parts)
    return f"hybrid {kind}" if any(layer.kind.recurrent_elements for layer in spec.layers) else kind


def elements_per_token(spec: ModelSpec) -> float:
    """Cache elements that one more token adds to a sequence longer than every window (sliding layers add none)."""
    return sum(
        stream.elements / stream.stride for layer in spec.layers for stream in layer.kind.cache if stream.window is None
    )


def sequence_elements(spec: ModelSpec, context: int) -> int:
    """Cache elements of one sequence of ``context`` tokens, without any engine's rounding."""
    return sum(stream.elements * stream.entries(context) for layer in spec.layers for stream in layer.kind.cache)


def state_bytes(kind: LayerKind, element_bytes: int = 4) -> int:
    """Bytes of one layer's state for one sequence: float32, as llama.cpp keeps it (vLLM: convolutions in 16 bit)."""
    return (kind.conv_elements + kind.recurrent_elements) * element_bytes


def spread(stream: CacheStream, tp: int) -> int:
    """Elements of one entry on one tensor-parallel rank: KV heads are split (at least one stays), latents are not."""
    if not stream.heads:
        return stream.elements
    return stream.elements // stream.heads * max(1, stream.heads // tp)
