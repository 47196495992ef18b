"""The importance matrix that llama-quantize reads, from the second moments of an observation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reapc.arch import ModelSpec
from reapc.observe.scores import Scores
from reapc.quantize.gguf import write_imatrix
from reapc.stream.tokens import Tokens

_TURNED = ("attn_k_b.weight",)


def entries_of(scores: Scores, spec: ModelSpec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squared inputs and counts by GGUF tensor name; experts' are (experts, in) with one count each.

    A tensor that the converter makes of a linear but whose rows are not that linear's (MLA's k_b, turned around; a
    matrix cut in two) has no entry."""
    entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer in spec.layers:
        for group in layer.kind.tensors:
            if not group.linears:
                continue
            module = f"{layer.prefix}.{group.name}".removesuffix(".weight")
            if group.role == "expert":
                key = f"layers.{layer.index}.experts.{'down' if 'down' in group.gguf[0].name else 'gate_up'}"
                counts = scores.arrays.get(f"layers.{layer.index}.routed_tokens")
            else:
                key, counts = module, scores.arrays.get(f"second_moment_count.{module}")
            values = scores.arrays.get(f"second_moment.{key}")
            if values is None or counts is None:
                continue
            for part in group.gguf:
                if part.shape[-1:] == values.shape[-1:] and part.name not in _TURNED:
                    entries[f"blk.{layer.index}.{part.name}"] = (values, counts)
    return entries


def write_from_scores(out: Path, scores: Scores, calibration: Tokens, spec: ModelSpec) -> None:
    """Writes the imatrix of ``scores`` (observed with second moments) of a model of ``spec`` to ``out``."""
    write_imatrix(out, entries_of(scores, spec), calibration.sequences, calibration.length, [calibration.source])
