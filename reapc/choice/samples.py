"""Which calibration sequences the choice is made with: disjoint ones for making, comparing and deciding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reapc.arch import ModelSpec
from reapc.choice.survey import GREEDY_TOKENS
from reapc.errors import ReapcError
from reapc.healing import split
from reapc.stream.tokens import Tokens

SAMPLE_TOKENS = 8192
SELECT_TOKENS = 8192
DECIDE_TOKENS = 16384
FINALISTS = 3  # beside reap


class Samples(NamedTuple):
    """``sample``: what greedy removal is computed from; ``select``: what errors of layers are measured on; ``decide``:
    what the finalists' end KL is. Of healing's parts (see ``split``): the first two of what it fits, the last of what
    it chooses by; what it reports on is in none."""

    sample: Tokens
    select: Tokens
    decide: Tokens


def samples_of(tokens: Tokens, seed: int = 0) -> Samples:
    """ReapcError where there are too few sequences."""
    fit, choice, _ = split(tokens, seed, "the choice of a criterion")
    if fit.sequences < 2:
        raise ReapcError(
            f"{tokens.sequences} sequences: the choice of a criterion needs at least 4, disjoint for making the "
            "candidates, comparing and deciding",
            hint="some dozens are better",
        )
    order = np.random.default_rng(seed).permutation(fit.sequences)
    sample = _first(fit, order, min(SAMPLE_TOKENS, fit.count // 2))
    select = _first(fit, order[sample.sequences :], SELECT_TOKENS)
    decide = _first(choice, np.random.default_rng(seed).permutation(choice.sequences), DECIDE_TOKENS)
    return Samples(sample, select, decide)


def _first(tokens: Tokens, order: np.ndarray, at_most: int) -> Tokens:
    """The first sequences in this order that have ``at_most`` tokens together; at least one, and never all but none of
    several."""
    sums = np.cumsum(tokens.mask[order].sum(axis=1))
    return tokens.take(np.sort(order[: max(1, int(np.searchsorted(sums, at_most, side="right")))]))


def disk_tokens(tokens: Tokens) -> int:
    """Tokens whose hidden states the choice keeps on disk at once, at most."""
    count = tokens.count
    samples = min(SAMPLE_TOKENS, count // 3) + min(SELECT_TOKENS, count // 3)
    return samples + (2 + FINALISTS) * min(DECIDE_TOKENS, count * 3 // 20)


def forward_tokens(spec: ModelSpec, tokens: Tokens) -> int:
    """Tokens of plain forwards that the choice costs, about: both samples, what masks change of the second, all experts
    on the tokens of greedy removal, and the original beside the finalists."""
    count = tokens.count
    sample, select = min(SAMPLE_TOKENS, count // 3), min(SELECT_TOKENS, count // 3)
    greedy = min(GREEDY_TOKENS, sample) * spec.num_experts // spec.top_k
    return sample + 2 * select + greedy + (2 + FINALISTS) * min(DECIDE_TOKENS, count * 3 // 20)
