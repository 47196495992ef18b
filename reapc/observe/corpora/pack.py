"""Packing: rows of one sample each, exact token budgets by domain, and a held-out part that shares no sample."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from reapc.errors import ReapcError
from reapc.mix import Mix
from reapc.observe.corpora.logs import NoSample
from reapc.stream.tokens import Tokens

LEAST_TOKENS = 8  # of a sample: the first tokens of a text draw attention to themselves and say little of it

Encoded = Iterator[np.ndarray | NoSample]


@dataclass
class SourceReport:
    """What one source gave. ``cut``: samples longer than a row, which became several rows. ``skipped``: records that
    gave no sample, by reason."""

    source: str
    domain: str
    tokens: int = 0
    held_out_tokens: int = 0
    samples: int = 0
    rows: int = 0
    cut: int = 0
    repeated: bool = False
    skipped: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.source} ({self.domain}): {self.tokens} tokens, {self.samples} samples, {self.rows} rows"]
        if self.held_out_tokens:
            parts.append(f"{self.held_out_tokens} tokens held out")
        if self.cut:
            parts.append(f"{self.cut} samples longer than a row, cut into several")
        if self.repeated:
            parts.append("repeated, as it has fewer")
        parts += [f"{count} left out: {reason}" for reason, count in self.skipped.most_common()]
        return "; ".join(parts)


class Packed(NamedTuple):
    """The calibration tokens, the held-out ones (None where none were asked for), and what each source gave."""

    tokens: Tokens
    held_out: Tokens | None
    reports: list[SourceReport]


def split_exactly(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of ``weights`` that add up to ``total``: largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def budgets(mix: Mix, total: int) -> list[int]:
    """Tokens of each source: first every domain gets its share of ``total``, then its sources share that."""
    domains = mix.shares()
    of_domain = dict(zip(domains, split_exactly(total, list(domains.values())), strict=True))
    parts = [0] * len(mix.sources)
    for domain, tokens in of_domain.items():
        members = [i for i, source in enumerate(mix.sources) if source.domain == domain]
        for i, part in zip(members, split_exactly(tokens, [mix.sources[i].weight for i in members]), strict=True):
            parts[i] = part
    return parts


def pack(
    mix: Mix,
    encoded: Sequence[Encoded],
    length: int,
    total: int,
    held_out: int,
    seed: int,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Packed:
    """``total`` tokens of calibration and ``held_out`` tokens of other samples, both in the mix's shares, in rows of at
    most ``length``. ``encoded`` has each source's samples as ids. ReapcError names a source that has too few.

    A mix that may have fewer (``at_most``) gives at most a third of what it has to the held-out part."""
    reports = [SourceReport(source.name, source.domain) for source in mix.sources]
    seen: set[bytes] = set()
    pieces = [
        _distinct(samples, length, report, seen, advance) for samples, report in zip(encoded, reports, strict=True)
    ]
    if mix.at_most:
        pieces[0], total, held_out = _what_there_is(mix, pieces[0], reports[0], total, held_out)
    wanted, spare = budgets(mix, total), budgets(mix, held_out)
    _refuse_nothing(mix, wanted, total)
    kept: list[list[np.ndarray]] = []
    held: list[list[np.ndarray]] = []
    for i, report in enumerate(reports):
        held.append(_fill(pieces[i], spare[i], report, held_out=True))
        kept.append(_fill(pieces[i], wanted[i], report, held_out=False))
    for i in range(len(reports)):
        _complete(mix, i, kept[i], wanted[i], spare[i], reports)
    return Packed(
        _tokens(mix, kept, seed),
        _tokens(mix, held, seed) if held_out else None,
        reports,
    )


def _distinct(
    samples: Iterable[np.ndarray | NoSample],
    length: int,
    report: SourceReport,
    seen: set[bytes],
    advance: Callable[[float], None],
) -> Iterator[list[np.ndarray]]:
    """Each sample as its rows; without those that are too short or were there before, which are counted."""
    for sample in samples:
        if isinstance(sample, NoSample):
            report.skipped[str(sample)] += 1
            continue
        if len(sample) < LEAST_TOKENS:
            report.skipped[f"fewer than {LEAST_TOKENS} tokens"] += 1
            continue
        digest = hashlib.sha256(sample.tobytes()).digest()[:16]
        if digest in seen:
            report.skipped["the same as another sample"] += 1
            continue
        seen.add(digest)
        rows = [sample[i : i + length] for i in range(0, len(sample), length)]
        if len(rows) > 1 and len(rows[-1]) < LEAST_TOKENS:
            rows.pop()
        advance(_size(rows))
        yield rows


def _what_there_is(
    mix: Mix, pieces: Iterator[list[np.ndarray]], report: SourceReport, total: int, held_out: int
) -> tuple[Iterator[list[np.ndarray]], int, int]:
    """The samples, those to hold out first, and how many tokens there are for calibration and to hold out."""
    found: list[list[np.ndarray]] = []
    aside = rest = 0
    while aside < held_out or rest < total:
        rows = next(pieces, None)
        if rows is None:
            break
        found.append(rows)
        if aside < held_out:
            aside += _size(rows)
        else:
            rest += _size(rows)
    else:
        return iter(found), total, held_out
    if not found:
        raise ReapcError(f"data = {mix.name!r}: no sample of at least {LEAST_TOKENS} tokens{_skipped(report)}")
    tokens = sum(map(_size, found))
    if not held_out:
        return iter(found), tokens, 0
    if len(found) < 2:
        raise ReapcError(
            f"data = {mix.name!r} has one sample: none is left to verify with",
            hint="give [verify] data, or more calibration text",
        )
    first: list[int] = []  # whole samples that together are at most a third, or else the smallest
    for i, rows in enumerate(found):
        if sum(_size(found[k]) for k in first) + _size(rows) <= min(held_out, tokens // 3):
            first.append(i)
    first = first or [min(range(len(found)), key=lambda i: _size(found[i]))]
    aside = sum(_size(found[i]) for i in first)
    order = [*first, *(i for i in range(len(found)) if i not in first)]
    return iter([found[i] for i in order]), min(total, tokens - aside), min(held_out, aside)


def _size(rows: list[np.ndarray]) -> int:
    return sum(map(len, rows))


def _refuse_nothing(mix: Mix, wanted: list[int], total: int) -> None:
    for source, tokens in zip(mix.sources, wanted, strict=True):
        if tokens == 0:
            raise ReapcError(
                f"{source.name} (domain {source.domain!r}): its weight {source.weight:g} is less than one of {total} "
                "tokens",
                hint="more calibration.sequences, or a larger weight",
            )


def _fill(pieces: Iterator[list[np.ndarray]], budget: int, report: SourceReport, held_out: bool) -> list[np.ndarray]:
    """Rows of exactly ``budget`` tokens, the last sample cut to hit it; fewer where the samples end."""
    rows: list[np.ndarray] = []
    left = budget
    while left and (sample := next(pieces, None)) is not None:
        if not held_out:
            report.samples += 1
            report.cut += len(sample) > 1
        for row in sample:
            rows.append(row[:left])
            left -= len(rows[-1])
            if not left:
                break
    if held_out:
        report.held_out_tokens += budget - left
    else:
        report.tokens += budget - left
        report.rows += len(rows)
    return rows


def _complete(mix: Mix, i: int, rows: list[np.ndarray], wanted: int, spare: int, reports: list[SourceReport]) -> None:
    """Repeats ``rows`` up to the budget where the source may; ReapcError where it may not, or has nothing."""
    source, report = mix.sources[i], reports[i]
    found = report.tokens + report.held_out_tokens
    domain = [r for r in reports if r.domain == report.domain]
    if not any(r.tokens or r.held_out_tokens for r in domain):
        raise ReapcError(
            f"the domain {report.domain!r} is empty: {', '.join(r.source for r in domain)} gave no sample of at least "
            f"{LEAST_TOKENS} tokens{_skipped(report)}"
        )
    left = wanted - report.tokens
    if not left:
        return
    if not source.repeat or not rows:
        also = f" and {spare} to verify with" if spare else ""
        raise ReapcError(
            f"{report.source} (domain {report.domain!r}) has {found} tokens{_skipped(report)}; its share of the budget "
            f"is {wanted}{also}",
            hint="fewer calibration.sequences, a smaller weight, repeat = true in the source, or more data",
        )
    report.repeated = True
    for k in range(left):  # bounded: every row has a token
        row = rows[k][:left]
        rows.append(row)
        left -= len(row)
        if not left:
            break
    report.tokens, report.rows = wanted, len(rows)


def _skipped(report: SourceReport) -> str:
    if not report.skipped:
        return ""
    return " (" + ", ".join(f"{count} left out: {reason}" for reason, count in report.skipped.most_common(3)) + ")"


def tokens_by_domain(tokens: Tokens) -> dict[str, int]:
    """Real tokens of each domain."""
    counts = np.bincount(tokens.domain, weights=tokens.mask.sum(axis=1), minlength=len(tokens.domains))
    return {name: int(count) for name, count in zip(tokens.domains, counts, strict=True)}


def _tokens(mix: Mix, parts: list[list[np.ndarray]], seed: int) -> Tokens:
    """The rows by length, those of one length in random order: a batch, which is a run of rows, pads next to nothing,
    and what deals rows out in turn (the parts of the scores) deals every length to each."""
    rows = [row for part in parts for row in part]
    domains = mix.domains
    domain = np.array([domains.index(s.domain) for s, part in zip(mix.sources, parts, strict=True) for _ in part])
    lengths = np.array([len(row) for row in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(lengths[order], kind="stable")]
    ids = np.zeros((len(rows), int(lengths.max())), np.int32)
    mask = np.zeros(ids.shape, bool)
    for place, i in enumerate(order):
        ids[place, : lengths[i]] = rows[i]
        mask[place, : lengths[i]] = True
    return Tokens(ids, mask, domain[order].astype(np.int32), domains, mix.name)
