"""Weight formats of safetensors checkpoints and their exact bytes; those of one rank: shards.py.

A format covers every linear layer of the decoder, attention and shared experts included; embeddings, head, router,
norms and vision stay as they are. The suffix ``:experts`` limits it to the routed experts; ``+PART=BITS`` gives a part
of the model another width, ``+PART=BITSgGROUP`` another group size too (``Override``). Layouts as vLLM 0.33 reads and
the quantizers write them (facts/vllm-legality.md, facts/quantizers.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Literal, NamedTuple

from reapc.arch.spec import DTYPE_BYTES, ModelSpec, Role, TensorGroup
from reapc.errors import ReapcError
from reapc.schema import nearest

Method = Literal["plain", "fp8-block", "fp8", "int8", "gptq", "auto-round", "ct", "nvfp4", "mxfp4"]
GROUPS = (32, 64, 128)
EXPERTS_ONLY = ":experts"
FP8_BLOCK = 128
SIDE = 32  # AutoRound and GPTQModel leave a linear alone whose sides are no multiple of it
KEPT_BITS = 16  # the width of an override that leaves its part in the checkpoint's own dtype
PARTS: dict[str, Role] = {"attention": "attention", "shared_experts": "shared_expert", "dense": "dense_mlp"}
# What may be named inside layers: the experts of a layer are one part, which no override divides.
LAYER_PARTS: dict[str, Role] = {"experts": "expert", **PARTS, "other": "other"}
EVERY = -1  # of an override that is not limited to layers
_GROUPED = re.compile(r"^(gptq|auto-round|ct)-w(\d+)g(\d+)$")
_OVERRIDE = re.compile(r"^(?:layers\.(\d+)(?:-(\d+))?(?:\.([a-z_]+))?|([a-z_]+))=(\d+)(?:g(\d+))?$")
_BITS = {"gptq": (4, 8), "auto-round": tuple(range(2, 9)), "ct": tuple(range(2, 9))}
_PLAIN: dict[str, tuple[Method, int, int]] = {  # name: method, bits, group size (0: none)
    "bf16": ("plain", 16, 0),
    "fp16": ("plain", 16, 0),
    "fp8-block": ("fp8-block", 8, FP8_BLOCK),
    "fp8": ("fp8", 8, 0),
    "int8": ("int8", 8, 0),
    "nvfp4": ("nvfp4", 4, 16),
    "mxfp4": ("mxfp4", 4, 32),
}


class Override(NamedTuple):
    """Another width for one part: a role's linears (``part``; "": all) in the layers ``first`` to ``last`` (``EVERY``:
    in every layer). So no override divides the experts of one layer, which vLLM's fused kernels would refuse.
    ``group``: another group size, 0 for that of the format."""

    part: str
    first: int
    last: int
    bits: int
    group: int = 0

    @property
    def by_layer(self) -> bool:
        """Whether it is limited to some layers."""
        return self.last != EVERY

    def covers(self, role: Role, layer: int | None) -> bool:
        """Whether it speaks of this role in this layer."""
        if self.part and LAYER_PARTS[self.part] != role:
            return False
        return not self.by_layer or (layer is not None and self.first <= layer <= self.last)

    def __str__(self) -> str:
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        where = ".".join(filter(None, (f"layers.{span}" if self.by_layer else "", self.part)))
        return f"{where}={self.bits}" + (f"g{self.group}" if self.group else "")


@dataclass(frozen=True)
class WeightFormat:
    """One format. ``group_size`` weights of a row share a scale; 0 where that is not how it scales. Of ``overrides``
    that speak of the same tensor the last one counts."""

    name: str
    method: Method
    bits: int
    group_size: int
    experts_only: bool = False
    overrides: tuple[Override, ...] = ()

    @property
    def quantized(self) -> bool:
        return self.method != "plain"

    @property
    def base(self) -> WeightFormat:
        """The format without its overrides."""
        return replace(self, name=self.name.split("+", 1)[0], overrides=()) if self.overrides else self

    @property
    def by_layer(self) -> bool:
        """Whether layers differ."""
        return any(override.by_layer for override in self.overrides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Every bit width that a quantized linear may have, the most usual first."""
        return tuple(dict.fromkeys(b for b in (self.bits, *(o.bits for o in self.overrides)) if b != KEPT_BITS))

    @property
    def label(self) -> str:
        """The name as people are told it: without a list of parts that is longer than a line."""
        few = len(self.name) <= 60
        return self.name if few else f"{self.base.name} with other widths for {len(self.overrides)} parts"

    def at(self, group: TensorGroup, layer: int | None = None) -> WeightFormat | None:
        """The plain format that stores this tensor's linears in ``layer`` (None: outside layers, or in any of them);
        None where it stays in its own dtype."""
        if not self.quantized or not group.linears:
            return None
        bits = KEPT_BITS if self.experts_only and group.role != "expert" else self.bits
        size = self.group_size
        for override in self.overrides:
            if override.covers(group.role, layer):
                bits, size = override.bits, override.group or self.group_size
        return None if bits == KEPT_BITS else plain(self.method, bits, size)

    def covers(self, group: TensorGroup, layer: int | None = None) -> bool:
        """Whether it stores the linears of this tensor."""
        return self.at(group, layer) is not None

    @cached_property
    def bits_per_weight(self) -> float:
        """Bits per weight of a large linear, scales and zero points counted."""
        rows = columns = 8192
        return 8 * self.linear_bytes(rows, columns) / (rows * columns)

    @property
    def is_stored(self) -> bool:
        """Whether it is what a checkpoint lies in, rather than what a writer would make (``stored.AsStored``)."""
        return False

    def total_bytes(self, spec: ModelSpec) -> int | None:
        """Bytes of all tensors where they were counted in files; None: shapes tell."""
        return None

    def linear_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one (rows, columns) linear with its scales, as stored; ReapcError when it does not divide."""
        if reason := self.misfit(rows, columns):
            raise ReapcError(f"{self.name}: {reason}")
        return _linear_bytes(self.method, self.bits, self.group_size, rows, columns)

    def shard_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one rank's (rows, columns) part of a linear: a group that the cut divides counts on both sides."""
        return _linear_bytes(self.method, self.bits, self.group_size, rows, columns)

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why this linear cannot be stored, or None."""
        grouped = self.group_size if self.method in ("gptq", "auto-round", "ct", "nvfp4", "mxfp4") else 0
        if grouped and columns % grouped:
            return f"rows of {columns} weights do not divide into groups of {grouped}"
        if self.method in ("gptq", "auto-round") and (columns * self.bits % 32 or rows * self.bits % 32):
            return f"a {rows} x {columns} linear does not pack into int32 at {self.bits} bits"
        return None


@lru_cache(maxsize=4096)
def _linear_bytes(method: Method, bits: int, group: int, rows: int, columns: int) -> int:
    match method:
        case "plain":
            return 2 * rows * columns
        case "fp8-block":
            return fp8_linear_bytes(rows, columns, group)
        case "fp8" | "int8":  # one scale per output channel: fp8 in float32, int8 in 16 bit (compressed-tensors)
            return rows * columns + rows * (4 if method == "fp8" else 2)
        case "gptq" | "auto-round":
            return gptq_linear_bytes(rows, columns, bits, group, g_idx=method == "gptq")
        case "ct":
            return compressed_tensors_linear_bytes(rows, columns, bits, group)
        case "nvfp4":  # packed pairs, an fp8 scale per 16, a float32 scale for the weight and one for the input
            return rows * columns // 2 + rows * _groups(columns, group) + 8
        case "mxfp4":  # packed pairs, an e8m0 scale per 32
            return rows * columns // 2 + rows * _groups(columns, group)


def _groups(columns: int, group_size: int) -> int:
    return -(-columns // group_size) if group_size else 1


def gptq_linear_bytes(rows: int, columns: int, bits: int, group_size: int, *, g_idx: bool) -> int:
    """qweight int32 (in*bits/32, out), scales fp16 (groups, out), qzeros int32 (groups, out*bits/32), g_idx (in)."""
    groups = _groups(columns, group_size)
    packed = ceil(columns * bits / 32) * rows * 4
    return packed + groups * rows * 2 + groups * ceil(rows * bits / 32) * 4 + (columns * 4 if g_idx else 0)


def compressed_tensors_linear_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """weight_packed int32 (out, ceil(in * bits / 32)), weight_scale 16 bit (out, groups), weight_shape 2 x int64.

    Packed densely across words, as compressed-tensors 0.20 writes and vLLM 0.32 and 0.33 read it; 0.17 and older left
    the bits of a word that no whole weight fills (3, 5, 6 and 7 bits) empty."""
    return -(-columns * bits // 32) * rows * 4 + rows * _groups(columns, group_size) * 2 + 16


def fp8_linear_bytes(rows: int, columns: int, block: int = FP8_BLOCK) -> int:
    """weight e4m3 and weight_scale_inv float32 per ``block`` x ``block`` tile."""
    return rows * columns + -(-rows // block) * -(-columns // block) * 4


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every format without suffix, best known first."""
    grouped = [
        f"{method}-w{bits}g{group}"
        for method, widths in _BITS.items()
        for bits in sorted(widths, reverse=True)
        for group in GROUPS
    ]
    return (*_PLAIN, *grouped)


