"""Words and tables of the report, before they are HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reapc.units import format_bytes, format_seconds

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells are text, or Markup that was escaped where it was made. ``words``: columns that are not figures."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: Iterable[int] = field(default=(0,))


def kl(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f} %"


def perplexity(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def size(count: int | None) -> str:
    """ "8,936,736 (8.5 MiB)" """
    return NONE if count is None else f"{count:,} ({format_bytes(count)})"


def ends(interval: Sequence[float] | None) -> str:
    """An interval of KL."""
    return NONE if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def signed(interval: Sequence[float] | None) -> str:
    """An interval of a difference of KLs."""
    return NONE if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def seconds(value: float | str | None) -> str:
    """A time, or the word that stands for it."""
    return NONE if value is None else value if isinstance(value, str) else format_seconds(value)
