"""The strict reload of a quantized checkpoint: every tensor as planned, and every weight near the one it came from.

A GPTQ MoE checkpoint that transformers opens the ordinary way has random experts and says so in a log line only. Here
whatever is missing, unexpected, misshapen, of another width or far from its original is an error by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.arch import ModelSpec, TensorSpec, load_config
from reapc.arch.spec import TensorGroup
from reapc.checkpoint.decode import zero_points
from reapc.checkpoint.reader import Checkpoint, PackedLinear, listed
from reapc.checkpoint.shards import Shards
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import Expected, expected_tensors, linear_modules, stored
from reapc.formats.packing import Packing
from reapc.formats.quantization import quantization_of
from reapc.formats.weights import WeightFormat
from reapc.progress import Progress

if TYPE_CHECKING:
    import torch

# A float of 3 bits after the point is off by at most 2^-4 of itself.
_FP8_BOUND = 2**-4
# Rounding to steps of max / 2^(bits - 1) is off by step / sqrt(12) in the mean square: with the largest weight of a
# group this many times their root mean square, that is the relative error. It is 3 to 4 for trained weights; the rest
# is room for outliers and for quantizers that move weights to mend the output. A wrong expert is off by 1 or more.
_LARGEST_OVER_RMS = 12.0
_HIGHEST_BOUND = 0.9
_SMALLEST_SCALE = 2**-24  # of float16: below it a scale is rightly stored as zero


def error_bound(method: str, bits: int) -> float:
    """The largest relative error, |decoded - original| / |original|, of a linear that was really quantized."""
    if method in ("fp8", "fp8-block"):
        return float(_FP8_BOUND)
    return float(min(_HIGHEST_BOUND, _LARGEST_OVER_RMS / 2 ** (bits - 1) / 12**0.5))


@dataclass
class RoleCount:
    """Linears of one role: how many are quantized, by bits, how many are kept, and how far they are from their
    originals (relative error; None where no original was given)."""

    quantized: dict[int, int] = field(default_factory=dict)
    kept: int = 0
    mean_error: float | None = None
    largest_error: float | None = None
    worst: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "quantized": {str(bits): count for bits, count in sorted(self.quantized.items())},
            "kept": self.kept,
            "mean_error": self.mean_error,
            "largest_error": self.largest_error,
            "worst": self.worst,
        }


@dataclass
class QuantizedReport:
    """What the reload found; it exists only where everything is as planned. ``roles`` counts linears by role
    ("expert", "attention", "router", ...); ``bytes`` are those of all tensors on disk."""

    format: str
    tensors: int
    bytes: int
    compared: bool
    roles: dict[str, RoleCount]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "compared": self.compared,
            "roles": {role: count.to_json() for role, count in self.roles.items()},
        }


def check_quantized(
    folder: Path,
    fmt: WeightFormat,
    spec: ModelSpec,
    *,
    original: Checkpoint | None = None,
    progress: Progress | None = None,
) -> QuantizedReport:
    """Reloads ``folder``, which is to be ``spec`` in ``fmt``; ``original`` is the checkpoint that it was made of.

    CannotBeDone names the first few tensors that are wrong and how many there are: names, dtypes and shapes against
    ``expected_tensors``; what ``quantization_config`` says of every linear, router and head against the plan, by the
    rules of vLLM; zero points, column order and scales; and, with ``original``, every kept tensor (equal bits) and
    every quantized one (``error_bound``). One tensor is in memory at a time."""
    if not fmt.quantized:
        raise ReapcError(f"{fmt.name} is not a quantized format: there is nothing to check")
    shards = Shards(folder)
    extra = _check_tensors(shards, fmt, spec, original)
    shards.close()
    if quantization_of(load_config(folder), str(folder / "config.json")) is None:
        raise CannotBeDone(f"{folder / 'config.json'}: no quantization_config", hint=_AGAIN)
    checkpoint = Checkpoint(folder)
    _check_config(checkpoint, fmt, spec)
    report = QuantizedReport(fmt.name, len(checkpoint.entries), checkpoint.bytes, original is not None, {})
    values = _Values(checkpoint, original, report)
    if progress is None:
        values.run(fmt, spec, extra, lambda amount: None)
    else:
        with progress.task(f"check {fmt.label}", checkpoint.bytes, "B") as advance:
            values.run(fmt, spec, extra, advance)
    return report


def _refuse(folder: Path, what: str, names: list[str], hint: str) -> CannotBeDone:
    return CannotBeDone(f"{folder}: {what}: {listed(names)}", hint=hint)


_AGAIN = "do not use this checkpoint: quantize again, and report it if it stays so"


def _check_tensors(shards: Shards, fmt: WeightFormat, spec: ModelSpec, source: Checkpoint | None) -> list[str]:
    """Names, dtypes and shapes. Returns the tensors that no config names (MTP, vision), which must be the source's."""
    expected = expected_tensors(fmt, spec)
    mtp = expected_tensors(fmt, spec, mtp=True) if spec.mtp_layers else {}
    outside = _outside(source) if source is not None else {}
    missing = [name for name in expected if name not in shards.entries]
    extra: list[str] = []
    unexpected: list[str] = []
    wrong: list[str] = []
    for name, entry in shards.entries.items():
        found = Expected((entry.dtype,), entry.shape)
        wanted = expected.get(name)
        if wanted is not None:
            if entry.dtype not in wanted.dtypes or entry.shape != wanted.shape:
                wrong.append(f"{name} is {found}, {wanted} was planned")
        elif outside.get(name) == found:
            extra.append(name)
        elif name in mtp and entry.dtype in mtp[name].dtypes and entry.shape == mtp[name].shape:
            pass  # quantized with the rest
        else:
            unexpected.append(name)
    if missing or unexpected:
        parts = [("missing", missing), ("unexpected", unexpected)]
        said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in parts if names)
        raise CannotBeDone(f"{shards.folder}: not the tensors of {fmt.label}: {said}", hint=_AGAIN)
    if wrong:
        raise _refuse(shards.folder, f"{len(wrong)} tensors are not as planned", wrong, _AGAIN)
    return extra


