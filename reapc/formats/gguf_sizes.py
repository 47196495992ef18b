"""GGUF bytes for the planner: exact, per layer, and linear in the expert count.

The experts' axis is the outermost one, so every tensor takes ``fixed + per_expert * experts`` bytes, and its type does
not depend on the expert count: but for 8 experts (llama-quantize takes the model for Mixtral), fewer than 4, and 1.
``GgufSizes.at`` gives the sizes that hold for a count. Layers of one kind whose rules give the same types share one
computation, so a model and a file type cost well under a millisecond, and a second time nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from reapc.arch.spec import GgufPart, ModelSpec
from reapc.formats import gguf
from reapc.formats.gguf_rules import EMBEDDINGS, Category, Rules, category, converted_type, quantizes
from reapc.formats.gguf_types import ALIGNMENT_BYTES, TYPES, UNQUANTIZED, fallback, padded

_CACHE_ENTRIES = 4096
_BASE = "BF16"  # what the converter writes for llama-quantize
_MANY = 16  # stands for any expert count without a rule of its own


def _regime(experts: int) -> int:
    """A count with the same rules as ``experts``."""
    if experts == 8 or experts <= 1:
        return experts
    return 2 if experts < 4 else _MANY


@dataclass(frozen=True, slots=True, eq=False)
class GgufSizes:
    """Bytes of one model in one file type, MTP layers last where they are kept. All lists are per layer.

    A layer takes ``fixed_bytes + per_expert_bytes * experts``; ``experts_per_expert_bytes`` is the part of the latter
    that llama-server moves with the routed experts (their matrices and biases). ``embedding_bytes``: the token
    embeddings; ``output_bytes``: everything else outside the layers. Nothing here is padded but ``file_bytes``.
    """

    fixed_bytes: list[int]
    per_expert_bytes: list[int]
    experts_per_expert_bytes: list[int]
    embedding_bytes: int
    output_bytes: int
    expert_bits: float  # mean bits per weight of the routed experts' matrices
    total_fixed_bytes: int
    total_per_expert_bytes: int
    _fixed_padding: int
    _remainders: tuple[tuple[int, int], ...]  # bytes per expert mod 32, and how many tensors have that
    _regime: int
    _spec: ModelSpec = field(repr=False)
    _request: tuple[str, bool, bool] = field(repr=False)

    def at(self, experts: int) -> GgufSizes:
        """The sizes that hold for ``experts`` experts: nearly always this object."""
        if _regime(experts) == self._regime:
            return self
        return sizes(self._spec.with_experts(experts), *self._request)

    def tensors_bytes(self, experts: int) -> int:
        """Bytes of all tensors, as in memory."""
        if _regime(experts) != self._regime:
            return self.at(experts).tensors_bytes(experts)
        return self.total_fixed_bytes + self.total_per_expert_bytes * experts

    def file_bytes(self, experts: int) -> int:
        """Bytes of the tensor data in the file, each tensor padded to 32 bytes (``gguf.weights_bytes``)."""
        if _regime(experts) != self._regime:
            return self.at(experts).file_bytes(experts)
        padding = self._fixed_padding
        for remainder, count in self._remainders:
            padding += -remainder * experts % ALIGNMENT_BYTES * count
        return self.total_fixed_bytes + self.total_per_expert_bytes * experts + padding


class _Matrix(NamedTuple):
    """A tensor that llama-quantize may change. ``weights``: of one expert, or of the whole."""

    name: str
    category: Category
    columns: int
    weights: int
    per_expert: bool
    stacked: bool
    routed: bool


class _Bytes:
    """Bytes of some tensors; see GgufSizes."""

    __slots__ = ("fixed", "padding", "per_expert", "remainders", "routed", "routed_bytes", "routed_weights")

    def __init__(self) -> None:
        self.fixed = self.padding = self.per_expert = 0
        self.routed = self.routed_bytes = self.routed_weights = 0
        self.remainders: dict[int, int] = {}

    def add(self, size: int, per_expert: bool, routed: bool) -> None:
        """One tensor of ``size`` bytes (of one expert, where that is what it has)."""
        if not per_expert:
            self.fixed += size
            self.padding += padded(size) - size
            return
        self.per_expert += size
        if routed:
            self.routed += size
        if remainder := size % ALIGNMENT_BYTES:
            self.remainders[remainder] = self.remainders.get(remainder, 0) + 1

    def add_all(self, other: _Bytes, count: int) -> None:
        """``count`` times the tensors of ``other``."""
        self.fixed += other.fixed * count
        self.padding += other.padding * count
        self.per_expert += other.per_expert * count
        self.routed += other.routed * count
        self.routed_bytes += other.routed_bytes * count
        self.routed_weights += other.routed_weights * count
        for remainder, tensors in other.remainders.items():
            self.remainders[remainder] = self.remainders.get(remainder, 0) + tensors * count


# What attn_v tensors, ffn_down tensors and ffn_gate and ffn_up of a layer get: a type each, or one for all of them.
_TypeOrTypes = tuple[str, ...] | str
_Types = tuple[_TypeOrTypes, _TypeOrTypes, str]
_Place = tuple[object, tuple[object, ...]]  # the objects of a model, and its key


class _Tensors:
    """The tensors of a layer, or of the outside: what is never quantized already as bytes.

    ``plain``: the type of matrices where nothing is quantized, or ""; ``native``: that of the routed experts then,
    where it differs; ``mtp``: an MTP block.
    """

    def __init__(
        self, arch: str, parts: list[GgufPart], plain: str, native: str | None = None, mtp: bool = False
    ) -> None:
        self.kept = _Bytes()
        self.matrices: list[_Matrix] = []
        for part in sorted(parts):
            # Two experts stand for any number but one: axes of one entry do not count.
            shape = part.with_axes(2)
            weights = prod(part.shape)
            name = f"blk.0.{part.name}"
            routed = gguf.is_routed(name)
            if not plain and quantizes(arch, part.name, shape):
                stacked = len(shape) > 2 and shape[-3] > 1
                kind = category(part.name)
                columns = part.shape[-1]
                self.matrices.append(_Matrix(part.name, kind, columns, weights, part.experts, stacked, routed))
                continue
            chosen = (native if routed else None) or plain or _BASE
            storage = TYPES[converted_type(arch, name, shape, chosen, mtp)]
            size = weights // storage.block * storage.block_bytes
            self.kept.add(size, part.experts, routed)
            if routed and part.name.endswith(".weight"):
                self.kept.routed_bytes += size
                self.kept.routed_weights += weights
        self.values = sum(matrix.category == "attn_v" for matrix in self.matrices)
        self.downs = sum(matrix.category == "ffn_down" for matrix in self.matrices)
        self._memo: dict[tuple[str, int, bool, _Types], _Bytes] = {}

    def bytes_of(self, rules: Rules, types: _Types) -> _Bytes:
        """Bytes with these types; ``rules`` settles the other tensors."""
        key = (rules.ftype, rules.experts, rules.tied, types)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._bytes_of(rules, types)
        return found

    def _bytes_of(self, rules: Rules, types: _Types) -> _Bytes:
        result = _Bytes()
        result.add_all(self.kept, 1)
        places = dict.fromkeys(("attn_v", "ffn_down"), 0)
        by_category = {"attn_v": types[0], "ffn_down": types[1], "ffn_gate": types[2], "ffn_up": types[2]}
        for name, kind, columns, weights, per_expert, stacked, routed in self.matrices:
            chosen = by_category.get(kind)
            if chosen is None or rules.ftype == "MXFP4_MOE":  # which looks at the shape and not at the place
                chosen = rules.choose(kind, name, columns, 0, stacked)
            if isinstance(chosen, tuple):
                chosen = chosen[places[kind]]
                places[kind] += 1
            storage = TYPES[fallback(chosen, columns)]
            size = weights // storage.block * storage.block_bytes
            result.add(size, per_expert, routed)
            if routed:
                result.routed_bytes += size
                result.routed_weights += weights
        return result


class _Tables(NamedTuple):
    """The types by layer (attn_v: by running number)."""

    attn_v: list[str]
    ffn_down: list[str]
    ffn_gate_up: list[str]


@lru_cache(maxsize=_CACHE_ENTRIES)
def _tables(rules: Rules) -> _Tables:
    return _Tables(
        [rules.attn_v(i) for i in range(rules.values)],
        [rules.ffn_down(i) for i in range(rules.layers)],
        [rules.ffn_gate_up(i) for i in range(rules.layers)],
    )


class _Structure:
    """A model's tensors before a file type is chosen (``plain``: the type of unquantized matrices, or "")."""

    def __init__(self, spec: ModelSpec, mtp: bool, plain: str) -> None:
        self.arch = gguf.architecture(spec)
        outside: list[GgufPart] = []
        extra: dict[int, list[GgufPart]] = {}
        for part in gguf.outer_parts(spec, mtp):
            place, name = gguf.part_layer(part.name)
            if place < 0:
                outside.append(part)
            else:
                extra.setdefault(place, []).append(part._replace(name=name))

        self.tied = all(part.name != "output.weight" for part in outside)
        native = gguf.native_expert_type(spec)
        self.gqa = gguf.heads_per_kv_head(spec)
        self.embedding = _Tensors(self.arch, [part for part in outside if part.name in EMBEDDINGS], plain)
        self.output = _Tensors(self.arch, [part for part in outside if part.name not in EMBEDDINGS], plain)
        built: dict[tuple[int, ...], _Tensors] = {}
        self.layers: list[_Tensors] = []
        for index, kinds in enumerate(gguf.blocks(spec, mtp)):
            key = (*map(id, kinds), -index if index in extra else 1)
            if key not in built:
                parts = [*gguf.block_parts(kinds), *extra.get(index, [])]
                built[key] = _Tensors(self.arch, parts, plain, native, index >= spec.num_layers)
            self.layers.append(built[key])
        self.values = sum(layer.values for layer in self.layers)

    def rows(self, rules: Rules) -> list[_Bytes]:
        """The bytes of every layer, then of the embeddings, then of what else is outside."""
        tables, first_eighth, downs, values = _tables(rules), rules.layers // 8, 0, 0
        low, high = rules.default, rules.ffn_down(0)
        rows = []
        for layer, down, gate_up in zip(self.layers, tables.ffn_down, tables.ffn_gate_up, strict=True):
            attn_v: _TypeOrTypes = ""
            if layer.values:
                attn_v = tables.attn_v[values] if layer.values == 1 else tuple(tables.attn_v[values:][: layer.values])
                values += layer.values
            ffn_down: _TypeOrTypes = down
            if rules.counts_downs:
                ffn_down = tuple(high if downs + j < first_eighth else low for j in range(layer.downs))
                downs += layer.downs
            rows.append(layer.bytes_of(rules, (attn_v, ffn_down, gate_up)))
        return [*rows, *(group.bytes_of(rules, ("", "", "")) for group in (self.embedding, self.output))]

    def plain_rows(self) -> list[_Bytes]:
        """The same where nothing is quantized."""
        return [group.kept for group in (*self.layers, self.embedding, self.output)]


