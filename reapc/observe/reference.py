"""Reference log-probabilities of held-out sequences: exact while small, else the top ones and the tail's mass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reapc.checkpoint.atomic import atomic_path
from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates

EXACT_LIMIT_BYTES = 256 << 20
TOP = 256
_HEAD_TOKENS = 2048


def final_log_probs(model: StreamedModel, states: HiddenStates) -> Iterator[np.ndarray]:
    """(length, vocabulary) fp32 log-probabilities of each sequence, from its states after the last layer."""
    for row in range(states.tokens.sequences):
        hidden = states.read(model.spec.num_layers, slice(row, row + 1))[0].to(model.device, model.dtype)
        with torch.inference_mode():
            yield torch.cat([model.head(part) for part in hidden.split(_HEAD_TOKENS)]).cpu().numpy()


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
        following = np.take_along_axis(log_probs[:-1], input_ids[1:, None].astype(np.int64), axis=1)[:, 0]
        best = log_probs.argmax(axis=1)
        if exact:
            return SequenceReference(log_probs, None, None, following, best)
        top = np.argpartition(-log_probs, TOP, axis=1)[:, :TOP]
        values = np.take_along_axis(log_probs, top, axis=1)
        left = np.clip(1 - np.exp(values.astype(np.float64)).sum(axis=1), 1e-12, None)
        return SequenceReference(values, top, np.log(left).astype(np.float32), following, best)

    def kl_to(self, other: np.ndarray) -> np.ndarray:
        """KL(reference || other) in nats at every position; a lower bound when only the top is kept."""
        if self.top is None:
            return np.asarray((np.exp(self.log_probs) * (self.log_probs - other)).sum(axis=1))
        values = np.take_along_axis(other, self.top, axis=1)
        kept = (np.exp(self.log_probs) * (self.log_probs - values)).sum(axis=1)
        left = np.log(np.clip(1 - np.exp(values.astype(np.float64)).sum(axis=1), 1e-12, None))
        assert self.tail is not None
        return np.asarray(kept + np.exp(self.tail) * (self.tail - left), np.float32)


def write_reference(path: Path, model: StreamedModel, states: HiddenStates) -> None:
    """Stores the reference of every sequence of ``states``."""
    from safetensors.numpy import save_file

    tokens = states.tokens
    exact = tokens.input_ids.size * model.spec.vocab_size * 4 <= EXACT_LIMIT_BYTES or model.spec.vocab_size <= TOP
    rows = [
        SequenceReference.of(log_probs, tokens.input_ids[i], exact)
        for i, log_probs in enumerate(final_log_probs(model, states))
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