@lru_cache(maxsize=256)
def plain(method: Method, bits: int, group_size: int) -> WeightFormat:
    """The format of this method, without a suffix; a group size of 0: one scale for a whole row."""
    name = f"{method}-w{bits}g{group_size}" if method in _BITS else _name_of(method)
    return WeightFormat(name, method, bits, group_size)


def _name_of(method: Method) -> str:
    return next(name for name, (known, _, _) in _PLAIN.items() if known == method)


@lru_cache(maxsize=256)
def parse(name: str) -> WeightFormat | None:
    """The format of this name (case does not matter; ``:experts`` and overrides allowed); None when it is none of
    these, ReapcError when it is nearly one."""
    whole, *extras = name.lower().split("+")
    base = whole.removesuffix(EXPERTS_ONLY)
    only = whole != base
    if base in _PLAIN:
        method, bits, group = _PLAIN[base]
        if method == "plain" and (only or extras):
            raise ReapcError(f"format {name!r}: {base} has nothing to limit or to override", hint=f"write {base!r}")
    else:
        match = _GROUPED.match(base)
        if not match:
            return None
        method, bits, group = match[1], int(match[2]), int(match[3])  # type: ignore[assignment]
        if bits not in _BITS[method] or group not in GROUPS:
            raise ReapcError(
                f"format {name!r}: {method} has {', '.join(map(str, _BITS[method]))} bits and groups of "
                f"{', '.join(map(str, GROUPS))}",
                hint=nearest(base, names()),
            )
    plain = WeightFormat(base + (EXPERTS_ONLY if only else ""), method, bits, group, only)
    return with_overrides(plain, tuple(_override(name, text, plain) for text in extras))


