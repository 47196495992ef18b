"""Which calibration sequences the choice is made with: some to make candidates of, others to
compare them on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reapc.arch import ModelSpec
from reapc.choice.survey import GREEDY_TOKENS
from reapc.errors import ReapcError
from reapc.healing import split
from reapc.stream.tokens import Tokens

SAMPLE_TOKENS = 16384
SELECT_TOKENS = 8192
DECIDE_TOKENS = 12288
MOST_SEQUENCES = 64  # of each, cut to what its tokens allow: text that differs tells more than long text
FINALISTS = 3  # beside reap


class Samples(NamedTuple):
    """``sample``: what greedy removal is computed from. Errors of layers are measured on ``select``, and end KL on
    ``decide``: the same other sequences, cut to different lengths. All are of what healing fits or chooses by (see
    ``split``); what it reports on is in none."""

    sample: Tokens
    select: Tokens
    decide: Tokens


def samples_of(tokens: Tokens, seed: int = 0) -> Samples:
    """ReapcError where there are too few sequences."""
    fit, choice, _ = split(tokens, seed, "the choice of a criterion")
    if fit.sequences < 2:
        raise ReapcError(
            f"{tokens.sequences} sequences: the choice of a criterion needs at least 4: some to make "
            "candidates of, and others to compare them on",
            hint="some dozens are better",
        )
    order = np.random.default_rng(seed).permutation(fit.sequences)
    half = min(fit.sequences // 2, MOST_SEQUENCES)
    rest = _joined(choice, fit.take(order[half:]))
    judged = rest.take(np.sort(np.random.default_rng(seed).permutation(rest.sequences)[:MOST_SEQUENCES]))
    sample = _cut(fit.take(np.sort(order[:half])), SAMPLE_TOKENS)
    return Samples(sample, _cut(judged, SELECT_TOKENS), _cut(judged, DECIDE_TOKENS))


def _joined(a: Tokens, b: Tokens) -> Tokens:
    """Both, of one file."""
    ids, mask, domain = (
        np.concatenate(pair) for pair in ((a.input_ids, b.input_ids), (a.mask, b.mask), (a.domain, b.domain))
    )
    return Tokens(ids, mask, domain, a.domains, a.source)


def _cut(tokens: Tokens, at_most: int) -> Tokens:
    """The same sequences, each cut so that all have ``at_most`` tokens together; as they are where one would be left
    without a token (padding in front)."""
    length = max(1, at_most // tokens.sequences)
    real = tokens.mask[:, :length].any(axis=1).all()
    return tokens.take(np.arange(tokens.sequences), length) if real else tokens


def disk_tokens(tokens: Tokens) -> int:
    """Tokens whose hidden states the choice keeps on disk at once, at most."""
    count = tokens.count
    samples = min(SAMPLE_TOKENS, count * 7 // 20) + min(SELECT_TOKENS, count // 2)
    return samples + (2 + FINALISTS) * min(DECIDE_TOKENS, count // 2)


def forward_tokens(spec: ModelSpec, tokens: Tokens) -> int:
    """Tokens of plain forwards that the choice costs, about: both samples, what masks change of the second, all experts
    on the tokens of greedy removal, and the original beside the finalists."""
    count = tokens.count
    sample, select = min(SAMPLE_TOKENS, count * 7 // 20), min(SELECT_TOKENS, count // 2)
    greedy = min(GREEDY_TOKENS, sample) * spec.num_experts // spec.top_k
    return sample + 2 * select + greedy + (2 + FINALISTS) * min(DECIDE_TOKENS, count // 2)
