"""What an allocation is expected to need in a build, in what the build's estimate knows the rates of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reapc.allocate.in_build import SEQUENCES
from reapc.allocate.rounding import SAMPLE_ROWS
from reapc.allocate.sensitivity import probe_sets, probed_counts
from reapc.arch import ModelSpec
from reapc.checkpoint.reader import Checkpoint
from reapc.formats.weights import LAYER_PARTS
from reapc.observe.observe import disk_bytes
from reapc.plan import Plan
from reapc.planner.tensor_groups import file_parts
from reapc.stream.tokens import Tokens

_MIXES = 3  # chosen ones that are measured
_CACHES = 2  # types of KV cache, at most
# Weights per second in one thread, on the demo model: ggml's types (the small ones search), and integers or FP8.
_GGML_WEIGHTS_PER_SECOND = 1.2e6
_NEAREST_WEIGHTS_PER_SECOND = 100e6


class Needs(NamedTuple):
    """``tokens`` through all layers of the unpruned model; ``copied_bytes`` read or written; ``rounding`` seconds;
    ``disk_bytes`` beside everything else that a build keeps."""

    tokens: int
    copied_bytes: int
    rounding: float
    disk_bytes: int


def allocation_needs(checkpoint: Checkpoint, plan: Plan, calibration: Tokens, counts: Sequence[int]) -> Needs:
    """Of the engine that ``plan`` serves with. ``counts``: of experts, that are compared."""
    spec, text = checkpoint.spec, calibration.evenly(SEQUENCES)
    prunes = len(probed_counts(spec.num_experts, counts))
    whole = 2 * spec.parameters
    if plan.chosen.engine == "llama.cpp":
        probes = len(probe_sets(file_parts(spec).groups)) + prunes + _MIXES
        # the model as a GGUF file in 16 bit; of each probe a file as large, or a pruned one beside a quantized one
        return Needs(
            (1 + probes + _CACHES) * text.count,
            (2 + 2 * probes) * whole,
            _sampled_weights(spec) / _GGML_WEIGHTS_PER_SECOND,
            2 * whole + plan.chosen.file_bytes,
        )
    roles = {group.role for layer in spec.layers for group in layer.kind.tensors if group.linears}
    classes = len(roles & set(LAYER_PARTS.values()))
    variants = classes + prunes
    passes = 1 + variants + 2 * _MIXES  # each reads the model once for itself, and once for every variant
    return Needs(
        passes * text.count,
        (1 + passes) * checkpoint.bytes,
        (1 + _MIXES) * spec.parameters / _NEAREST_WEIGHTS_PER_SECOND,
        (1 + variants) * disk_bytes(checkpoint, text, None),
    )


def _sampled_weights(spec: ModelSpec) -> int:
    """Weights that ggml rounds: some rows of every matrix, in every type."""
    total = 0
    for group in file_parts(spec).groups:
        for tensor in group.tensors:
            rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
            matrices = tensor.before * (spec.num_experts if tensor.experts else 1)
            total += matrices * -(-rows // max(1, rows // SAMPLE_ROWS)) * tensor.columns * len(group.types)
    return total
