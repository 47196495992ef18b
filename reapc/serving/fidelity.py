"""KL, top-1 and perplexity of a running server against the stored reference, from the log-probabilities it gives.

A server tells the best k tokens of a position. The KL is then taken over a coarser partition: every token whose
probability is known on both sides, and one bucket for all the rest. Merging outcomes never raises a KL divergence (the
log-sum inequality), so the figure is a lower bound of the true one, and exact where nothing is left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.serving.built import HELD_OUT, REFERENCE, Built
from reapc.serving.client import LLAMA_SERVER, Client, NeedsFewer, Row

if TYPE_CHECKING:
    from reapc.observe.reference import SequenceReference
    from reapc.stream.tokens import Tokens

SMALL_VOCABULARY = 4096  # asked for whole; an answer is then about 400 kB
TOP = 512  # of a larger one: twice what the reference keeps
_LEAST = 1e-12  # mass of a bucket that rounding emptied


@dataclass(frozen=True)
class Reference:
    """The held-out tokens and the original's log-probabilities of them; ``vocab`` is the original's vocabulary."""

    tokens: Tokens
    sequences: list[SequenceReference]
    vocab: int


def read_built_reference(built: Built, rows: int) -> Reference:
    """``rows`` sequences of the build's held-out text (all when fewer), evenly from all of it, with their reference."""
    from reapc.observe.reference import read_reference
    from reapc.stream.tokens import read_tokens, spread
    from reapc.verify.fidelity import vocabulary_of

    held_out, stored = built.need(HELD_OUT), built.need(REFERENCE)
    vocab = vocabulary_of(built.artifact)
    tokens = read_tokens(held_out, vocab)
    _check_pair(tokens, stored, vocab)
    chosen = spread(tokens.sequences, rows)
    wanted = set(chosen.tolist())
    kept = [reference for row, reference in enumerate(read_reference(stored)) if row in wanted]
    return Reference(tokens.take(chosen), kept, vocab)


def _check_pair(tokens: Tokens, stored: Path, vocab: int) -> None:
    """The reference must be that of these very tokens."""
    from safetensors import SafetensorError

    from reapc.stream.tokens import read_tokens

    try:
        same = read_tokens(stored, vocab).digest == tokens.digest
    except (SafetensorError, OSError) as error:
        raise ReapcError(f"{stored}: cannot be read: {error}", hint="build again") from error
    if not same:
        raise ReapcError(
            f"{stored}: is not the reference of {HELD_OUT} beside it", hint="they belong to two builds; build again"
        )


@dataclass
class Sums:
    """Running sums over positions."""

    positions: int = 0
    exact: int = 0
    kl: float = 0.0
    agree: int = 0
    loss_reference: float = 0.0
    loss_server: float = 0.0
    unknown_next: int = 0
    rest_reference: float = 0.0
    rest_server: float = 0.0

    def add(self, other: Sums) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        n = max(self.positions, 1)
        return {
            "positions": self.positions,
            "kl": self.kl / n,
            "kl_is": "exact" if self.exact == self.positions else "a lower bound",
            "top1": self.agree / n,
            "perplexity_reference": math.exp(self.loss_reference / n),
            "perplexity_server": math.exp(min(self.loss_server / n, 700.0)),
            "next_token_unknown": self.unknown_next,
            "rest_mass_reference": self.rest_reference / n,
            "rest_mass_server": self.rest_server / n,
        }


def compare_row(reference: SequenceReference, position: int, row: Row, vocab: int) -> Sums:
    """One position: what the reference and the server say of the token after it."""
    theirs = dict(zip(row.ids.tolist(), row.log_probs.tolist(), strict=True))
    if reference.top is None:
        ours_ids = row.ids
        ours = reference.log_probs[position][ours_ids].astype(np.float64)
    else:
        known = {int(i): float(p) for i, p in zip(reference.top[position], reference.log_probs[position], strict=True)}
        shared = [i for i in theirs if i in known]
        ours_ids = np.array(shared, dtype=np.int64)
        ours = np.array([known[i] for i in shared], dtype=np.float64)
    logs = np.array([theirs[int(i)] for i in ours_ids], dtype=np.float64)
    p = np.exp(ours)
    exact = reference.top is None and len(theirs) >= vocab
    rest_p = 0.0 if exact else max(0.0, 1.0 - float(p.sum()))
    rest_q = 0.0 if exact else max(0.0, 1.0 - float(np.exp(logs).sum()))
    kl = float((p * (ours - np.maximum(logs, -1e4))).sum())
    if rest_p > _LEAST:
        kl += rest_p * (math.log(rest_p) - math.log(max(rest_q, _LEAST)))
    # an unknown next token is at most as likely as the last one that the server named
    actual = row.actual if row.actual is not None else float(row.log_probs[-1])
    return Sums(
        positions=1,
        exact=int(exact),
        kl=kl,
        agree=int(row.ids[0] == reference.best[position]),
        loss_reference=-float(reference.next_log_prob[position]),
        loss_server=-max(actual, -1e4),
        unknown_next=int(row.actual is None),
        rest_reference=rest_p,
        rest_server=rest_q,
    )


