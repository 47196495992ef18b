"""End KL of several sets of masks in one streamed pass: the original and every finalist side by side, each layer loaded
once. Nothing is written but hidden states. Resumable at a layer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reapc.checkpoint.atomic import claim_folder, write_text
from reapc.choice.pruned_layer import PrunedLayers
from reapc.observe.reference import head_parts
from reapc.progress import Progress
from reapc.stream.model import LoadedLayer, StreamedModel
from reapc.stream.run import HiddenStates, compute_batch, ids_of, states_of
from reapc.stream.tokens import Tokens

TOKENS_PER_BATCH = 2048
_HEAD_TOKENS = 2048
_OWN_FILE = re.compile(r"^(identity|layers)(\.partial)?$|^hidden-[a-z-]+(-carried)?-[01]\.bin$")


# From a layer of the original to one of the variant, and the model that computes it.
Variant = Callable[[LoadedLayer], tuple[StreamedModel, LoadedLayer]]


@dataclass(frozen=True)
class EndFigures:
    """Sums by sequence: ``kl``, nats over real tokens; ``agree``: tokens where both put the same one first."""

    kl: NDArray[np.float64]
    agree: NDArray[np.float64]


def end_figures(
    model: StreamedModel,
    pruner: PrunedLayers,
    finalists: Mapping[str, Mapping[int, list[int]]],
    tokens: Tokens,
    work: Path,
    progress: Progress,
) -> dict[str, EndFigures]:
    """KL(original || finalist) and top-1 agreement of each of ``finalists`` (experts kept, by layer), exact over the
    whole vocabulary. ``work`` is continued from when the same call was interrupted."""
    kept = {name: {str(i): experts for i, experts in found.items()} for name, found in finalists.items()}

    def variant(masks: Mapping[int, list[int]]) -> Variant:
        return lambda whole: (model, pruner.layer(whole, masks.get(whole.index, [])))

    variants = {name: variant(masks) for name, masks in finalists.items()}
    return figures_of(model, variants, json.dumps(kept), tokens, work, progress, "choice: finalists")


def figures_of(
    model: StreamedModel,
    variants: Mapping[str, Variant],
    identity: str,
    tokens: Tokens,
    work: Path,
    progress: Progress,
    what: str,
) -> dict[str, EndFigures]:
    """The same of any variants of the layers; ``identity`` says what they are."""
    claim_folder(work, json.dumps([model.checkpoint.digest, tokens.digest, str(model.dtype), identity]), _OWN_FILE)
    names = ["original", *variants]
    states = [states_of(model, tokens, work, f"finalist-{chr(ord('a') + i)}") for i in range(len(names))]
    batches = list(tokens.batches(TOKENS_PER_BATCH))
    layers, stamp = model.spec.num_layers, work / "layers"
    start = int(stamp.read_text()) if stamp.is_file() else 0
    if start:
        progress.log(f"{what}: {start} of {layers} layers were passed before; going on")
    each = sum(batch.tokens for batch in batches)
    with progress.task(what, each * len(names) * (layers - start), "tokens x layers") as advance:
        for batch in batches if not start else ():
            embedded = model.embed(ids_of(tokens, batch))
            for own in states:
                own.write(0, batch, embedded)
        for index in range(start, layers):
            whole = model.load(index)
            for name, own in zip(names, states, strict=True):
                computed, layer = (model, whole) if name == "original" else variants[name](whole)
                with computed.computing(layer) as forward:
                    for batch in batches:
                        compute_batch(computed, forward, index, own, batch, None)
                        advance(batch.tokens)
                del layer, forward
                own.flush()
            whole.finish()
            write_text(stamp, str(index + 1))
    found = _compared(model, states, tokens)
    return dict(zip(variants, found, strict=True))


def _compared(model: StreamedModel, states: list[HiddenStates], tokens: Tokens) -> list[EndFigures]:
    """The figures of all but the first of ``states`` against it; the head takes all of them together."""
    kl, agree = (np.zeros((len(states) - 1, tokens.sequences)) for _ in range(2))
    at_once, rows = head_parts(model)
    at_once = max(1, min(at_once, _HEAD_TOKENS) // len(states))
    for row in range(tokens.sequences):
        real = np.flatnonzero(tokens.mask[row])
        hidden = [own.read(model.spec.num_layers, slice(row, row + 1))[0] for own in states]
        for start in range(0, len(real), at_once):
            some = torch.from_numpy(real[start : start + at_once])
            together = torch.cat([own[some] for own in hidden]).to(model.device, model.dtype)
            with torch.inference_mode():
                original, *others = model.head(together, rows).chunk(len(hidden))
                first, probabilities = original.argmax(dim=1), original.exp()
                for number, other in enumerate(others):
                    kl[number, row] += float((probabilities * (original - other)).sum(dtype=torch.float64))
                    agree[number, row] += int((other.argmax(dim=1) == first).sum())
    return [EndFigures(a, b) for a, b in zip(kl, agree, strict=True)]
