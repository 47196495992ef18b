"""The importance matrix that llama-quantize reads, from the second moments of an observation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reapc.observe.scores import Scores
from reapc.quantize.gguf import imatrix_name, write_imatrix
from reapc.stream.tokens import Tokens


def entries_of(scores: Scores, arch: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squared inputs and counts by GGUF tensor name; experts' are (experts, in) with one count each."""
    entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, values in scores.arrays.items():
        module = name.removeprefix("second_moment.")
        if module == name:
            continue
        if ".experts." not in module:
            entries[imatrix_name(module, arch)] = (values, scores.arrays[f"second_moment_count.{module}"])
            continue
        layer = int(module.split(".")[1])
        counts = scores.arrays[f"layers.{layer}.routed_tokens"]
        for part in ("gate", "up") if module.endswith("gate_up") else ("down",):
            entries[imatrix_name(f"model.layers.{layer}.mlp.experts.{part}_proj", arch)] = (values, counts)
    return entries


def write_from_scores(out: Path, scores: Scores, calibration: Tokens, arch: str) -> None:
    """Writes the imatrix of ``scores`` (observed with second moments) to ``out``; ``arch``: llama.cpp's name of the
    family (ModelSpec.gguf_arch)."""
    write_imatrix(out, entries_of(scores, arch), calibration.sequences, calibration.length, [calibration.source])