def with_overrides(fmt: WeightFormat, overrides: tuple[Override, ...]) -> WeightFormat:
    """``fmt`` with these overrides, named after them."""
    if not overrides:
        return fmt
    return replace(fmt, name="+".join([fmt.name, *map(str, overrides)]), overrides=overrides)


def _override(name: str, text: str, fmt: WeightFormat) -> Override:
    match = _OVERRIDE.match(text)
    first, last, inner, part, width, size = match.groups("") if match else ("",) * 6
    wrong = (inner and inner not in LAYER_PARTS) or (part and part not in PARTS) or (last and int(last) < int(first))
    if not width or wrong:
        raise ReapcError(
            f"format {name!r}: {text!r} is not PART=BITS",
            hint=f"PART is layers.N, layers.A-B, {', '.join(PARTS)}, or layers.N.PART (there also experts); for "
            "example +attention=8, +layers.0-1=8 or +layers.3.experts=3g64",
        )
    bits, group = int(width), int(size or 0)
    allowed = _BITS.get(fmt.method, (fmt.bits,))
    if bits not in (*allowed, KEPT_BITS):
        raise ReapcError(
            f"format {name!r}: {text!r}: {fmt.method} has {', '.join(map(str, sorted(allowed)))} bits",
            hint=f"one of them, or {KEPT_BITS} to leave the part as it is",
        )
    if group and (fmt.method not in _BITS or group not in GROUPS or bits == KEPT_BITS):
        sizes = ", ".join(map(str, GROUPS)) if fmt.method in _BITS and bits != KEPT_BITS else "none"
        raise ReapcError(f"format {name!r}: {text!r}: group sizes here: {sizes}", hint=f"{text.rpartition('g')[0]!r}")
    if part:
        return Override(part, 0, EVERY, bits, group)
    return Override(inner, int(first), int(last or first), bits, group)


