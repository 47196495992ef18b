"""One streamed pass of the original that looks at every candidate's masks: for each layer with experts, the greedy
candidate is made from one sample of tokens, and the error of every candidate is measured on other sequences.

The error of a layer is the squared difference between what its experts give with all of them and with only those kept,
on the original's hidden states. Resumable: a finished layer leaves ``layer-N.json`` beside the hidden states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reapc.checkpoint.atomic import claim_folder, write_text
from reapc.choice.greedy import greedy_kept
from reapc.choice.pruned_layer import PrunedLayers
from reapc.choice.routing import Block, MaskedRouter, Seen, coefficients, watched
from reapc.errors import CannotBeDone
from reapc.progress import Progress
from reapc.prune.heal_sides import RoutedTotal
from reapc.stream.experts import ScaledInputExperts
from reapc.stream.model import Forward, LoadedLayer, StreamedModel
from reapc.stream.run import HiddenStates, compute_batch, ids_of, states_of
from reapc.stream.tokens import Batch, Tokens

GREEDY = "greedy"
GREEDY_TOKENS = 4096  # of the sample that greedy removal is computed from, at most
WIDTH = 256  # channels of an expert's output in that sample: wider ones are projected at random
_SAMPLE_BYTES = 512 << 20  # of all experts' outputs in that sample, at most
TOKENS_PER_BATCH = 2048
_NEGLIGIBLE = 1e-5  # a relative difference of two gate weights that is rounding
_OWN_FILE = re.compile(r"^(identity|layer-\d+\.json)(\.partial)?$|^hidden-[a-z-]+-[01]\.bin$")


@dataclass(frozen=True)
class SurveyedLayer:
    """``errors``: squared error of each candidate, by sequence; ``norms``: squared norm of what the experts give, by
    sequence. ``greedy``: the experts that greedy removal leaves, None where ``left_out`` says why there are none."""

    layer: int
    norms: list[float]
    errors: dict[str, list[float]]
    greedy: list[int] | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked of every layer: the experts that each candidate keeps, by layer; how many those are; the groups
    that keep equal numbers; and the experts that must stay."""

    candidates: Mapping[str, Mapping[int, list[int]]]
    kept: int
    groups: int = 1
    dissolve_groups: bool = False
    protected: Mapping[int, list[int]] = field(default_factory=dict)
    values: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    def identity(self) -> list[object]:
        named = {name: {str(i): kept for i, kept in found.items()} for name, found in self.candidates.items()}
        return [named, self.kept, self.groups, self.dissolve_groups, {str(i): e for i, e in self.protected.items()}]


