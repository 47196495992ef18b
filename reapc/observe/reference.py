"""Reference log-probabilities of held-out sequences: exact while small, else the top ones and the tail's mass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path
from reapc.stream.memory import Memory
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates

EXACT_LIMIT_BYTES = 256 << 20
TOP = 256
_HEAD_TOKENS = 2048
# Of every token and id of the vocabulary: logits, log-probabilities, their negatives and an int64 order.
_BYTES_EACH = 4 + 4 + 4 + 8
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def head_parts(model: StreamedModel, memory: Memory | None = None) -> tuple[int, int | None]:
    """(tokens, rows of the vocabulary) that the head takes at a time: as many as ever, or what the room that ``memory``
    leaves has place for (at least 16 tokens, 1024 rows); None: all rows."""
    vocab = model.spec.vocab_size
    mapped = model.checkpoint.dtype_of(model.head_name) == _STORED[model.dtype]
    whole = 0 if mapped or model.device.type != "cpu" else vocab * model.spec.hidden_size * model.dtype.itemsize
    room = None if memory is None else memory.room_bytes()
    tokens, rows = _HEAD_TOKENS, vocab
    if room is None:
        return tokens, None
    while tokens > 16 and tokens * vocab * _BYTES_EACH > max(room - whole, room // 2):
        tokens //= 2
    left = max(0, room - tokens * vocab * _BYTES_EACH)
    while rows > 1024 and whole * rows // vocab > left:
        rows //= 2
    return tokens, None if rows == vocab else rows


def _parts(model: StreamedModel, states: HiddenStates, row: int, sizes: tuple[int, int | None]) -> Iterator[np.ndarray]:
    tokens, rows = sizes
    hidden = states.read(model.spec.num_layers, slice(row, row + 1))[0].to(model.device, model.dtype)
    for part in hidden.split(tokens):
        with torch.inference_mode():
            yield model.head(part, rows).cpu().numpy()


def final_log_probs(model: StreamedModel, states: HiddenStates) -> Iterator[np.ndarray]:
    """(length, vocabulary) fp32 log-probabilities of each sequence, from its states after the last layer."""
    for row in range(states.tokens.sequences):
        yield np.concatenate(list(_parts(model, states, row, (_HEAD_TOKENS, None))))


@dataclass(frozen=True)
class SequenceReference:
    """One sequence of the original: log-probabilities of the ids in ``top`` (length, k), the log of what is left
    (``tail``, length; absent when exact), the next token's log-probability and the best id."""

    log_probs: np.ndarray
    top: np.ndarray | None
    tail: np.ndarray | None
    next_log_prob: np.ndarray
    best: np.ndarray

    @staticmethod
    def of(log_probs: np.ndarray, input_ids: np.ndarray, exact: bool) -> SequenceReference:
        """From (length, vocabulary) log-probabilities."""
        return SequenceReference.of_parts([log_probs], input_ids, exact)

    @staticmethod
    def of_parts(parts: Iterable[np.ndarray], input_ids: np.ndarray, exact: bool) -> SequenceReference:
        """From the same in runs of tokens, one after another."""
        found: list[tuple[np.ndarray, ...]] = []
        start = 0
        for log_probs in parts:
            end = start + len(log_probs)
            following = input_ids[start + 1 : end + 1, None].astype(np.int64)
            next_log_prob = np.take_along_axis(log_probs[: len(following)], following, axis=1)[:, 0]
            kept: tuple[np.ndarray, ...] = (log_probs,)
            if not exact:
                top = np.argpartition(-log_probs, TOP, axis=1)[:, :TOP].copy()
                values = np.take_along_axis(log_probs, top, axis=1)
                left = np.clip(1 - np.exp(values.astype(np.float64)).sum(axis=1), 1e-12, None)
                kept = (values, top, np.log(left).astype(np.float32))
            found.append((next_log_prob, log_probs.argmax(axis=1), *kept))
            start = end
        joined = [values[0] if len(found) == 1 else np.concatenate(values) for values in zip(*found, strict=True)]
        next_log_prob, best, values, *rest = joined
        return SequenceReference(values, rest[0] if rest else None, rest[1] if rest else None, next_log_prob, best)

    def kl_to(self, other: np.ndarray) -> np.ndarray:
        """KL(reference || other) in nats at every position; a lower bound when only the top is kept."""
        if self.top is None:
            return np.asarray((np.exp(self.log_probs) * (self.log_probs - other)).sum(axis=1))
        values = np.take_along_axis(other, self.top, axis=1)
        kept = (np.exp(self.log_probs) * (self.log_probs - values)).sum(axis=1)
        left = np.log(np.clip(1 - np.exp(values.astype(np.float64)).sum(axis=1), 1e-12, None))
        assert self.tail is not None
        return np.asarray(kept + np.exp(self.tail) * (self.tail - left), np.float32)


def write_reference(path: Path, model: StreamedModel, states: HiddenStates, memory: Memory | None = None) -> None:
    """Stores the reference of every sequence of ``states``, within the bound of ``memory``."""
    from safetensors.numpy import save_file

    tokens = states.tokens
    exact = tokens.input_ids.size * model.spec.vocab_size * 4 <= EXACT_LIMIT_BYTES or model.spec.vocab_size <= TOP
    sizes = head_parts(model, memory)
    rows = [
        SequenceReference.of_parts(_parts(model, states, row, sizes), tokens.input_ids[row], exact)
        for row in range(tokens.sequences)
    ]
    arrays = {
        "log_probs": np.stack([row.log_probs for row in rows]),
        "next_log_prob": np.stack([row.next_log_prob for row in rows]),
        "best": np.stack([row.best for row in rows]).astype(np.int32),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.mask,
        "domain": tokens.domain.astype(np.int32),
    }
    if not exact:
        arrays["top"] = np.stack([row.top for row in rows if row.top is not None]).astype(np.int32)
        arrays["tail"] = np.stack([row.tail for row in rows if row.tail is not None])
    with atomic_path(path) as partial:
        save_file(arrays, partial, metadata={"domains": json.dumps(tokens.domains)})


def read_reference(path: Path) -> Iterator[SequenceReference]:
    """The stored references, in order."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        for i in range(slices["best"].get_shape()[0]):
            sparse = "top" in names
            yield SequenceReference(
                slices["log_probs"][i],
                slices["top"][i].astype(np.int64) if sparse else None,
                slices["tail"][i] if sparse else None,
                slices["next_log_prob"][i],
                slices["best"][i],
            )
