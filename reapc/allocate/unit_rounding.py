"""How far each format takes each part of a layer from where it was: rounding to nearest, weighed by what was observed.

As ``rounding.py`` does it for ggml's types: for a matrix W with inputs x the error is the sum of (W - Q(W))^2 E[x_j^2]
over that of W^2. A unit's is the mean over its matrices, each of which disturbs the unit's output by about its own
share; an expert's is weighed by its share of the layer's output power.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from reapc.allocate.rounding import SAMPLE_ROWS, output_shares
from reapc.arch.spec import TensorGroup
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.weights import FP8_BLOCK, WeightFormat
from reapc.observe.scores import Scores
from reapc.planner.checkpoint_units import KEPT, CheckpointParts, Unit, stored_as
from reapc.planner.damages import GroupError
from reapc.progress import Progress
from reapc.quantize.nearest import rounded

_TILES = 2  # of rows that stand for a matrix in FP8, whose scales reach over rows


def require_moments(scores: Scores) -> None:
    """ReapcError where no inputs were observed."""
    if not any(name.startswith("second_moment.") for name in scores.arrays):
        raise ReapcError(
            "the scores hold no second moments, so no rounding error can be weighed",
            hint="`reapc observe` writes them; the scores inside a build's output have none",
        )


def measure_unit_errors(
    checkpoint: Checkpoint, every: Sequence[CheckpointParts], scores: Scores, progress: Progress
) -> dict[str, GroupError]:
    """Relative errors of every unit in every option that it has in any of ``every`` (one for each method). ``KEPT``
    costs nothing. Of a matrix ``SAMPLE_ROWS`` evenly spaced rows stand for all, up to twice as many."""
    require_moments(scores)
    options: dict[str, dict[str, None]] = {}
    for parts in every:
        for unit in parts.groups:
            options.setdefault(unit.name, {}).update(dict.fromkeys(unit.types))
    result: dict[str, GroupError] = {}
    units = every[0].groups
    with progress.task("round", len(units), "parts of layers") as advance:
        for unit in units:
            kinds = [kind for kind in options[unit.name] if kind != KEPT]
            experts = unit.part == "experts"
            errors = _errors(checkpoint, unit, scores, [stored_as(kind) for kind in kinds])
            found = dict(zip(kinds, errors, strict=True))
            count = checkpoint.spec.num_experts if experts else 1
            weights = output_shares(scores, unit.layer) if experts else np.ones(1)
            result[unit.name] = GroupError({**found, KEPT: np.zeros(count)}, weights)
            advance(1)
    return result


def _errors(
    checkpoint: Checkpoint, unit: Unit, scores: Scores, formats: Sequence[WeightFormat]
) -> list[NDArray[np.float64]]:
    """(experts,) or (1,) of each format: the mean over the unit's matrices."""
    # what differs only in how it is packed is rounded alike
    kinds: list[tuple[str, int, int]] = [
        ("int" if f.group_size and f.method != "fp8-block" else f.method, f.bits, f.group_size) for f in formats
    ]
    first = {kind: fmt for kind, fmt in zip(kinds, formats, strict=True)}
    prefix = checkpoint.spec.layers[unit.layer].prefix
    total: dict[tuple[str, int, int], NDArray[np.float64]] = {}
    for group in unit.groups:
        if group.expert_axis is not None:
            raise CannotBeDone(
                f"{checkpoint.folder}: {prefix}.{group.name} holds the experts of a layer in one tensor: this version "
                "quantizes experts that are stored one by one",
                hint="set quantize.allocate = false",
            )
        moments = _moments(scores, unit, group, prefix)
        lost: dict[tuple[str, int, int], list[float]] = {kind: [] for kind in first}
        for number, tensor in enumerate(group.expand(f"{prefix}.", checkpoint.spec.num_experts, unit.layer)):
            weight = checkpoint.tensor(tensor.name)
            own = None if moments is None else torch.from_numpy(moments[number if len(moments) > 1 else 0])
            for kind, fmt in first.items():
                lost[kind].append(_relative(weight, fmt, own))
        for kind, values in lost.items():
            total[kind] = total.get(kind, np.zeros(len(values))) + np.array(values) / len(unit.groups)
    return [total[kind] for kind in kinds]


def _moments(scores: Scores, unit: Unit, group: TensorGroup, prefix: str) -> NDArray[np.float64] | None:
    """Sums of squared inputs, (experts, in) or (1, in); None where nothing of this length was observed."""
    module = f"{prefix}.{group.name}".removesuffix(".weight")
    if unit.part == "experts":
        names = {part.name.split("_exps")[0].removeprefix("ffn_") for part in group.gguf}
        key = f"layers.{unit.layer}.experts.{'down' if 'down' in names else 'gate_up'}"
    else:
        key = module
    name = f"second_moment.{key}"
    if name not in scores.arrays:
        return None
    values = np.atleast_2d(scores.total(name))
    return values if values.shape[-1] == group.linears[0][1] else None


def _relative(weight: torch.Tensor, fmt: WeightFormat, moments: torch.Tensor | None) -> float:
    """The relative error of sampled rows. Inputs that were never seen count alike."""
    tiled = fmt.method == "fp8-block"
    rows = (weight[: _TILES * FP8_BLOCK] if tiled else weight[:: max(1, len(weight) // SAMPLE_ROWS)]).float()
    columns = torch.ones(rows.shape[1]) if moments is None or not bool(moments.any()) else moments.float()
    columns = columns / columns.mean()
    error = float(((rows - rounded(rows, fmt)).square() @ columns).sum(dtype=torch.float64))
    return error / max(float((rows.square() @ columns).sum(dtype=torch.float64)), 1e-300)