_structures: dict[tuple[object, ...], tuple[object, _Structure]] = {}
_found: dict[tuple[object, ...], tuple[object, GgufSizes]] = {}


def sizes(spec: ModelSpec, ftype: str, has_imatrix: bool, mtp: bool = False) -> GgufSizes:
    """The bytes of ``spec`` as ``ftype`` (a name in DEFAULT_TYPES); equal to the sums over ``gguf.tensor_types``.

    ``mtp``: the MTP layers are kept. CannotBeDone where llama.cpp does not know the model or has no type for a row.
    """
    # The cache holds the objects whose ids are its keys, so that an id means one object.
    kept = (spec.layers, spec.outer, spec.gguf_extra, spec.mtp_layers, spec.mtp_outer)
    model = (*map(id, kept), spec.gguf_arch, gguf.native_expert_type(spec), mtp)
    key = (*model, ftype, has_imatrix, _regime(spec.num_experts))
    entry = _found.get(key)
    if entry is None:
        if len(_found) >= _CACHE_ENTRIES:
            _found.clear()
        build = _sizes_of_one_expert if spec.num_experts <= 1 else _sizes
        entry = _found[key] = (kept, build(spec, ftype, has_imatrix, mtp, (kept, model)))
    return entry[1]


def _structure(spec: ModelSpec, mtp: bool, plain: str, place: _Place) -> _Structure:
    kept, model = place
    entry = _structures.get((*model, plain))
    if entry is None:
        if len(_structures) >= _CACHE_ENTRIES:
            _structures.clear()
        entry = _structures[(*model, plain)] = (kept, _Structure(spec, mtp, plain))
    return entry[1]


