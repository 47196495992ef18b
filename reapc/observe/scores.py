"""The scores file: sums of one or more observations of a model, in one safetensors file that can be shared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reapc.checkpoint.atomic import atomic_path
from reapc.errors import ReapcError
from reapc.observe.accumulate import PARTS, ROUTING

FORMAT = "2"
_READ = ("1", "2")  # 1: one domain, one part, no axes for them


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name that are read or computed when they are asked for: second moments can exceed the memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        self.shapes = shapes
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _own_axes(name: str) -> int:
    """How many axes an array has beside those of domains and parts."""
    return 2 if name.startswith("second_moment.") and ".experts." in name else 1


def is_maximum(name: str) -> bool:
    """Whether observations of this name combine as the larger one, not as a sum."""
    return name.endswith(".max_activation")


@dataclass(frozen=True)
class Scores:
    """``arrays`` by name (see ``LayerSums``): routing sums ``layers.N.NAME`` (domains, parts, experts),
    ``second_moment.`` (domains, experts, in) of experts and (domains, in) of others, ``second_moment_count.``
    (domains, 1). ``header``: model, digest, router_digest, num_experts, top_k, layers, tokens, calibration, dtype,
    domains (names), parts and sequences (real tokens, and sequences, by domain and part), observed (which tokens, and
    which shards of them)."""

    header: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    @property
    def layers(self) -> list[int]:
        """The decoder layers that have experts."""
        return [int(i) for i in self.header["layers"]]

    @property
    def domains(self) -> list[str]:
        return [str(name) for name in self.header.get("domains", ["all"])]

    @property
    def domain_tokens(self) -> np.ndarray:
        """(domains,) real tokens of each."""
        parts = self.header.get("parts")
        return np.asarray(parts, np.float64).sum(axis=1) if parts else np.array([float(self.header["tokens"])])

    def routing(self, layer: int, name: str) -> np.ndarray:
        """(domains, parts, experts)"""
        values = self.arrays[f"layers.{layer}.{name}"]
        return values if values.ndim == 3 else values[None, None]

    def total(self, name: str) -> np.ndarray:
        """The array of all domains and parts together, without their axes; KeyError where there is none."""
        values = self.arrays[name]
        axes = tuple(range(values.ndim - _own_axes(name)))
        combined: np.ndarray = values.max(axis=axes) if is_maximum(name) else values.sum(axis=axes)
        return combined

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Routing sums of one layer, each (experts,), with the means ``reap`` and ``ean``.

        An expert that was never routed to has 0 in every one of them."""
        return with_means({name: self.total(f"layers.{index}.{name}") for name in ROUTING})

    def never_routed(self) -> dict[int, list[int]]:
        """Experts without a single token, by layer."""
        found = {i: np.flatnonzero(self.layer(i)["routed_tokens"] == 0).tolist() for i in self.layers}
        return {i: experts for i, experts in found.items() if experts}

    def save(self, path: Path) -> None:
        """Writes the file atomically, an array at a time."""
        import torch

        from reapc.checkpoint.streamed_writer import Slot, write_streamed

        slots = [Slot(name, "F64", expanded_shape(self, name)) for name in self.arrays]
        tensors = (torch.from_numpy(np.ascontiguousarray(expanded(self, name), np.float64)) for name in self.arrays)
        with atomic_path(path) as partial:
            write_streamed(partial, slots, tensors, metadata_of(self.header))

    def to_json(self) -> dict[str, Any]:
        """What ``reapc scores show --json`` prints."""
        layers = {}
        for index in self.layers:
            layer = self.layer(index)
            layers[str(index)] = {name: layer[name].tolist() for name in (*ROUTING, "reap", "ean")}
            layers[str(index)]["routed_tokens"] = layer["routed_tokens"].astype(int).tolist()
        never = {str(i): experts for i, experts in self.never_routed().items()}
        return {**self.header, "never_routed": never, "layers": layers}


def with_means(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Routing sums (..., experts) by name, and the means per routed token: ``reap``, ``ean``."""
    count = np.maximum(sums["routed_tokens"], 1e-300)
    return sums | {"reap": sums["gate_norm_sum"] / count, "ean": sums["norm_sum"] / count}


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a scores file."""
    return {"reapc_scores": FORMAT, "header": json.dumps(header)}


def load_scores(path: Path) -> Scores:
    """Scores from ``path``, arrays read when they are asked for; ReapcError when it is not a scores file."""
    from reapc.checkpoint.safetensors_file import read_header

    if not path.is_file():
        raise ReapcError(f"{path}: no such file", hint="`reapc observe MODEL --out FILE` writes a scores file")
    entries, metadata = read_header(path)
    if not metadata or metadata.get("reapc_scores") not in _READ:
        raise ReapcError(f"{path}: not a scores file of this version (reapc_scores {' or '.join(_READ)} expected)")

    def read(name: str) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            values: np.ndarray = file.get_tensor(name)
            return values

    return Scores(json.loads(metadata["header"]), LazyArrays({n: e.shape for n, e in entries.items()}, read))


def expanded_shape(scores: Scores, name: str) -> tuple[int, ...]:
    """The shape of ``expanded``, without reading it."""
    arrays = scores.arrays
    shape = tuple(arrays.shapes[name] if isinstance(arrays, LazyArrays) else arrays[name].shape)
    if len(shape) > _own_axes(name):
        return shape
    return (1, *shape) if name.startswith("second_moment") else (1, PARTS, *shape)


def expanded(scores: Scores, name: str) -> np.ndarray:
    """The array with its axes of domains and parts, whichever format it was read from."""
    values = scores.arrays[name]
    if values.ndim > _own_axes(name):
        return values
    if name.startswith("second_moment"):
        return values[None]
    result = np.zeros((1, PARTS, *values.shape))
    result[0, 0] = values
    return result
