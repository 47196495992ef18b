"""Ridge least squares on one expert's down projection, the strength chosen on other tokens. No gradients.

Of an expert with gate-weighted activations Z (pairs, width), and what the layer's output lacks at its tokens R (pairs,
hidden), the change D of its down projection minimizes |R - Z D^T|^2 + l |D|^2: D^T = (Z^T Z + l I)^-1 Z^T R. With the
eigenvectors of Z^T Z every l costs a division, and so does every further R. With fewer pairs than width they come from
Z Z^T (the dual form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Strengths that are tried, as multiples of the mean eigenvalue.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Basis(NamedTuple):
    """What stays the same whatever is lacking: ``values`` (width,) and ``vectors`` (width, width), the eigenvalues and
    orthonormal eigenvectors of Z^T Z (zeros behind those of the dual form), and ``choice`` (width, width), Z^T Z of the
    tokens that choose in terms of these vectors."""

    values: torch.Tensor
    vectors: torch.Tensor
    choice: torch.Tensor


class Refit(NamedTuple):
    """``change`` (hidden, width) of the down projection, and the ``ridge`` that was best; infinite: no change."""

    change: torch.Tensor
    ridge: float


def basis_of(fit: torch.Tensor, choice: torch.Tensor, pairs: torch.Tensor | None = None) -> Basis:
    """From Z^T Z (width, width) of the tokens fitted and of those that choose.

    ``pairs``: Z (pairs, width) of the tokens fitted where they are fewer than the width."""
    if pairs is None:
        values, vectors = torch.linalg.eigh(fit)
        values = values.clamp_min(0)
    else:
        found, rows = torch.linalg.eigh(pairs @ pairs.T)
        used = found > found.max() * 1e-10
        values, vectors = fit.new_zeros(len(fit)), torch.zeros_like(fit)
        count = int(used.sum())
        values[:count] = found[used]
        vectors[:, :count] = (pairs.T @ rows[:, used]) / found[used].sqrt()
    return Basis(values, vectors, vectors.T @ choice @ vectors)


def solve(basis: Basis, right: torch.Tensor, other: torch.Tensor, made: torch.Tensor | None = None) -> Refit:
    """The change that fits best, of the strength that leaves the least on the tokens that choose; none where each
    leaves more. ``right``, ``other`` (width, hidden): Z^T R of the tokens fitted, and of those that choose.

    ``made`` (hidden, width): a change that R is already without, and in the place of which the new one comes."""
    none = Refit(right.new_zeros(right.shape[::-1]), float("inf"))
    values, vectors, gram = basis
    mean = float(values.sum()) / len(values)
    if not mean > 0:
        return none
    right, other = vectors.T @ right, vectors.T @ other
    if made is not None:
        before = vectors.T @ made.T
        right, other = right + values[:, None] * before, other + gram @ before
    best, least = none, 0.0
    for ridge in RIDGES:
        inner = right / (values + ridge * mean)[:, None]
        # |R - Z D^T|^2 - |R|^2 of the other tokens
        error = float((inner * (gram @ inner)).sum() - 2 * (inner * other).sum())
        if error < least:
            best, least = Refit((vectors @ inner).T, ridge), error
    return best