def _sizes(spec: ModelSpec, ftype: str, has_imatrix: bool, mtp: bool, place: _Place) -> GgufSizes:
    structure = _structure(spec, mtp, ftype if ftype in UNQUANTIZED else "", place)
    if ftype in UNQUANTIZED:
        rows = structure.plain_rows()
    else:
        rules = Rules(
            ftype, has_imatrix, structure.arch, len(structure.layers), structure.values, _regime(spec.num_experts),
            structure.gqa, structure.tied,
        )  # fmt: skip
        rows = structure.rows(rules)
    return _result(rows, spec, (ftype, has_imatrix, mtp))


def _result(rows: list[_Bytes], spec: ModelSpec, request: tuple[str, bool, bool]) -> GgufSizes:
    """``rows``: the layers, the embeddings, what else is outside."""
    counts: dict[_Bytes, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    total = _Bytes()
    for row, count in counts.items():
        total.add_all(row, count)
    *layers, embedding, output = rows
    return GgufSizes(
        fixed_bytes=[row.fixed for row in layers],
        per_expert_bytes=[row.per_expert for row in layers],
        experts_per_expert_bytes=[row.routed for row in layers],
        embedding_bytes=embedding.fixed,
        output_bytes=output.fixed,
        expert_bits=8 * total.routed_bytes / total.routed_weights,
        total_fixed_bytes=total.fixed,
        total_per_expert_bytes=total.per_expert,
        _fixed_padding=total.padding,
        _remainders=tuple(total.remainders.items()),
        _regime=_regime(spec.num_experts),
        _spec=spec,
        _request=request,
    )


def _sizes_of_one_expert(spec: ModelSpec, ftype: str, has_imatrix: bool, mtp: bool, place: _Place) -> GgufSizes:
    """With a single expert llama-quantize goes by running numbers everywhere: from the list of tensors."""
    experts = [{part.name for part in gguf.block_parts(kinds) if part.experts} for kinds in gguf.blocks(spec, mtp)]
    rows = [_Bytes() for _ in range(len(experts) + 2)]
    for tensor in gguf.tensor_types(spec, ftype, has_imatrix, mtp):
        layer, name = gguf.part_layer(tensor.name)
        if layer < 0:
            layer = len(experts) + (name not in EMBEDDINGS)
        per_expert, routed = layer < len(experts) and name in experts[layer], gguf.is_routed(tensor.name)
        rows[layer].add(tensor.data_bytes, per_expert, routed)
        if routed and name.endswith(".weight"):
            rows[layer].routed_bytes += tensor.data_bytes
            rows[layer].routed_weights += prod(tensor.shape)
    return _result(rows, spec, (ftype, has_imatrix, mtp))