def _outside(source: Checkpoint) -> dict[str, Expected]:
    """Tensors that the source has beside those that its config names."""
    named = {tensor.name for tensor in source.spec.outer_tensors}
    layers = tuple(f"{layer.prefix}." for layer in source.spec.layers)
    return {
        name: Expected((entry.dtype,), entry.shape)
        for name, entry in source.entries.items()
        if name not in named and not name.startswith(layers)
    }


def _linears(fmt: WeightFormat, spec: ModelSpec) -> Iterator[tuple[TensorSpec, TensorGroup, Packing | None]]:
    for tensor, group, item in stored(fmt, spec):
        yield tensor, group, Packing.of(item) if item else None


def _check_config(checkpoint: Checkpoint, fmt: WeightFormat, spec: ModelSpec) -> None:
    """What the config says of every linear must be what was planned; of routers and the head, that they are kept."""
    quantization = checkpoint.quantization
    assert quantization is not None
    wrong: list[str] = []
    experts: dict[str, set[Packing | None]] = {}
    for tensor, group, planned in _linears(fmt, spec):
        if group.linears:
            modules = [module for module, _ in linear_modules(tensor, group, spec.num_experts)]
        elif tensor.role in ("router", "lm_head") and len(tensor.shape) == 2:
            modules = [tensor.module]
            # vLLM takes what GPTQ quantizes from the tensors on disk, which hold no packed router
            if quantization.method == "gptq":
                continue
        else:
            continue
        for module in modules:
            found = quantization.packing(module)
            if found != planned:
                wrong.append(f"{module}: {found or 'kept'}, {planned or 'kept'} was planned")
            if tensor.role == "expert":
                experts.setdefault(module.rpartition(".experts.")[0] + ".experts", set()).add(planned)
    if quantization.method in ("gptq", "auto-round"):  # where vLLM asks once about all experts of a layer, by this name
        for path, formats in experts.items():
            found = quantization.packing(path)
            if formats != {found}:
                wrong.append(f"{path} (the name that vLLM asks about): {found or 'kept'} was not planned")
    if not spec.vision_parameters and quantization.method != "gptq" and quantization.packing("lm_head") is not None:
        wrong.append("lm_head: vLLM would take it to be quantized")
    if wrong:
        what = f"quantization_config says of {len(wrong)} modules what was not planned"
        raise _refuse(checkpoint.folder / "config.json", what, wrong, _AGAIN)