def placed_groups(fmt: WeightFormat, spec: ModelSpec) -> Iterator[tuple[TensorGroup, int | None, int]]:
    """Every tensor group of the main model, a layer that it is in and how often it occurs so; layers are told apart
    only where the format does."""
    if not fmt.by_layer:
        yield from ((group, None, count) for group, count in spec.groups())
        return
    yield from ((group, None, 1) for group in spec.outer)
    for layer in spec.layers:
        yield from ((group, layer.index, 1) for group in layer.kind.tensors)


def of_mtp(fmt: WeightFormat) -> WeightFormat:
    """What the MTP layers of a checkpoint in ``fmt`` are in: AutoRound and GPTQModel do not know these layers, so that
    they stay in 16 bit; the FP8 cast takes them along."""
    return plain("plain", KEPT_BITS, 0) if fmt.method in _BITS and not fmt.is_stored else fmt


def stored_bytes(group: TensorGroup) -> int:
    """Bytes of one unit (an expert's share, or the whole) in its own 16 bit dtype, or the one it is stored in."""
    return prod(group.shape) * (DTYPE_BYTES[group.dtype] if group.dtype else 2)


def group_bytes(fmt: WeightFormat, group: TensorGroup, experts: int, layer: int | None = None) -> int:
    """Bytes of a tensor (all its experts) in the format, unsharded."""
    stored = fmt.at(group, layer)
    unit = sum(stored.linear_bytes(*shape) for shape in group.linears) if stored else stored_bytes(group)
    return unit * (experts if group.per_expert else 1)


def checkpoint_bytes(fmt: WeightFormat, spec: ModelSpec, *, mtp: bool = False) -> int:
    """Tensor bytes of the checkpoint: the main model, ``mtp`` layers if asked for, and the vision tower in 16 bits."""
    if (counted := fmt.total_bytes(spec)) is not None:
        return counted
    placed = placed_groups(fmt, spec)
    size = sum(group_bytes(fmt, group, spec.num_experts, layer) * count for group, layer, count in placed)
    if mtp:
        own = of_mtp(fmt)
        size += sum(group_bytes(own, group, spec.num_experts) for group in spec.mtp_outer)
        for layer_spec in spec.mtp_layers:
            for group in layer_spec.kind.tensors:
                size += group_bytes(own, group, spec.num_experts, layer_spec.index)
    return size + 2 * spec.vision_parameters


def misfit(fmt: WeightFormat, spec: ModelSpec) -> str | None:
    """Why the quantizer cannot write this model in the format, or None."""
    if not fmt.quantized:
        return None
    beyond = next((o for o in fmt.overrides if o.by_layer and o.last >= spec.num_layers), None)
    if beyond is not None:
        return f"{beyond}: the model has the layers 0 to {spec.num_layers - 1}"
    for group, layer, _ in placed_groups(fmt, spec):
        if stored := fmt.at(group, layer):
            for shape in group.linears:
                if reason := stored.misfit(*shape):
                    return f"{group.name.removesuffix('.weight')}: {reason}"
    return None


def dividing_groups(fmt: WeightFormat, spec: ModelSpec) -> str:
    """Which group sizes this model's widths admit, in words."""
    if not fmt.group_size or fmt.method not in _BITS:
        return "`reapc formats` lists others"
    fitting = []
    for group in GROUPS:
        other = replace(fmt, name=fmt.name.replace(f"g{fmt.group_size}", f"g{group}", 1), group_size=group)
        if misfit(other, spec) is None:
            fitting.append(str(group))
    return f"its widths take groups of {' or '.join(fitting)}" if fitting else "none of the group sizes divides them"


def expert_bits(fmt: WeightFormat, spec: ModelSpec) -> float:
    """Mean bits per weight of the routed experts' linears."""
    size = weights = 0
    for group, layer, count in placed_groups(fmt, spec):
        if group.role == "expert" and group.linears:
            size += group_bytes(fmt, group, 1, layer) * count
            weights += sum(prod(shape) for shape in group.linears) * count
    return 8 * size / weights


def other_bits(fmt: WeightFormat, spec: ModelSpec) -> float:
    """Mean bits per weight of the linears that are no routed experts (16 where the model has none)."""
    size = weights = 0
    for group, layer, count in placed_groups(fmt, spec):
        if group.role != "expert" and group.linears and group.role in (*PARTS.values(), "other"):
            size += group_bytes(fmt, group, 1, layer) * count
            weights += sum(prod(shape) for shape in group.linears) * count
    return 8 * size / weights if weights else float(KEPT_BITS)
