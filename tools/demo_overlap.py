"""Runs of tokens that two texts share, so that what is held out really is unseen."""

from __future__ import annotations

import numpy as np

OVERLAP_TOKENS = 32
HASH_FACTOR = np.uint64(6364136223846793005)


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every run of ``OVERLAP_TOKENS`` tokens along the last axis."""
    windows = tokens.shape[-1] - OVERLAP_TOKENS + 1
    hashes = np.zeros((*tokens.shape[:-1], windows), dtype=np.uint64)
    for offset in range(OVERLAP_TOKENS):
        hashes *= HASH_FACTOR
        hashes += tokens[..., offset : offset + windows].astype(np.uint64) + np.uint64(1)
    return hashes


def in_shared_runs(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """True for each token of ``rows`` (rows, length) that lies in a run whose hash is in ``others``."""
    found = np.isin(window_hashes(rows), others)
    met = np.zeros(rows.shape, dtype=bool)
    for offset in range(OVERLAP_TOKENS):
        met[:, offset : offset + found.shape[1]] |= found
    return met


def without_runs_of(stream: np.ndarray, held_out: np.ndarray, end: int) -> np.ndarray:
    """``stream`` without the runs that ``held_out`` (hashes) holds too, each replaced by one ``end`` token."""
    shared = in_shared_runs(stream[None], held_out)[0]
    starts = shared & ~np.concatenate([[False], shared[:-1]])
    return np.where(starts, end, stream)[~shared | starts].astype(stream.dtype)
