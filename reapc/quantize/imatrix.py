"""The importance matrix that llama-quantize reads, from the second moments of an observation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reapc.arch import ModelSpec
from reapc.formats.gguf import is_routed, part_layer
from reapc.observe.scores import Scores
from reapc.quantize.gguf import write_imatrix
from reapc.stream.model import Q_NOPE
from reapc.stream.tokens import Tokens


def entries_of(scores: Scores, spec: ModelSpec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squared inputs and counts by GGUF tensor name; experts' are (experts, in) with one count each.

    Of MLA's kv_b the converter makes two matrices for each head: k_b, turned around, which is given the query's part
    without positions, and v_b, which is given a mean of latents: the latents' own moments stand for it. A matrix whose
    rows are of another length than what was observed has no entry."""
    entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def total(name: str) -> np.ndarray | None:
        return scores.total(name) if name in scores.arrays else None

    for layer in spec.layers:
        for group in layer.kind.tensors:
            if not group.linears and len(group.shape) != 2:
                continue
            module = f"{layer.prefix}.{group.name}".removesuffix(".weight")
            if group.role == "expert":
                key = f"layers.{layer.index}.experts.{'down' if 'down' in group.gguf[0].name else 'gate_up'}"
                counts = total(f"layers.{layer.index}.routed_tokens")
            else:
                key, counts = module, total(f"second_moment_count.{module}")
            values = total(f"second_moment.{key}")
            if values is None or counts is None:
                continue
            for part in group.gguf:
                place = f"blk.{layer.index}.{part.name}"
                if part.name == "attn_k_b.weight":
                    heads, _, columns = part.shape
                    own = total(f"second_moment.{module.rpartition('.')[0]}.{Q_NOPE}")
                    if own is not None and own.size == heads * columns:
                        entries[place] = (own.reshape(heads, columns), np.repeat(counts, heads))
                elif part.shape[-1:] == values.shape[-1:]:
                    heads = part.shape[0] if len(part.shape) == 3 else 0  # v_b: one matrix for each head
                    entries[place] = (
                        (np.tile(values, (heads, 1)), np.repeat(counts, heads)) if heads else (values, counts)
                    )
    return entries


def write_from_scores(out: Path, scores: Scores, calibration: Tokens, spec: ModelSpec) -> None:
    """Writes the imatrix of ``scores`` (observed with second moments) of a model of ``spec`` to ``out``."""
    write_imatrix(out, entries_of(scores, spec), calibration.sequences, calibration.length, [calibration.source])


def kept_entries(
    entries: Mapping[str, tuple[np.ndarray, np.ndarray]], kept: Mapping[int, Sequence[int]] | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The entries with the experts of ``kept`` (by layer) alone: the original's routing, where the pruned model's own
    was not observed."""
    if kept is None:
        return dict(entries)
    result = {}
    for name, (sums, counts) in entries.items():
        layer = part_layer(name)[0]
        if is_routed(name) and layer in kept:
            rows = list(kept[layer])
            result[name] = (sums[rows], counts[rows])
        else:
            result[name] = (sums, counts)
    return result
