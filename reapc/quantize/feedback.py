"""Rounding to a grid of integers with error feedback: what one column's rounding does to the output, the columns that
are not rounded yet make up for (GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1). The grid is given, so that
columns can take their turns in any order: by what they are given, largest first, in the paper's reference code
"act-order"."""

from __future__ import annotations

import torch

DAMPING = 0.01  # of the mean of the Gram's diagonal, the paper's
_BLOCK = 128  # columns between two updates of all columns that are left


def nearest(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels (rows, columns) uint8, the nearest ones; 0 is at ``zeros`` and a step is ``scales``, of the same shape or
    broadcast. Where a scale is 0 the level is that of 0."""
    found = torch.round(weight / scales + zeros).nan_to_num(0).clamp(0, (1 << bits) - 1)
    return torch.where(scales == 0, zeros.expand_as(found), found).to(torch.uint8)


def with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, inverse: torch.Tensor
) -> torch.Tensor:
    """The same, with little of inputs x (weight - levels)^T left. ``inverse`` (columns, columns) float64: that of the
    damped Gram of the inputs (``damped_inverse``)."""
    order = torch.argsort(inverse.diagonal())  # small where an input is large, and no other makes up for it
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
    count = len(order)
    # a column of the weight is a row here: long runs to work on
    left = weight.float().T[order].contiguous()
    scales, zeros = (part.expand(weight.shape).float().T[order].contiguous() for part in (scales, zeros))
    levels = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            levels[i] = nearest(left[i], scales[i], zeros[i], bits)
            error = (left[i] - (levels[i].float() - zeros[i]) * scales[i]) / upper[i, i]
            left[i:end] -= upper[i, i:end, None] * error
            errors[i - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    found = torch.empty_like(levels)
    found[order] = levels
    return found.T.contiguous()


def damped_inverse(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor | None:
    """(columns, columns) float64 of the Gram with these eigenvalues and eigenvectors (zeros behind those that it has);
    None where it is zero."""
    mean = float(values.double().mean())
    if not mean > 0:
        return None
    vectors = vectors.double()
    damped = (vectors * values.double()) @ vectors.T
    damped.diagonal().add_(DAMPING * mean)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
