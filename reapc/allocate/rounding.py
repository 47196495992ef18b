"""How far each type takes each tensor's output from where it was: measured with ggml's own rounding.

For a matrix W with inputs x the error is the sum over rows and columns of (W - Q(W))^2 E[x_j^2], relative to the same
sum of W^2: inputs taken as uncorrelated, which is what llama.cpp's importance matrix keeps of them. Experts are weighed
by their share of the layer's output power, the sum over tokens of (gate weight x norm)^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from reapc.errors import ReapcError
from reapc.formats.gguf_types import fallback
from reapc.observe.scores import Scores
from reapc.planner.damages import GroupError
from reapc.planner.tensor_groups import FileParts, FileTensor
from reapc.progress import Progress
from reapc.quantize.ggml import rounded

SAMPLE_ROWS = 64  # of each matrix (of each expert's), evenly spaced; all where there are fewer than twice as many
Entries = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def measure_errors(
    base: Path,
    parts: FileParts,
    scores: Scores,
    entries: Entries,
    types: Sequence[str],
    progress: Progress,
    *,
    sample_rows: int = SAMPLE_ROWS,
) -> dict[str, GroupError]:
    """Relative errors of every group in every type that is legal for it.

    ``base``: the unquantized GGUF, read a matrix at a time through a memory map; ``entries``: sums of squared inputs
    and counts by tensor (``imatrix.entries_of``). Of a matrix with more rows ``sample_rows`` evenly spaced ones, up to
    twice as many, stand for all. A tensor without an entry (embeddings, head) is rounded, and its error summed, with
    equal weights."""
    reader = GGUFReader(str(base))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    result: dict[str, GroupError] = {}
    with progress.task("round", len(parts.groups), "tensor groups") as advance:
        for group in parts.groups:
            if missing := [tensor.name for tensor in group.tensors if tensor.name not in stored]:
                raise ReapcError(f"{base}: no tensor {missing[0]}: it was not made of this model")
            routed = group.tensors[0].experts
            # squared error and squared output of each expert, over the group's tensors
            lost = {kind: 0.0 for kind in group.types}
            per_expert: dict[str, NDArray[np.float64]] = {}
            whole: NDArray[np.float64] | float = 0.0
            for tensor in group.tensors:
                error, power = _errors(stored[tensor.name], tensor, entries.get(tensor.name), group.types, sample_rows)
                whole = whole + power
                for kind in lost:
                    per_expert[kind] = per_expert.get(kind, np.zeros(1)) + error[kind]
            errors = {kind: values / np.maximum(whole, 1e-300) for kind, values in per_expert.items()}
            result[group.name] = GroupError(errors, output_shares(scores, group.layer) if routed else np.ones(1))
            advance(1)
    return result


def output_shares(scores: Scores, layer: int) -> NDArray[np.float64]:
    """(experts,) each expert's share of the sum of (gate weight x norm)^2 over all tokens of a layer; they sum to 1."""
    power = scores.layer(layer)["gate_norm_sq_sum"]
    total: NDArray[np.float64] = power / max(float(power.sum()), 1e-300)
    return total


def _errors(
    stored: ReaderTensor, tensor: FileTensor, entry: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    types: Sequence[str], sample_rows: int,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:  # fmt: skip
    """Weighted squared errors by type and the weighted square of the tensor itself, (experts,) or (1,) each."""
    error: dict[str, list[float]] = {kind: [] for kind in types}
    power: list[float] = []
    for index, rows in enumerate(_matrices(stored, tensor, sample_rows)):
        moments = _moments(entry, index)
        weights = np.ones(rows.shape[1], np.float32) if moments is None else moments
        power.append(float((np.square(rows, dtype=np.float64) @ weights).sum()))
        for kind in types:
            # llama-quantize weighs nothing where there is no entry
            found = rounded(rows, fallback(kind, tensor.columns), moments)
            error[kind].append(float((np.square(rows - found, dtype=np.float64) @ weights).sum()))
    if not tensor.experts:  # a matrix for each head: one output
        return {kind: np.array([sum(values)]) for kind, values in error.items()}, np.array([sum(power)])
    return {kind: np.array(values) for kind, values in error.items()}, np.array(power)


def _moments(entry: tuple[NDArray[np.float64], NDArray[np.float64]] | None, index: int) -> NDArray[np.float32] | None:
    """Mean squared inputs of the matrix, ones where it saw no token (as llama-quantize takes it)."""
    if entry is None:
        return None
    sums, counts = np.atleast_2d(entry[0]), np.ravel(entry[1])
    row = index if len(sums) > 1 else 0
    count = float(counts[row if len(counts) > 1 else 0])
    if count == 0:
        return np.ones(sums.shape[1], np.float32)
    mean: NDArray[np.float32] = (sums[row] / count).astype(np.float32)
    return mean


def _matrices(stored: ReaderTensor, tensor: FileTensor, sample_rows: int) -> Iterator[NDArray[np.float32]]:
    """The matrices of a tensor in float32, (rows, columns), sampled; one after another."""
    data = stored.data.reshape(-1, *stored.data.shape[-2:])
    for matrix in data:
        step = max(1, len(matrix) // sample_rows)
        yield dequantize(np.ascontiguousarray(matrix[::step]), stored.tensor_type)