class _Values:
    """The numbers: every tensor is read once, and the original's beside it."""

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint | None, report: QuantizedReport) -> None:
        self.checkpoint = checkpoint
        self.source = source
        self.report = report
        self.wrong: list[str] = []
        self.errors: dict[str, list[float]] = {}

    def run(self, fmt: WeightFormat, spec: ModelSpec, extra: list[str], advance: Any) -> None:
        """Reads every tensor; CannotBeDone where one is wrong."""
        for tensor, group, item in stored(fmt, spec):
            linear = self.checkpoint.packed.get(tensor.name)
            if item is None or linear is None:
                if group.linears or (tensor.role in ("router", "lm_head") and len(tensor.shape) == 2):
                    self._role(tensor.role).kept += 1
                self._kept(tensor.name)
                advance(self.checkpoint.entries[tensor.name].bytes)
                continue
            count = self._role(tensor.role).quantized
            count[item.bits] = count.get(item.bits, 0) + 1
            self._quantized(tensor, linear)
            advance(sum(self.checkpoint.entries[name].bytes for name in linear.parts.values()))
        for name in extra:
            self._kept(name)
        if self.wrong:
            what = f"{len(self.wrong)} tensors do not hold what they should"
            raise _refuse(self.checkpoint.folder, what, self.wrong, _AGAIN)
        for role, errors in self.errors.items():
            self._role(role).mean_error = sum(errors) / len(errors)

    def _role(self, role: str) -> RoleCount:
        return self.report.roles.setdefault(role, RoleCount())

    def _kept(self, name: str) -> None:
        """A tensor that is not quantized: the very bits of the original's."""
        import torch

        if self.source is None:
            return
        if name not in self.source.entries:
            self.wrong.append(f"{name}: the original has no such tensor")
            return
        ours, theirs = self.checkpoint.stored_tensor(name), self.source.tensor(name)
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            self.wrong.append(f"{name}: {ours.dtype} {list(ours.shape)}, in the original {theirs.dtype}")
        elif not torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
            self.wrong.append(f"{name}: not the original's weights, though the format keeps them")

    def _quantized(self, tensor: TensorSpec, linear: PackedLinear) -> None:
        import torch

        if problem := self._packed_problem(linear):
            self.wrong.append(problem)
            return
        decoded = self.checkpoint.tensor(tensor.name)
        norm = float(torch.linalg.vector_norm(decoded))
        if not norm < float("inf"):  # NaN too
            self.wrong.append(f"{tensor.name}: NaN or infinite weights")
        elif self.source is None:
            if norm == 0:
                self.wrong.append(f"{tensor.name}: nothing but zeros")
        else:
            self._compare(tensor, linear, decoded)

    def _packed_problem(self, linear: PackedLinear) -> str | None:
        """What is wrong with zero points, column order or shape; None where nothing is."""
        import torch

        packing, names = linear.packing, linear.parts
        if packing.method in ("gptq", "auto-round"):
            parts = {key: self.checkpoint.stored_tensor(names[key]) for key in ("qzeros", "scales")}
            middle = 1 << (packing.bits - 1)
            if bool((zero_points(parts, packing) != middle).any()):
                return f"{names['qzeros']}: not {middle} throughout: vLLM takes it so, and reads other weights"
        if "g_idx" in names:
            order = self.checkpoint.stored_tensor(names["g_idx"])
            if not torch.equal(order, (torch.arange(linear.columns) // packing.group_size).to(order.dtype)):
                return f"{names['g_idx']}: columns out of order, which vLLM refuses"
        if "weight_shape" in names:
            shape = self.checkpoint.stored_tensor(names["weight_shape"]).tolist()
            if shape != [linear.rows, linear.columns]:
                return f"{names['weight_shape']}: {shape}, {[linear.rows, linear.columns]} was planned"
        return None

    def _compare(self, tensor: TensorSpec, linear: PackedLinear, decoded: torch.Tensor) -> None:
        """How far the decoded weight is from its original. Zero scales where weights are not show in it too, as does an
        expert in another's place."""
        import torch

        assert self.source is not None
        original = self.source.tensor(tensor.name).float()
        size = float(torch.linalg.vector_norm(original))
        error = float(torch.linalg.vector_norm(decoded - original)) / size if size else float(bool(decoded.any()))
        bound = error_bound(linear.packing.method, linear.packing.bits)
        count = self._role(tensor.role)
        self.errors.setdefault(tensor.role, []).append(error)
        if count.largest_error is None or error > count.largest_error:
            count.largest_error, count.worst = error, tensor.name
        if not error <= bound:
            self.wrong.append(
                f"{tensor.name}: off by {error:.3f} of its original's size ({bound:.3f} at most in "
                f"{linear.packing.bits} bits): not its own weights"
            )
        elif size and bool(_dead_groups(linear, self.checkpoint, original).any()):
            self.wrong.append(f"{tensor.name}: a scale is zero where the weights are not")


def _dead_groups(linear: PackedLinear, checkpoint: Checkpoint, original: torch.Tensor) -> torch.Tensor:
    """Where (rows, columns) the scale is zero, and the original's weight too large for that."""
    import torch

    packing, names = linear.packing, linear.parts
    suffix = next(key for key in ("scales", packing.block_scale, "weight_scale") if key in names)
    scales = checkpoint.stored_tensor(names[suffix]).float()
    dead = scales.t() == 0 if suffix == "scales" else scales == 0
    if not bool(dead.any()):
        return torch.zeros(1, dtype=torch.bool)
    height, width = packing.block if packing.block != (0, 0) else (1, linear.columns // dead.shape[1])
    spread = dead.repeat_interleave(height, 0)[: linear.rows].repeat_interleave(width, 1)[:, : linear.columns]
    large = original.abs() > _SMALLEST_SCALE * 2**packing.bits
    return torch.logical_and(spread, large)
