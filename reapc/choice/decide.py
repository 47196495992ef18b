"""Which finalist wins: by end KL, where the difference is beyond what other sequences could make of it.

Whoever is not better than reap beyond the noise loses to it; of those who are, the best known one wins that is not
worse than the best beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reapc.choice.finalists import EndFigures
from reapc.healing import TOP1_LOSS
from reapc.verify.intervals import FEWEST, mean_interval

# Where the figures do not tell candidates apart, the earlier one wins.
BEST_KNOWN = ("reap", "frequency", "weighted_sum", "ean", "ean_sum", "greedy")


@dataclass(frozen=True)
class Difference:
    """Mean KL of one candidate less that of another, nats per token, with the 95 % interval over sequences (percentile
    bootstrap of whole sequences, paired)."""

    kl: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{abs(self.kl):.5f} (95 % interval of the difference {self.low:.5f} to {self.high:.5f})"


@dataclass(frozen=True)
class Decision:
    """``against_reap``: each finalist's difference to reap."""

    winner: str
    why: str
    against_reap: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(a: NDArray[np.float64], b: NDArray[np.float64], tokens: NDArray[np.float64]) -> Difference:
    """From sums of KL by sequence, (sequences,) each, and real tokens of each sequence."""
    kl = float((a - b).sum() / tokens.sum())
    return Difference(kl, *(mean_interval(a - b, tokens) or (kl, kl)))


def decide(figures: Mapping[str, EndFigures], tokens: NDArray[np.float64]) -> Decision:
    """Among ``figures``, which hold "reap". ``tokens`` (sequences,): real tokens of each."""
    reap = figures["reap"]
    against = {name: difference(own.kl, reap.kl, tokens) for name, own in figures.items() if name != "reap"}
    total = float(tokens.sum())
    short = [name for name in against if (reap.agree.sum() - figures[name].agree.sum()) / total > TOP1_LOSS]
    passed = f"; {', '.join(short)}: more than a point of top-1 below reap, passed over" if short else ""
    rest = sorted((name for name in against if name not in short), key=BEST_KNOWN.index)
    if len(tokens) < FEWEST:
        return Decision("reap", f"{len(tokens)} sequences are too few to tell: the best known criterion", against)
    smaller = [name for name in rest if against[name].kl < 0]
    if not smaller:
        return Decision("reap", f"no other finalist has a smaller KL{passed}", against)
    better = [name for name in smaller if against[name].high < 0]
    if not better:
        first = min(smaller, key=lambda name: against[name].kl)
        why = f"{first} has the smallest KL, but {against[first]} less is within the noise, and reap is the best known"
        return Decision("reap", why + passed, against)
    best = min(better, key=lambda name: against[name].kl)
    behind = {name: difference(figures[name].kl, figures[best].kl, tokens) for name in better}
    winner = next(name for name in better if name == best or behind[name].low <= 0)
    why = f"KL smaller than reap's by {against[winner]}"
    if winner != best:
        why += (
            f"; {best} has a smaller one, but {behind[winner]} less is within the noise, and {winner} is better known"
        )
    return Decision(winner, why + passed, against)
