"""GGUF: every tensor of the file that llama-quantize writes, with its exact type and bytes.

Names and shapes come from the spec's ``GgufPart``s, types from ``gguf_rules``. Shapes are (..., out, in), as numpy
reads them: the row is the last axis, the experts' axis the first. ``gguf_sizes`` gives the same bytes fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from typing import NamedTuple

from reapc.arch.spec import GgufPart, LayerKind, ModelSpec
from reapc.errors import CannotBeDone
from reapc.formats.gguf_rules import Category, Rules, category, converted_type, quantizes
from reapc.formats.gguf_types import (
    ALIASES,
    ALIGNMENT_BYTES,
    DEFAULT_TYPES,
    NEEDS_IMATRIX,
    TYPES,
    UNQUANTIZED,
    GgufType,
    check_format,
    fallback,
    padded,
    tensor_bytes,
)

__all__ = [
    "ALIASES", "ALIGNMENT_BYTES", "DEFAULT_TYPES", "NEEDS_IMATRIX", "TYPES", "UNQUANTIZED", "GgufTensor", "GgufType",
    "architecture", "block_parts", "blocks", "check_format", "expert_bits", "file_overhead_bytes",
    "heads_per_kv_head", "is_routed", "native_expert_type", "outer_parts", "part_layer", "tensor_bytes",
    "tensor_types", "weights_bytes",
]  # fmt: skip

_ROUTED = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Their converters write a KV head count of 0 for layers without attention, and their first layer has none.
_NO_KV_HEADS_FIRST = frozenset({"nemotron_h", "nemotron_h_moe", "kimi-linear", "kimi-k3", "granitehybrid"})


class GgufTensor(NamedTuple):
    """One tensor of the file: its name, its shape (row last) and its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def data_bytes(self) -> int:
        """Bytes in memory, without the padding between tensors."""
        return tensor_bytes(self.type, self.shape)


def is_routed(name: str) -> bool:
    """Whether llama-server moves the tensor with the routed experts (its pattern for ``--n-cpu-moe``)."""
    return _ROUTED.search(name) is not None


def part_layer(name: str) -> tuple[int, str]:
    """The layer of a complete name (-1 outside) and what follows ``blk.N.``."""
    match = _LAYER.match(name)
    return (int(match.group(1)), match.group(2)) if match else (-1, name)


def outer_parts(spec: ModelSpec, mtp: bool = False) -> Iterator[GgufPart]:
    """The parts with complete names: embeddings, head, and what the converter adds."""
    for group in (*spec.outer, *(spec.mtp_outer if mtp else ())):
        yield from group.gguf
    yield from spec.gguf_extra


def blocks(spec: ModelSpec, mtp: bool = False) -> list[tuple[LayerKind, ...]]:
    """What becomes ``blk.N``, in order: a layer each; MTP layers of one index are folded into one block.

    MTP layers count only when kept, and where the converter writes them.
    """
    found: list[tuple[LayerKind, ...]] = [(layer.kind,) for layer in spec.layers]
    if mtp:
        for _, group in groupby(spec.mtp_layers, key=lambda layer: layer.index):
            kinds = tuple(layer.kind for layer in group)
            if any(True for _ in block_parts(kinds)):
                found.append(kinds)
    return found


def block_parts(kinds: tuple[LayerKind, ...]) -> Iterator[GgufPart]:
    """The tensors of one block, their names following ``blk.N.``."""
    for kind in kinds:
        for group in kind.tensors:
            yield from group.gguf


def _shape(part: GgufPart, experts: int) -> tuple[int, ...]:
    return part.with_axes(experts)


def _parts(spec: ModelSpec, mtp: bool) -> list[tuple[int, str, tuple[int, ...]]]:
    """Layer (-1 outside), name and shape of every tensor, in llama-quantize's order: by layer, then by name."""
    architecture(spec)
    found = [(part_layer(part.name)[0], part.name, _shape(part, spec.num_experts)) for part in outer_parts(spec, mtp)]
    for index, kinds in enumerate(blocks(spec, mtp)):
        found += [(index, f"blk.{index}.{part.name}", _shape(part, spec.num_experts)) for part in block_parts(kinds)]
    return sorted(found)


def architecture(spec: ModelSpec) -> str:
    """llama.cpp's name of the model's architecture; CannotBeDone where it has none."""
    if spec.gguf_arch is None:
        raise CannotBeDone(f"llama.cpp has no architecture for {spec.model_type}")
    return spec.gguf_arch


def heads_per_kv_head(spec: ModelSpec) -> int:
    """What llama.cpp's n_gqa() gives: heads over KV heads of the FIRST layer, 0 where that has no KV heads.

    Read off the matrices of the first layer where they show it: heads differ by layer in some models.
    """
    if spec.gguf_arch in _NO_KV_HEADS_FIRST:
        return 0
    if spec.latent_attention:
        return spec.num_heads  # converted to one KV head
    shapes = {part.name: part.shape for part in block_parts((spec.layers[0].kind,))}
    output, values = shapes.get("attn_output.weight"), shapes.get("attn_v.weight")
    if output and values:
        return output[-1] // values[0]
    return spec.num_heads // spec.num_kv_heads


