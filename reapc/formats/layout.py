"""Which tensors a checkpoint of a format holds, by name: dtype and shape of each, the quantized ones in their parts."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from reapc.arch import ModelSpec, TensorSpec
from reapc.arch.spec import DTYPE_BYTES, LayerSpec, TensorGroup
from reapc.errors import ReapcError
from reapc.formats.weights import FP8_BLOCK, WeightFormat, of_mtp

HALF = ("F16", "BF16")  # the quantizers write scales of 16 bit in either, some of both in one file
SAFETENSORS = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "float8": "F8_E4M3",
    "uint8": "U8",
}  # fmt: skip
_BYTES = {name: DTYPE_BYTES[dtype] for dtype, name in SAFETENSORS.items()} | {"I8": 1}


class Stored(NamedTuple):
    """One tensor of the 16 bit checkpoint, the group that it belongs to, and the plain format that its linear is stored
    in; ``format`` None where the tensor stays as it is."""

    tensor: TensorSpec
    group: TensorGroup
    format: WeightFormat | None


class Expected(NamedTuple):
    """What a tensor on disk must be: one of these safetensors dtypes (all of one size), and this shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtypes[0]]

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {list(self.shape)}"


class Part(NamedTuple):
    """One tensor of a quantized linear: the end of its name, its shape, and the dtypes that it may have."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def tensors_of(spec: ModelSpec, *, mtp: bool = False) -> Iterator[tuple[TensorSpec, TensorGroup]]:
    """Every tensor of the 16 bit checkpoint with its group (no vision), outer ones first; ``mtp``: MTP layers too,
    behind the others."""
    yield from _tensors_of(spec, spec.outer, spec.layers)
    if mtp:
        yield from mtp_tensors_of(spec)


def mtp_tensors_of(spec: ModelSpec) -> Iterator[tuple[TensorSpec, TensorGroup]]:
    """Those of the MTP layers."""
    yield from _tensors_of(spec, spec.mtp_outer, spec.mtp_layers)


def _tensors_of(
    spec: ModelSpec, outer: tuple[TensorGroup, ...], layers: tuple[LayerSpec, ...]
) -> Iterator[tuple[TensorSpec, TensorGroup]]:
    for group in outer:
        for tensor in group.expand("", spec.num_experts, None):
            yield tensor, group
    for layer in layers:
        for group in layer.kind.tensors:
            for tensor in group.expand(f"{layer.prefix}.", spec.num_experts, layer.index):
                yield tensor, group


def stored(fmt: WeightFormat, spec: ModelSpec, *, mtp: bool = False) -> Iterator[Stored]:
    """The same with the format that each tensor is stored in."""
    for tensor, group in tensors_of(spec):
        yield Stored(tensor, group, fmt.at(group, tensor.layer))
    own = of_mtp(fmt)
    for tensor, group in mtp_tensors_of(spec) if mtp else ():
        yield Stored(tensor, group, own.at(group, tensor.layer))


def parts(fmt: WeightFormat, rows: int, columns: int) -> tuple[Part, ...]:
    """What a (rows, columns) linear becomes in a plain ``fmt``. Widths that do not divide a word are packed as one bit
    stream: along the input in GPTQ and AutoRound (both ways in qzeros), along a row in compressed-tensors (0.20; its
    older versions left the end of a word empty). A group size of 0 is one scale for the whole row."""
    group = fmt.group_size or columns
    groups = -(-columns // group)
    match fmt.method:
        case "gptq" | "auto-round":
            found = (
                Part("qweight", (columns * fmt.bits // 32, rows), ("I32",)),
                Part("qzeros", (groups, rows * fmt.bits // 32), ("I32",)),
                Part("scales", (groups, rows), HALF),
            )
            return (*found, Part("g_idx", (columns,), ("I32",))) if fmt.method == "gptq" else found
        case "ct":
            return (
                Part("weight_packed", (rows, -(-columns * fmt.bits // 32)), ("I32",)),
                Part("weight_scale", (rows, groups), HALF),
                Part("weight_shape", (2,), ("I64",)),
            )
        case "fp8-block":
            tiles = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            return Part("weight", (rows, columns), ("F8_E4M3",)), Part("weight_scale_inv", tiles, ("F32",))
        case "fp8":
            return Part("weight", (rows, columns), ("F8_E4M3",)), Part("weight_scale", (rows, 1), ("F32",))
        case "int8":
            return Part("weight", (rows, columns), ("I8",)), Part("weight_scale", (rows, 1), HALF)
        case "nvfp4":
            return (
                Part("weight_packed", (rows, columns // 2), ("U8",)),
                Part("weight_scale", (rows, groups), ("F8_E4M3",)),
                Part("weight_global_scale", (1,), ("F32",)),
                Part("input_global_scale", (1,), ("F32",)),
            )
        case "mxfp4":
            return (
                Part("weight_packed", (rows, columns // 2), ("U8",)),
                Part("weight_scale", (rows, groups), ("U8",)),
            )
        case "plain":
            return (Part("weight", (rows, columns), HALF),)


def linear_modules(tensor: TensorSpec, group: TensorGroup, experts: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The modules that a tensor's linears are quantized as, with (rows, columns). Experts that are fused on disk are
    written one by one, gate and up apart, as AutoRound and compressed-tensors unfuse them (no writer of reapc's takes
    such a model yet)."""
    name = tensor.name.removesuffix(".weight")
    if group.expert_axis is None:
        yield name, group.linears[0]
        return
    path, _, last = name.rpartition(".")
    names = ("gate_proj", "up_proj") if len(group.linears) == 2 else (last,)
    for expert in range(experts):
        for part, shape in zip(names, group.linears, strict=True):
            yield f"{path}.{expert}.{part}", shape


def expected_tensors(fmt: WeightFormat, spec: ModelSpec, *, mtp: bool = False) -> dict[str, Expected]:
    """Exactly what a checkpoint of ``fmt`` holds, by name (no vision tower, whose tensors a config does not name).

    Their bytes are ``weights.checkpoint_bytes(fmt, spec, mtp=mtp)`` without the tower's, for a model whose config
    states a 16 bit dtype; of a float32 one, what is not quantized stays in float32."""
    plain = SAFETENSORS.get(spec.dtype)
    if plain is None:
        raise ReapcError(f"config.json: dtype {spec.dtype!r} is not one of {', '.join(SAFETENSORS)}")
    found: dict[str, Expected] = {}
    for tensor, group, item in stored(fmt, spec, mtp=mtp):
        if item is None:
            dtype = SAFETENSORS[group.dtype] if group.dtype else plain
            found[tensor.name] = Expected((dtype,), tensor.shape)
            continue
        for module, shape in linear_modules(tensor, group, spec.num_experts):
            for part in parts(item, *shape):
                found[f"{module}.{part.suffix}"] = Expected(part.dtypes, part.shape)
    return found
