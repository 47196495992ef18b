"""Token sequences, and the file format that carries them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reapc.errors import ReapcError


def spread(total: int, wanted: int) -> np.ndarray:
    """``wanted`` indices below ``total``, evenly apart; all of them when ``wanted`` is 0 or more than there are."""
    if wanted <= 0 or wanted >= total:
        return np.arange(total)
    return np.asarray(np.unique(np.linspace(0, total - 1, wanted).round().astype(int)))


class Batch(NamedTuple):
    """The sequences ``rows``, ``length`` tokens of each."""

    rows: slice
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return int(self.rows.stop - self.rows.start) * self.length

    def cut(self, tokens: int) -> Iterator[Batch]:
        """The batch in runs of at most ``tokens`` tokens, or one sequence each."""
        rows = max(1, tokens // self.length)
        for start in range(self.rows.start, self.rows.stop, rows):
            yield Batch(slice(start, min(start + rows, self.rows.stop)), self.length)


@dataclass(frozen=True)
class Tokens:
    """``input_ids`` (sequences, length) int32; ``mask`` likewise, True where a token is real;
    ``domain`` (sequences,) indexes ``domains``."""

    input_ids: np.ndarray
    mask: np.ndarray
    domain: np.ndarray
    domains: tuple[str, ...] = ("all",)
    source: str = ""

    @property
    def sequences(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def count(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    @property
    def digest(self) -> str:
        """Identity of ids, mask and domains."""
        return hashlib.sha256(self.input_ids.tobytes() + self.mask.tobytes() + self.domain.tobytes()).hexdigest()

    def take(self, rows: np.ndarray, length: int | None = None) -> Tokens:
        """Only the sequences ``rows``, cut to ``length`` tokens."""
        cut = slice(0, length)
        return Tokens(
            self.input_ids[rows][:, cut], self.mask[rows][:, cut], self.domain[rows], self.domains, self.source
        )

    def evenly(self, wanted: int) -> Tokens:
        """``wanted`` of the sequences, evenly apart; all where there are fewer."""
        return self.take(spread(self.sequences, wanted))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(sequences,) how far each row goes: its last real token's place + 1."""
        behind = self.mask[:, ::-1].argmax(axis=1)
        return np.where(self.mask.any(axis=1), self.length - behind, 0)

    def batches(self, tokens_per_batch: int) -> Iterator[Batch]:
        """Runs of rows, together at most ``tokens_per_batch`` tokens (or one row) when each is cut to the longest of
        them: padding behind them all is never computed. A run does not depend on what stood before it."""
        start = 0
        while start < self.sequences:
            length, end = max(1, int(self.lengths[start])), start + 1
            while end < self.sequences:
                longest = max(length, int(self.lengths[end]))
                if (end + 1 - start) * longest > tokens_per_batch:
                    break
                length, end = longest, end + 1
            yield Batch(slice(start, end), length)
            start = end

    def shard(self, index: int, count: int, tokens_per_batch: int) -> slice:
        """The rows of shard ``index`` (from 1) of ``count``: whole batches, near equal numbers of tokens, so that every
        batch is computed as in the run over all. ReapcError where there are fewer batches than shards."""
        batches = list(self.batches(tokens_per_batch))
        if not 1 <= index <= count:
            raise ReapcError(f"shard {index}/{count}: the first number is from 1 to the second")
        if len(batches) < count:
            raise ReapcError(
                f"shard {index}/{count}: these {self.sequences} sequences make {len(batches)} batches of up to "
                f"{tokens_per_batch} tokens",
                hint=f"at most {len(batches)} shards",
            )
        ends = np.cumsum([batch.tokens for batch in batches])
        # each cut as near as can be to its share, leaving every shard at least one batch
        cuts = [0]
        for k in range(1, count):
            cut = int(np.abs(ends - ends[-1] * k / count).argmin()) + 1
            cuts.append(min(max(cut, cuts[-1] + 1), len(batches) - (count - k)))
        cuts.append(len(batches))
        return slice(batches[cuts[index - 1]].rows.start, batches[cuts[index] - 1].rows.stop)


def read_tokens(path: Path, vocab_size: int) -> Tokens:
    """Tokens from a safetensors file with ``input_ids`` (sequences, length) int32, optionally
    ``attention_mask`` of the same shape and ``domain`` (sequences,) with the metadata key ``domains``."""
    from safetensors import safe_open

    from reapc.checkpoint.safetensors_file import read_header

    if not path.is_file():
        raise ReapcError(f"{path}: no such file", hint="a safetensors file with input_ids is expected")
    entries, metadata = read_header(path)
    if "input_ids" not in entries:
        raise ReapcError(f"{path}: no tensor 'input_ids'; found: {', '.join(entries) or 'nothing'}")
    with safe_open(path, framework="np") as file:
        ids = file.get_tensor("input_ids")
        mask = file.get_tensor("attention_mask") if "attention_mask" in entries else np.ones(ids.shape, bool)
        domain = file.get_tensor("domain") if "domain" in entries else None
    if ids.ndim == 1:
        ids, mask = ids[None], mask.reshape(1, -1)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ReapcError(f"{path}: input_ids is {ids.dtype} {list(ids.shape)}; (sequences, length) int32 expected")
    if mask.shape != ids.shape:
        raise ReapcError(f"{path}: attention_mask {list(mask.shape)} differs from input_ids {list(ids.shape)}")
    mask = mask.astype(bool)
    if not mask.any():
        raise ReapcError(f"{path}: attention_mask hides every token")
    if ids[mask].min() < 0 or ids[mask].max() >= vocab_size:
        raise ReapcError(
            f"{path}: token ids {int(ids[mask].min())} to {int(ids[mask].max())}, the model's vocabulary has "
            f"{vocab_size}",
            hint="these tokens were made with another tokenizer",
        )
    names = _domain_names(path, (metadata or {}).get("domains", '["all"]'))
    if domain is None or domain.shape != (ids.shape[0],) or domain.min() < 0 or domain.max() >= len(names):
        domain, names = np.zeros(ids.shape[0], np.int32), ("all",)
    return Tokens(np.where(mask, ids, 0).astype(np.int32), mask, domain, names, path.name)


def write_tokens(path: Path, tokens: Tokens) -> None:
    """Writes what ``read_tokens`` reads."""
    from safetensors.numpy import save_file

    arrays = {
        "input_ids": np.ascontiguousarray(tokens.input_ids),
        "attention_mask": np.ascontiguousarray(tokens.mask),
        "domain": tokens.domain.astype(np.int32),
    }
    save_file(arrays, path, metadata={"domains": json.dumps(tokens.domains)})


def _domain_names(path: Path, text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    except ValueError:
        pass
    raise ReapcError(f"{path}: its metadata has domains = {text!r}; a JSON list of names is expected")