def native_expert_type(spec: ModelSpec) -> str | None:
    """The type in which the converter repacks the routed experts of the published checkpoint whatever ``--outtype``
    says, or None. llama-quantize refuses to change it (it would need ``--allow-requantize``), so that such a model
    can only become a file type that leaves it: ``MXFP4_MOE``, or the converter's own F32, BF16 and F16.
    """
    stored = spec.quantization or {}
    packed = (
        spec.gguf_arch == "deepseek4"
        or (spec.gguf_arch == "gpt-oss" and stored.get("quant_method") == "mxfp4")
        or (spec.gguf_arch == "kimi-k3" and stored.get("format") == "mxfp4-pack-quantized")
    )
    return "MXFP4" if packed else None


def tensor_types(spec: ModelSpec, ftype: str, has_imatrix: bool, mtp: bool = False) -> list[GgufTensor]:
    """Every tensor of the GGUF that llama-quantize writes for ``ftype``, with its exact type, in its order.

    F32, BF16 and F16 are what the converter writes (see ``native_expert_type``). CannotBeDone where llama.cpp does not
    know the model or has no type for a row.
    """
    arch, parts = architecture(spec), _parts(spec, mtp)
    names = [name for _, name, _ in parts]
    rules = Rules(
        ftype, has_imatrix, arch, len(blocks(spec, mtp)), sum(category(name) == "attn_v" for name in names),
        spec.num_experts, heads_per_kv_head(spec), "output.weight" not in names,
    )  # fmt: skip
    native = native_expert_type(spec) if ftype in UNQUANTIZED else None
    seen: dict[Category, int] = {}
    result = []
    for layer, name, shape in parts:
        if ftype in UNQUANTIZED or not quantizes(arch, name, shape):
            plain = (native if is_routed(name) else None) or (ftype if ftype in UNQUANTIZED else "BF16")
            kept = converted_type(arch, name, shape, plain, layer >= spec.num_layers)
            result.append(GgufTensor(name, shape, kept))
            continue
        kind = category(name)
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        counted = kind == "attn_v" or (kind == "ffn_down" and rules.counts_downs) or rules.experts <= 1
        stacked = len(shape) > 2 and shape[-3] > 1
        chosen = rules.choose(kind, name, shape[-1], number if counted else layer, stacked)
        result.append(GgufTensor(name, shape, fallback(chosen, shape[-1])))
    return result


def weights_bytes(spec: ModelSpec, ftype: str, has_imatrix: bool, mtp: bool = False) -> int:
    """Bytes of the tensor data in the file, exact: every tensor is padded to 32 bytes."""
    return sum(padded(tensor.data_bytes) for tensor in tensor_types(spec, ftype, has_imatrix, mtp))


def expert_bits(tensors: Iterable[GgufTensor]) -> float:
    """Mean bits per weight of the routed experts' matrices."""
    experts = [tensor for tensor in tensors if is_routed(tensor.name) and tensor.name.endswith(".weight")]
    return 8 * sum(t.data_bytes for t in experts) / sum(prod(t.shape) for t in experts)


_tables: dict[tuple[int, ...], tuple[object, int]] = {}


def _table_bytes(spec: ModelSpec, mtp: bool) -> int:
    """The tensor table: per tensor its name, axes, sizes, type and offset. Not its order, nor the expert count."""
    kept = (spec.layers, spec.outer, spec.gguf_extra, spec.mtp_layers, spec.mtp_outer)
    key = (*map(id, kept), mtp)
    if key not in _tables:
        if len(_tables) >= 1024:
            _tables.clear()
        table = sum(24 + len(name) + 8 * len(shape) for _, name, shape in _parts(spec, mtp))
        _tables[key] = (kept, table)
    return _tables[key][1]


def file_overhead_bytes(
    spec: ModelSpec, ftype: str = "BF16", tokenizer_bytes: int | None = None, mtp: bool = False
) -> int:
    """Bytes of a GGUF before its tensor data: tensor table (exact but for the order), metadata and tokenizer.

    ``ftype`` does not matter. ``tokenizer_bytes``: what the token and merge strings take in the file. Without it the
    tokenizer is an ESTIMATE from the vocabulary: 8 + 6.5 bytes and a 4-byte type per token, 8 + 8.5 bytes per merge,
    one merge per token (not checked against a real Qwen3 file). The other metadata is taken as 4 KiB plus a chat
    template of 6 KiB.
    """
    tokenizer = tokenizer_bytes if tokenizer_bytes is not None else round(35 * spec.vocab_size)
    return padded(24 + _table_bytes(spec, mtp) + tokenizer + 10 * 1024)