class Survey:
    """``sample``: sequences whose tokens greedy removal is computed from; ``select``: others, which errors are measured
    on. ``run`` returns what was found of every layer with experts."""

    def __init__(
        self,
        model: StreamedModel,
        question: Question,
        pruner: PrunedLayers,
        sample: Tokens,
        select: Tokens,
        work: Path,
        progress: Progress,
    ) -> None:
        self.model, self.question, self.pruner = model, question, pruner
        self.work, self.progress = work, progress
        identity = [model.checkpoint.digest, sample.digest, select.digest, str(model.dtype), question.identity()]
        claim_folder(work, json.dumps(identity), _OWN_FILE)
        self.sample = states_of(model, sample, work, "sample")
        self.select = states_of(model, select, work, "select")
        experts, width = model.spec.num_experts, min(WIDTH, model.spec.hidden_size)
        wanted = max(1, min(GREEDY_TOKENS, _SAMPLE_BYTES // (4 * experts * width)))
        real = np.flatnonzero(sample.mask)
        # of the whole sample, in its order: so every batch knows its share
        self._places = np.sort(np.random.default_rng(0).permutation(real)[:wanted])
        self._left_out = ""

    def run(self) -> list[SurveyedLayer]:
        layers = self.model.spec.num_layers
        start = 0
        while self._report(start).is_file():
            start += 1
        if start:
            self.progress.log(f"choice: {start} of {layers} layers were looked at before; going on")
        tokens = sum(batch.tokens for _, batch in self._batches())
        with self.progress.task("choice: layers", tokens * (layers - start), "tokens x layers") as advance:
            for states, batch in self._batches() if not start else ():
                states.write(0, batch, self.model.embed(ids_of(states.tokens, batch)))
            for index in range(start, layers):
                done = self._layer(index)
                for states in (self.sample, self.select):
                    states.flush()
                write_text(self._report(index), json.dumps(asdict(done) if done else None))
                advance(tokens)
        found = [json.loads(self._report(index).read_text()) for index in range(layers)]
        return [SurveyedLayer(**entry) for entry in found if entry]

    def _report(self, index: int) -> Path:
        return self.work / f"layer-{index}.json"

    def _batches(self) -> Iterator[tuple[HiddenStates, Batch]]:
        for states in (self.sample, self.select):
            for batch in states.tokens.batches(TOKENS_PER_BATCH):
                yield states, batch

    def _layer(self, index: int) -> SurveyedLayer | None:
        layer = self.model.load(index)
        with self.model.computing(layer) as forward:
            if layer.experts is None:
                for states, batch in self._batches():
                    compute_batch(self.model, forward, index, states, batch, None)
                return None
            first = next(iter(self.question.candidates.values()))[index]
            greedy, left_out = self._greedy(layer, forward, self.pruner.layer(layer, first), first)
            masks = {name: kept[index] for name, kept in self.question.candidates.items()}
            if greedy is not None:
                masks[GREEDY] = greedy
            norms, errors = self._errors(layer, forward, masks)
            layer.finish()
        return SurveyedLayer(index, norms, errors, greedy, left_out)

    def _greedy(
        self, layer: LoadedLayer, forward: Forward, pruned: LoadedLayer, kept: list[int]
    ) -> tuple[list[int] | None, str]:
        """What greedy removal leaves, or the reason why there is no such candidate. Runs the sample through the layer
        in any case. ``pruned``: the layer with only ``kept``, which masking is held against."""
        assert layer.experts is not None
        block, inputs, hidden = Block(layer), [], []
        tokens = self.sample.tokens
        with watched(block) as seen:
            for batch in tokens.batches(TOKENS_PER_BATCH):
                compute_batch(self.model, forward, layer.index, self.sample, batch, None)
                mine = self._mine(batch).to(self.model.device)
                if isinstance(layer.experts, ScaledInputExperts) or not len(mine):
                    continue
                inputs.append(seen.inputs[mine])
                given = [*seen.args, *seen.kwargs.values()][0]
                hidden.append(given.reshape(-1, given.shape[-1])[mine] if isinstance(given, torch.Tensor) else given)
        if isinstance(layer.experts, ScaledInputExperts):
            return None, "gate weights multiply the experts' inputs"
        if block.path == "" or len([*seen.args, *seen.kwargs.values()]) != 1:
            return None, "its block takes more than hidden states"
        try:
            router = MaskedRouter(layer, pruned, torch.cat(hidden))
            router.check(pruned, kept)
            protected = tuple(self.question.protected.get(layer.index, ()))
            outputs = self._outputs(layer, torch.cat(inputs))
            with torch.inference_mode():
                kept = greedy_kept(outputs, router, self.question.kept, self.question.groups, protected)
                return kept, ""
        except CannotBeDone as error:
            return None, str(error)

    def _mine(self, batch: Batch) -> torch.Tensor:
        """Which of the batch's tokens are in the sample of greedy removal."""
        row, column = np.divmod(self._places, self.sample.tokens.length)
        here = (row >= batch.rows.start) & (row < batch.rows.stop)
        return torch.from_numpy((row[here] - batch.rows.start) * batch.length + column[here])

    def _outputs(self, layer: LoadedLayer, inputs: torch.Tensor) -> torch.Tensor:
        """Every expert's output on ``inputs``, (tokens, experts, width) float32: as it is, or projected at random onto
        ``WIDTH`` channels, which keeps squared lengths on average (Johnson-Lindenstrauss)."""
        assert layer.experts is not None
        count, projection, result = layer.experts.num_experts, None, None
        with torch.inference_mode(), closing(layer.experts.store.each(range(count))) as parts:
            for expert in range(count):
                _, output = layer.experts.compute(next(parts), inputs)
                output = output.float()
                if result is None:
                    if output.shape[1] > WIDTH:
                        random = torch.Generator().manual_seed(layer.index)
                        projection = torch.randn(output.shape[1], WIDTH, generator=random).to(output) / WIDTH**0.5
                    result = output.new_empty(len(inputs), count, min(WIDTH, output.shape[1]))
                result[:, expert] = output if projection is None else output @ projection
        assert result is not None
        return result

    def _errors(
        self, layer: LoadedLayer, forward: Forward, masks: Mapping[str, list[int]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Squared norms of the original's routed sum, and every mask's squared errors, by sequence. Runs ``select``
        through the layer."""
        tokens = self.select.tokens
        pruned = {name: (self.pruner.layer(layer, kept), kept) for name, kept in masks.items()}
        norms, errors = np.zeros(tokens.sequences), {name: np.zeros(tokens.sequences) for name in masks}
        with watched(Block(layer)) as seen:
            for batch in tokens.batches(TOKENS_PER_BATCH):
                compute_batch(self.model, forward, layer.index, self.select, batch, None)
                real = torch.from_numpy(tokens.mask[batch.rows, : batch.length].reshape(-1)).to(self.model.device)
                rows, each = batch.rows, batch.rows.stop - batch.rows.start

                def by_sequence(values: torch.Tensor, each: int = each) -> NDArray[np.float64]:
                    sums: NDArray[np.float64] = (
                        values.double().square().sum(dim=1).reshape(each, -1).sum(dim=1).cpu().numpy()
                    )
                    return sums

                norms[rows] = by_sequence(torch.where(real[:, None], seen.total, 0))
                for name, difference in self._differences(layer, seen, pruned, real).items():
                    errors[name][rows] = by_sequence(difference)
        return norms.tolist(), {name: values.tolist() for name, values in errors.items()}

    def _differences(
        self, layer: LoadedLayer, seen: Seen, pruned: Mapping[str, tuple[LoadedLayer, list[int]]], real: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What each pruned layer's experts give less than the whole one's, (tokens, in). Every expert is computed once,
        on the tokens for which any mask changes its coefficient."""
        assert layer.experts is not None
        if seen.index is None or seen.weights is None:
            return {name: self._given(one, seen, real) - torch.where(real[:, None], seen.total, 0)
                    for name, (one, _) in pruned.items()}  # fmt: skip
        count = layer.experts.num_experts
        before = coefficients(seen.index, seen.weights, count)
        changes = []
        for one, kept in pruned.values():
            index, weights = Block(one).handed(*seen.args, **seen.kwargs)
            after = coefficients(torch.tensor(kept, device=index.device)[index], weights, count)
            change = after - before
            change[change.abs() <= _NEGLIGIBLE * (after.abs() + before.abs())] = 0
            changes.append(torch.where(real[:, None], change, 0))
        stacked = torch.stack(changes)  # (candidates, tokens, experts)
        touched = (stacked != 0).any(dim=0)
        hit = touched.any(dim=0).nonzero()[:, 0].tolist()
        found = [torch.zeros(len(real), seen.total.shape[-1], device=real.device) for _ in changes]
        with torch.inference_mode(), closing(layer.experts.store.each(hit)) as parts:
            for expert in hit:
                part = next(parts)
                rows = touched[:, expert].nonzero()[:, 0]
                output = layer.experts.compute(part, seen.inputs[rows])[1].float()
                for number, total in enumerate(found):
                    own = stacked[number, rows, expert]
                    total.index_add_(0, rows, output * own[:, None])
        return dict(zip(pruned, found, strict=True))

    def _given(self, one: LoadedLayer, seen: Seen, real: torch.Tensor) -> torch.Tensor:
        """What the experts of a pruned layer give, by running them (Llama-4)."""
        block = Block(one)
        routed = RoutedTotal(torch.zeros(seen.total.shape, device=real.device))
        block.experts.observer, block.experts.valid = routed, real
        with torch.inference_mode():
            block.module(*seen.args, **seen.kwargs)
        return routed.total
