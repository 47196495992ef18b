"""What a comparison found beneath its totals, for the report: per sequence, per position, and a few passages with the
next token that each model puts first. Gathered while the log-probabilities pass by; it costs no pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reapc.stream.tokens import Tokens
from reapc.verify.intervals import mean_interval

if TYPE_CHECKING:
    from reapc.observe.reference import SequenceReference

FORMAT = 1
PASSAGE_TOKENS = 64
PASSAGES = 8  # domains that show one; one more shows where most was lost
# (ids before, id) -> the text that the id adds, None where no tokenizer can tell
TokenText = Callable[[Sequence[int], int], str | None]
_FLOATS = ("kl", "next_a", "next_b", "best_a", "best_b")


class Detail:
    """Figures at every position of ``tokens``; A is the original, B the result."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        shape = tokens.input_ids.shape
        self._values = {name: np.full(shape, np.nan, np.float32) for name in _FLOATS}
        self._best = {name: np.zeros(shape, np.int32) for name in "ab"}
        self.exact = True

    def add(self, row: int, kl: np.ndarray, reference: SequenceReference, result: np.ndarray) -> None:
        """Sequence ``row``: (length,) KL in nats, the original's reference, (length, vocabulary) log-probabilities."""
        following = self.tokens.input_ids[row, 1:, None].astype(np.int64)
        best = result.argmax(axis=1)
        self.exact &= reference.top is None
        self._values["kl"][row] = kl
        self._values["next_a"][row, :-1] = reference.next_log_prob[: len(following)]
        self._values["next_b"][row, :-1] = np.take_along_axis(result[:-1], following, axis=1)[:, 0]
        self._values["best_a"][row] = reference.log_probs.max(axis=1)
        self._values["best_b"][row] = np.take_along_axis(result, best[:, None], axis=1)[:, 0]
        self._best["a"][row], self._best["b"][row] = reference.best, best

    def to_json(self, text: TokenText = lambda before, token: None) -> dict[str, Any]:
        """What ``fidelity.json`` holds (docs/report.md); ``text`` gives the words of the passages."""
        tokens = self.tokens
        return {
            "format": FORMAT,
            "exact": bool(self.exact),
            "held_out": {"digest": tokens.digest, "sequences": tokens.sequences, "tokens": tokens.count},
            "domains": list(tokens.domains),
            "sequences": self._sequences(),
            "positions": self._positions(),
            "passages": [self._passage(*found, text) for found in self._choose()],
        }

    @property
    def _agree(self) -> np.ndarray:
        return np.asarray((self._best["a"] == self._best["b"]) & self.tokens.mask)

    def _sequences(self) -> dict[str, list[Any]]:
        """Sums over each sequence's real positions, and over those that have a next token."""
        mask = self.tokens.mask
        ahead = np.zeros_like(mask)
        ahead[:, :-1] = mask[:, :-1] & mask[:, 1:]

        def summed(name: str, where: np.ndarray, sign: int = 1) -> list[float]:
            sums = np.where(where, self._values[name], 0).sum(axis=1, dtype=np.float64)
            return [float(f"{sign * value:.7g}") for value in sums]

        return {
            "domain": self.tokens.domain.astype(int).tolist(),
            "tokens": mask.sum(axis=1).tolist(),
            "kl": summed("kl", mask),
            "agree": self._agree.sum(axis=1).tolist(),
            "predictions": ahead.sum(axis=1).tolist(),
            "loss_a": summed("next_a", ahead, -1),
            "loss_b": summed("next_b", ahead, -1),
        }

    def _positions(self) -> list[dict[str, Any]]:
        """KL and top-1 by how many tokens the models had read: 1, 2, 3-4, 5-8, and so on."""
        mask, start = self.tokens.mask, 0
        found: list[dict[str, Any]] = []
        while start < self.tokens.length:
            end = min(self.tokens.length, max(1, 2 * start))
            real = mask[:, start:end]
            counts = real.sum(axis=1)
            if counts.any():
                sums = np.where(real, self._values["kl"][:, start:end], 0).sum(axis=1, dtype=np.float64)
                interval = mean_interval(sums, counts)
                found.append(
                    {
                        "from": start + 1,
                        "to": end,
                        "tokens": int(counts.sum()),
                        "kl": float(sums.sum() / counts.sum()),
                        "interval": None if interval is None else list(interval),
                        "top1": float(self._agree[:, start:end].sum() / counts.sum()),
                    }
                )
            start = end
        return found

    def _choose(self) -> list[tuple[str, int, int]]:
        """(why, sequence, first position): of every domain the sequence whose KL is nearest to the domain's median,
        from its middle on, and the stretch of all with the largest KL."""
        mask = self.tokens.mask
        counts = mask.sum(axis=1)
        kl = np.where(mask, self._values["kl"], 0).astype(np.float64)
        means = kl.sum(axis=1) / np.maximum(counts, 1)
        found: list[tuple[str, int, int]] = []
        for number, _ in enumerate(self.tokens.domains):
            rows = np.flatnonzero((self.tokens.domain == number) & (counts > 1))
            if len(rows) and len(found) < PASSAGES:
                row = int(rows[np.argsort(means[rows], kind="stable")[(len(rows) - 1) // 2]])
                found.append(("typical", row, self._middle(row)))
        if found:
            found.append(("worst", *self._worst(kl)))
        return found

    def _middle(self, row: int) -> int:
        length = int(self.tokens.lengths[row])
        return max(0, min(length // 2, length - 1 - PASSAGE_TOKENS))

    def _worst(self, kl: np.ndarray) -> tuple[int, int]:
        """The row and start of the stretch of ``PASSAGE_TOKENS`` positions (of a whole row, where it is shorter) with
        the largest sum; what a stretch predicts lies within its row."""
        best = (-1.0, 0, 0)
        for row, length in enumerate(self.tokens.lengths.astype(int).tolist()):
            if length < 2:
                continue
            width = min(PASSAGE_TOKENS, length - 1)
            summed = np.concatenate([[0.0], np.cumsum(kl[row, : length - 1])])
            sums = (summed[width:] - summed[:-width]) / width
            start = int(sums.argmax())
            best = max(best, (float(sums[start]), row, start), key=lambda item: item[0])
        return best[1], best[2]

    def _passage(self, why: str, row: int, start: int, text: TokenText) -> dict[str, Any]:
        ids, mask = self.tokens.input_ids[row].tolist(), self.tokens.mask[row]
        end = min(start + PASSAGE_TOKENS, int(self.tokens.lengths[row]) - 1)
        entries, kl_sum = [], 0.0
        for position in range(start, end):
            if not (mask[position] and mask[position + 1]):
                continue
            before = [i for i, real in zip(ids[: position + 1], mask, strict=False) if real]
            at = {name: float(values[row, position]) for name, values in self._values.items()}
            best = {name: int(values[row, position]) for name, values in self._best.items()}
            kl_sum += at["kl"]
            entries.append(
                {
                    "id": ids[position + 1],
                    "text": text(before, ids[position + 1]),
                    "kl": round(max(at["kl"], 0.0), 5),
                    **{f"next_{name}": _probability(at[f"next_{name}"]) for name in "ab"},
                    **{
                        f"best_{name}": {
                            "id": best[name],
                            "text": text(before, best[name]),
                            "probability": _probability(at[f"best_{name}"]),
                        }
                        for name in "ab"
                    },
                }
            )
        domain = self.tokens.domains[int(self.tokens.domain[row])]
        opening = "".join(text(ids[:i], ids[i]) or "" for i in range(max(0, start - 24), start + 1) if mask[i])
        return {
            "why": why,
            "domain": domain,
            "sequence": row,
            "position": start + 1,
            "kl": kl_sum / max(len(entries), 1),
            "before": opening,
            "tokens": entries,
        }


def _probability(log_probability: float) -> float:
    return float(f"{np.exp(log_probability):.4g}")
