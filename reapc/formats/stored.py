"""The format of a checkpoint that is kept as it is: what each part of the model is stored in there, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from reapc.arch.spec import ModelSpec, TensorGroup
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.formats.layout import linear_modules
from reapc.formats.packing import Packing
from reapc.formats.published import published_format
from reapc.formats.quantization import Quantization
from reapc.formats.weights import WeightFormat

Placed = Mapping[tuple[str, int | None], WeightFormat | None]


@dataclass(frozen=True, eq=False)
class AsStored(WeightFormat):
    """What a checkpoint is published in. Its name is that of the nearest format; ``placed`` says what really holds the
    linears of each tensor group, by its name and layer (None for every layer, where all are alike); without it the name
    decides. ``disk``: bytes of what a pruned copy keeps whatever happens, and of one expert of every layer, as counted
    in the files; None where only the config is known. ``refusal``: why vLLM does not load it."""

    placed: Placed = field(default_factory=dict)
    disk: tuple[int, int] | None = None
    refusal: str | None = None

    @property
    def is_stored(self) -> bool:
        """True."""
        return True

    @property
    def by_layer(self) -> bool:
        """Whether layers differ."""
        return any(layer is not None for _, layer in self.placed)

    @property
    def widths(self) -> tuple[int, ...]:
        """Every bit width that a quantized linear has, that of the name first."""
        return tuple(dict.fromkeys((self.bits, *(fmt.bits for fmt in self.placed.values() if fmt is not None))))

    def at(self, group: TensorGroup, layer: int | None = None) -> WeightFormat | None:
        """The plain format that stores this tensor's linears in ``layer``; None where it stays in its own dtype."""
        if not self.placed:
            return super().at(group, layer)
        return self.placed.get((group.name, layer if self.by_layer else None))

    def total_bytes(self, spec: ModelSpec) -> int | None:
        """Bytes of the tensors on disk with the experts of ``spec``; None where no file was counted."""
        return None if self.disk is None else self.disk[0] + self.disk[1] * spec.num_experts


def named(fmt: WeightFormat, placed: Placed, disk: tuple[int, int] | None, refusal: str | None) -> AsStored:
    """``fmt`` as the format of a checkpoint."""
    own = {item.name: getattr(fmt, item.name) for item in fields(WeightFormat)}
    return AsStored(**own, placed=placed, disk=disk, refusal=refusal)


def as_published(spec: ModelSpec) -> AsStored | None:
    """The format of the checkpoint by its config alone; None where it is not quantized, or in a way that reapc has no
    name for. A config whose lists are not whole is read by that name."""
    name = published_format(spec) if spec.quantization else None
    fmt = weights.parse(name) if name else None
    if fmt is None or not fmt.quantized or spec.quantization is None:
        return None
    try:
        rules = Quantization(spec.quantization, spec.model_type)
        placed, _ = placements(spec, lambda group, layer: [rules.packing(_module(group, layer))])
    except ReapcError:
        return named(fmt, {}, None, None)
    return named(fmt, placed, None, rules.refused_by_vllm)


def _module(group: TensorGroup, prefix: str) -> str:
    """The name that rules are asked about: the module of the group's first expert."""
    tensor = next(group.expand(prefix, 1, None))
    if group.expert_axis is not None and not tensor.name.endswith(".weight"):
        return tensor.module
    return next(linear_modules(tensor, group, 1))[0]


def placements(
    spec: ModelSpec, packings: Callable[[TensorGroup, str], Iterable[Packing | None]]
) -> tuple[Placed, str | None]:
    """What holds the linears of each group, from the ``packings`` of its tensors in a layer (by its prefix, with the
    dot), and where experts of one layer are held in several ways, the layer that they are in."""
    found: dict[tuple[str, int | None], WeightFormat | None] = {}
    mixed: str | None = None
    for group in (*spec.outer, *spec.mtp_outer):
        if group.linears:
            found[group.name, None] = _plain(next(iter(packings(group, ""))))
    for layer in (*spec.layers, *spec.mtp_layers):
        experts: set[Packing | None] = set()
        for group in layer.kind.tensors:
            if not group.linears:
                continue
            held = set(packings(group, f"{layer.prefix}."))
            first = max(held, key=lambda packing: (packing is None, str(packing)))
            found[group.name, layer.index] = _plain(first)
            if group.role == "expert":
                experts |= held
        if len(experts) > 1:
            mixed = mixed or layer.prefix
    formats: dict[str, set[WeightFormat | None]] = {}
    for (name, _), fmt in found.items():
        formats.setdefault(name, set()).add(fmt)
    if all(len(own) == 1 for own in formats.values()):
        return {(name, None): fmt for (name, _), fmt in found.items()}, mixed
    return dict(found), mixed


def _plain(packing: Packing | None) -> WeightFormat | None:
    if packing is None:
        return None
    group = weights.FP8_BLOCK if packing.method == "fp8-block" else packing.group_size
    return weights.plain(packing.method, packing.bits, group)
