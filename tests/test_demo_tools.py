"""The demo's held-out text must not be in its training text."""

from __future__ import annotations

import sys

import numpy as np
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from demo_overlap import OVERLAP_TOKENS, in_shared_runs, window_hashes, without_runs_of


def test_runs_that_are_held_out_are_cut_from_training() -> None:
    random = np.random.default_rng(0)
    held_out = random.integers(3, 2048, (2, 256)).astype(np.int16)
    before, after = random.integers(3, 2048, (2, 500)).astype(np.int16)
    long_run, short_run = held_out[1, 40:100], held_out[0, 5 : 5 + OVERLAP_TOKENS - 1]
    stream = np.concatenate([before, long_run, after, short_run])
    hashes = window_hashes(held_out)
    assert in_shared_runs(stream[None], hashes).sum() == 60
    cut = without_runs_of(stream, hashes, end=0)
    assert cut.tolist() == [*before, 0, *after, *short_run]
    assert not in_shared_runs(held_out, window_hashes(cut)).any()
