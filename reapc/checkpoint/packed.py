"""The tensors on disk that a quantized linear lies in, and the weight that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from reapc.arch import TensorGroup, TensorSpec
from reapc.checkpoint.safetensors_file import TensorEntry
from reapc.errors import ReapcError
from reapc.formats.layout import Part, linear_modules
from reapc.formats.packing import Packing
from reapc.formats.quantization import Quantization

if TYPE_CHECKING:
    import torch


class PackedLinear(NamedTuple):
    """A quantized tensor of the plain checkpoint: its linears (rows, columns), all in one packing, and the tensors that
    they lie in, by the end of their names. With ``experts`` > 0 there is one such of each: ``parts`` hold all experts
    on their first axis or, where the experts are ``unfused``, their keys begin with the expert's number and the
    linear's. The plain tensor is what the linears make one above the other, or that ``transposed``."""

    packing: Packing
    linears: tuple[tuple[int, int], ...]
    parts: dict[str, str]
    experts: int = 0
    unfused: bool = False
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Rows of all linears."""
        return sum(rows for rows, _ in self.linears)

    @property
    def columns(self) -> int:
        return self.linears[0][1]

    def weight(
        self, read: Callable[[str], torch.Tensor], expert: int, device: str | torch.device, where: str
    ) -> torch.Tensor:
        """What the tensor means, or one ``expert`` of those that it holds, (rows, columns) or transposed, decoded on
        ``device``; ``read`` gives a part by name. ReapcError where columns belong to no group."""
        import torch

        from reapc.checkpoint.decode import decode

        pieces = []
        for number, shape in enumerate(self.linears):
            own = f"{expert}.{number}." if self.unfused else ""
            names = {key.removeprefix(own): name for key, name in self.parts.items() if key.startswith(own)}
            found = {key: read(name) for key, name in names.items()}
            if self.experts and not self.unfused:
                found = {key: part[expert] for key, part in found.items()}
            _check_order(found, names, where)
            pieces.append(decode({key: part.to(device) for key, part in found.items()}, self.packing, *shape))
        result = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return result.mT if self.transposed else result


def _check_order(parts: Mapping[str, torch.Tensor], names: Mapping[str, str], where: str) -> None:
    order = parts.get("g_idx")
    if order is None:
        return
    groups = parts["scales"].shape[0]
    if bool((order < 0).any()) or bool((order >= groups).any()):
        raise ReapcError(f"{where}: tensor {names['g_idx']!r} names no group of {groups}")


class Found(NamedTuple):
    """A packed tensor, and what each of its parts must be, by name."""

    linear: PackedLinear
    parts: dict[str, Part]


def find_packed(
    tensor: TensorSpec, group: TensorGroup, rules: Quantization, entries: Mapping[str, TensorEntry], where: str
) -> Found | None:
    """How a tensor of the plain checkpoint is packed by its config; None where it stays as it is. ReapcError where the
    packing does not divide it."""
    if not group.linears:
        return None
    if group.expert_axis is None:
        module = tensor.name.removesuffix(".weight")
        return _one(module, group.linears, rules.packing(tensor.module), entries, where)
    fused = rules.packing(tensor.module)
    if fused is not None:
        parts = fused.fused_parts(tensor.name, tensor.shape, entries)
        if parts is not None:
            return _fused(tensor, fused, parts, where)
    return _unfused(tensor, group, rules, entries, where)


def _check(packing: Packing, module: str, rows: int, columns: int, where: str) -> None:
    if reason := packing.misfit(rows, columns):
        raise ReapcError(f"{where}: quantization_config: {module}: {reason}")


def _one(
    module: str, linears: tuple[tuple[int, int], ...], packing: Packing | None, entries: Mapping[str, TensorEntry],
    where: str,
) -> Found | None:  # fmt: skip
    if packing is None:
        return None
    ((rows, columns),) = linears
    _check(packing, module, rows, columns, where)
    parts = packing.parts(module, rows, columns, entries)
    names = {part.suffix: f"{module}.{part.suffix}" for part in parts}
    return Found(PackedLinear(packing, linears, names), {names[part.suffix]: part for part in parts})


def _fused(tensor: TensorSpec, packing: Packing, parts: dict[str, tuple[str, Part]], where: str) -> Found:
    experts, inner, last = tensor.shape
    transposed = packing.method == "mxfp4"
    rows, columns = (last, inner) if transposed else (inner, last)
    _check(packing, tensor.name, rows, columns, where)
    linear = PackedLinear(
        packing, ((rows, columns),), {key: name for key, (name, _) in parts.items()}, experts, transposed=transposed
    )
    return Found(linear, dict(parts.values()))


def _unfused(
    tensor: TensorSpec, group: TensorGroup, rules: Quantization, entries: Mapping[str, TensorEntry], where: str
) -> Found | None:
    """Experts that a quantizer has written one by one, in place of the one tensor of the plain checkpoint."""
    experts = tensor.shape[group.expert_axis or 0]
    names: dict[str, str] = {}
    found: dict[str, Part] = {}
    packings: set[Packing | None] = set()
    count = len(group.linears)
    for index, (module, (rows, columns)) in enumerate(linear_modules(tensor, group, experts)):
        packing = rules.packing(module)
        packings.add(packing)
        if packing is None:
            continue
        _check(packing, module, rows, columns, where)
        for part in packing.parts(module, rows, columns, entries):
            name = f"{module}.{part.suffix}"
            names[f"{index // count}.{index % count}.{part.suffix}"] = name
            found[name] = part
    if packings == {None}:
        return None
    if len(packings) > 1:
        raise ReapcError(
            f"{where}: quantization_config: the experts of {tensor.name} are packed in several ways "
            f"({', '.join(sorted(str(packing or 'kept') for packing in packings))})",
            hint="take its 16 bit original",
        )
    (packing,) = packings
    assert packing is not None
    rows = sum(linear[0] for linear in group.linears)
    transposed = tensor.shape[1:] != (rows, group.linears[0][1])
    return Found(PackedLinear(packing, group.linears, names, experts, True, transposed), found)
