"""The scores file: sums of one or more observations of a model, in one safetensors file that can be shared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapc.checkpoint.atomic import atomic_path
from reapc.errors import ReapcError
from reapc.observe.accumulate import ROUTING

FORMAT = "1"


@dataclass(frozen=True)
class Scores:
    """``arrays`` by name (see ``LayerSums.arrays``); ``header``: model, digest, num_experts, top_k, layers,
    tokens, calibration, dtype."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def layers(self) -> list[int]:
        """The decoder layers that have experts."""
        return [int(i) for i in self.header["layers"]]

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Routing sums of one layer, each (experts,), with the means ``reap`` and ``ean``.

        An expert that was never routed to has 0 in every one of them."""
        sums = {name: self.arrays[f"layers.{index}.{name}"] for name in ROUTING}
        count = np.maximum(sums["routed_tokens"], 1)
        return sums | {"reap": sums["gate_norm_sum"] / count, "ean": sums["norm_sum"] / count}

    def never_routed(self) -> dict[int, list[int]]:
        """Experts without a single token, by layer."""
        found = {i: np.flatnonzero(self.layer(i)["routed_tokens"] == 0).tolist() for i in self.layers}
        return {i: experts for i, experts in found.items() if experts}

    def save(self, path: Path) -> None:
        """Writes the file atomically."""
        from safetensors.numpy import save_file

        with atomic_path(path) as partial:
            save_file(self.arrays, partial, metadata={"reapc_scores": FORMAT, "header": json.dumps(self.header)})

    def to_json(self) -> dict[str, Any]:
        """What ``reapc scores show --json`` prints."""
        names = ("routed_tokens", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_activation")
        layers = {}
        for index in self.layers:
            layer = self.layer(index)
            layers[str(index)] = {name: layer[name].tolist() for name in (*names, "reap", "ean")}
            layers[str(index)]["routed_tokens"] = layer["routed_tokens"].astype(int).tolist()
        never = {str(i): experts for i, experts in self.never_routed().items()}
        return {**self.header, "never_routed": never, "layers": layers}


def load_scores(path: Path) -> Scores:
    """Scores from ``path``; ReapcError when it is not a scores file."""
    from safetensors.numpy import load_file

    from reapc.checkpoint.safetensors_file import read_header

    if not path.is_file():
        raise ReapcError(f"{path}: no such file", hint="`reapc observe MODEL --out FILE` writes a scores file")
    _, metadata = read_header(path)
    if not metadata or metadata.get("reapc_scores") != FORMAT:
        raise ReapcError(f"{path}: not a scores file of this version (reapc_scores {FORMAT} expected)")
    return Scores(json.loads(metadata["header"]), load_file(path))


def merge(parts: list[Scores]) -> Scores:
    """Adds observations of one model: sums and counts add, maxima are the larger."""
    first = parts[0]
    for other in parts[1:]:
        for key in ("digest", "num_experts", "top_k", "layers", "dtype"):
            if other.header[key] != first.header[key]:
                raise ReapcError(
                    f"these scores do not belong together: {key} is {first.header[key]!r} and {other.header[key]!r}",
                    hint="merge only observations of the same checkpoint",
                )
        if set(other.arrays) != set(first.arrays):
            raise ReapcError("these scores do not belong together: one has second moments, another has not")
    arrays = {}
    for name in first.arrays:
        stack = [part.arrays[name] for part in parts]
        arrays[name] = np.max(stack, axis=0) if name.endswith("max_activation") else np.sum(stack, axis=0)
    header = {
        **first.header,
        "tokens": sum(part.header["tokens"] for part in parts),
        "calibration": [source for part in parts for source in part.header["calibration"]],
    }
    return Scores(header, arrays)
