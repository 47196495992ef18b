"""Ridge least squares on one expert's down projection, the strength chosen on other tokens. No gradients.

Of an expert with gate-weighted activations Z (pairs, width), and what the layer's output lacks at its tokens R (pairs,
hidden), the change D of its down projection minimizes |R - Z D^T|^2 + l |D|^2: D^T = (Z^T Z + l I)^-1 Z^T R. With the
eigenvectors of Z^T Z every l costs a division. With fewer pairs than width they come from Z Z^T (the dual form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Strengths that are tried, as multiples of the mean eigenvalue.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Normal(NamedTuple):
    """``gram`` (width, width) = Z^T Z and ``right`` (width, hidden) = Z^T R, float64 or float32."""

    gram: torch.Tensor
    right: torch.Tensor

    def plus(self, change: torch.Tensor) -> Normal:
        """The same as if ``change`` (hidden, width), which R is already without, had not been made."""
        return Normal(self.gram, self.right + self.gram @ change.T)


class Refit(NamedTuple):
    """``change`` (hidden, width) of the down projection, and the ``ridge`` that was best; infinite: no change."""

    change: torch.Tensor
    ridge: float


def solve(fit: Normal, choice: Normal, pairs: torch.Tensor | None = None) -> Refit:
    """The change that fits ``fit``, of the strength that leaves the least of ``choice``; none where each leaves more.

    ``pairs``: Z (pairs, width) of ``fit`` where they are fewer than the width."""
    width, hidden = fit.right.shape
    none = Refit(torch.zeros(hidden, width, dtype=fit.right.dtype, device=fit.right.device), float("inf"))
    values, vectors = _basis(fit.gram, pairs)
    mean = float(values.sum()) / width
    if not mean > 0:
        return none
    right, other = vectors.T @ fit.right, vectors.T @ choice.right
    gram = vectors.T @ choice.gram @ vectors
    best, least = none, 0.0
    for ridge in RIDGES:
        inner = right / (values + ridge * mean)[:, None]
        # |R - Z D^T|^2 - |R|^2 of the other tokens
        error = float((inner * (gram @ inner)).sum() - 2 * (inner * other).sum())
        if error < least:
            best, least = Refit((vectors @ inner).T, ridge), error
    return best


def _basis(gram: torch.Tensor, pairs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,) and orthonormal eigenvectors (width, n) of the Gram matrix, without its null space in the dual
    form."""
    if pairs is None:
        values, vectors = torch.linalg.eigh(gram)
        return values.clamp_min(0), vectors
    values, rows = torch.linalg.eigh(pairs @ pairs.T)
    used = values > values.max() * 1e-10
    return values[used], (pairs.T @ rows[:, used]) / values[used].sqrt()