@dataclass
class ServerFidelity:
    """``total`` and ``domains``: figures as ``Sums.to_json``; ``top`` is the k that the server gave."""

    total: Sums
    domains: dict[str, Sums]
    top: int
    by_sequence: list[Sums]
    remarks: list[str] = field(default_factory=list)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean KL, from the spread between sequences; None of one sequence."""
        means = [sums.kl / sums.positions for sums in self.by_sequence]
        return float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None

    def to_json(self) -> dict[str, Any]:
        parts = {name: sums.to_json() for name, sums in self.domains.items()} if len(self.domains) > 1 else {}
        return {
            **self.total.to_json(),
            "kl_standard_error": self.kl_error,
            "top_k": self.top,
            "sequences": len(self.by_sequence),
            "domains": parts,
        }


def positions_of(tokens: Tokens, row: int, wanted: int, context: int | None) -> list[int]:
    """Positions of one sequence that have a real token after them and fit the server's context; ``wanted`` of them,
    evenly apart (0: all)."""
    mask = tokens.mask[row]
    found = np.flatnonzero(mask[:-1] & mask[1:])
    if context:
        found = found[found + 2 < context]  # the prefix, the token after it, and one that the server makes
    if 0 < wanted < len(found):  # the middles of equal parts: the first position is not in every sequence's sample
        found = found[((np.arange(wanted) + 0.5) * len(found) / wanted).astype(int)]
    return [int(position) for position in found]


def measure_server(
    client: Client,
    reference: Reference,
    progress: Progress,
    *,
    positions: int,
    top: int | None,
    concurrency: int,
) -> ServerFidelity:
    """Asks for the log-probabilities of ``positions`` positions of every sequence (0: all of them).

    CannotBeDone names how far it came when the server stops answering."""
    tokens, info = reference.tokens, client.info
    asked = min(top or (reference.vocab if reference.vocab <= SMALL_VOCABULARY else TOP), reference.vocab)
    plan = [positions_of(tokens, row, positions, info.context) for row in range(tokens.sequences)]
    total = sum(len(found) for found in plan)
    remarks = []
    longest = int(tokens.mask.sum(axis=1).max())
    if info.context and info.context < longest + 1:
        remarks.append(f"the server's context is {info.context} tokens; held-out sequences of {longest} are cut there")
    if not total:
        raise CannotBeDone(f"{client.url}: its context of {info.context} tokens is too short for the held-out text")

    def one(row: int) -> Sums:
        nonlocal asked
        ids = _real(tokens, row)
        # an engine that reads the whole prompt is given no more of it than its context holds
        cut = ids if info.kind == LLAMA_SERVER or not info.context else ids[: info.context - 1]
        found = Sums()
        try:
            rows = list(zip(plan[row], client.rows(cut, plan[row], asked), strict=True))
        except NeedsFewer as error:
            asked = min(error.allowed or 20, asked - 1)
            if asked < 1:
                raise CannotBeDone(f"{client.url}: gives no log-probabilities") from error
            rows = list(zip(plan[row], client.rows(cut, plan[row], asked), strict=True))
        for position, answer in rows:
            if not len(answer.ids):
                raise CannotBeDone(f"{client.url}: an empty list of log-probabilities at position {position}")
            found.add(compare_row(reference.sequences[row], position, answer, reference.vocab))
        return found

    sums, by_domain = Sums(), {name: Sums() for name in tokens.domains}
    by_sequence: list[Sums] = []
    rows = [row for row in range(tokens.sequences) if plan[row]]
    try:
        with progress.task("log-probabilities", total, "positions") as advance:
            for row, found in _in_order(one, rows, concurrency):
                sums.add(found)
                by_domain[tokens.domains[int(tokens.domain[row])]].add(found)
                by_sequence.append(found)
                advance(found.positions)
    except CannotBeDone as error:
        if not by_sequence:
            raise
        raise CannotBeDone(
            f"{error.message}; {sums.positions} of {total} positions were checked "
            f"({len(by_sequence)} of {len(rows)} sequences)",
            hint=error.hint or "the server's own log says why it stopped; start it again and repeat the check",
        ) from error
    used = {name: part for name, part in by_domain.items() if part.positions}
    return ServerFidelity(sums, used, asked, by_sequence, remarks)


def _real(tokens: Tokens, row: int) -> list[int]:
    """The sequence up to its last real token: positions stay those of the file."""
    last = int(np.flatnonzero(tokens.mask[row]).max()) + 1
    return [int(i) for i in tokens.input_ids[row][:last]]


def _in_order(work: Callable[[int], Sums], rows: list[int], concurrency: int) -> Iterator[tuple[int, Sums]]:
    """Runs the first alone (it settles what the server can do), the rest ``concurrency`` at a time, as they end."""
    if rows:
        yield rows[0], work(rows[0])
    with ThreadPoolExecutor(max(1, concurrency)) as pool:
        waiting: dict[Future[Sums], int] = {pool.submit(work, row): row for row in rows[1:]}
        try:
            while waiting:
                ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    row = waiting.pop(future)
                    yield row, future.result()
        finally:
            for future in waiting:
                future.cancel()
