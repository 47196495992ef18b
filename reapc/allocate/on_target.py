"""An allocation for a named target: what the planner chooses uniformly there gives the engine, the layout of devices
and their budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reapc.allocate.allocation import Damages, decide
from reapc.allocate.checkpoints import (
    decide_methods,
    measured_checkpoints,
    prior_checkpoints,
    prober_of_checkpoint,
    within,
)
from reapc.allocate.in_build import rounds
from reapc.allocate.masks import by_criterion
from reapc.allocate.record import allocation_json
from reapc.allocate.sensitivity import Prober, measured_caches
from reapc.arch import ModelSpec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.observe.scores import Scores
from reapc.plan import Plan
from reapc.planner.cards import Cards
from reapc.planner.devices import Devices
from reapc.planner.fit import Wish, question_of
from reapc.planner.question import Question, auto_pairs, kept_counts, native_format
from reapc.planner.search import answer, served_counts
from reapc.planner.tensor_groups import FileParts
from reapc.progress import Progress
from reapc.prune.criteria import groups_of
from reapc.recipe import ServeSection
from reapc.stream.tokens import read_tokens
from reapc.target import Target


@dataclass(frozen=True)
class Observed:
    """What there is to measure with: ``tokens`` for KL, at most ``sequences`` of them; ``work`` keeps the probes."""

    checkpoint: Checkpoint
    scores: Scores
    tokens: Path | None
    sequences: int
    work: Path
    progress: Progress


class OnTarget:
    """The uniform plan of a model on a target, and what an allocation may spend there. CannotBeDone where nothing fits,
    or where the whole model fits in 16 bit."""

    def __init__(
        self, model: str, spec: ModelSpec, target: Target, serve: ServeSection, max_ratio: float, dissolve: bool
    ) -> None:
        asked = question_of(model, spec, Wish(target, serve, max_ratio=max_ratio))
        self.question: Question = replace(
            asked,
            pairs=auto_pairs(spec, serve.engine, buildable=True),
            counts=kept_counts(spec, max_ratio=max_ratio, dissolve_groups=dissolve),
        )
        self.dissolve = dissolve
        self.plan: Plan = answer(self.question)
        counts = served_counts(self.plan.chosen.engine, spec, self.question.counts)
        self.question = replace(self.question, counts=counts)
        if self.engine == "vllm" and (published := native_format(spec)) is not None:
            raise CannotBeDone(
                f"{model} is published in {published}: widths are allocated of a checkpoint in 16 bit",
                hint="take its 16 bit original, or --engine llama.cpp",
            )
        if not rounds(self.plan):
            raise CannotBeDone(
                f"{model} fits {target.name} in {self.plan.chosen.format} with {self.plan.chosen.experts_kept} "
                "experts: there is nothing to allocate",
                hint="a smaller target, more context, or --engine",
            )

    @property
    def engine(self) -> str:
        """The engine that the uniform plan serves with."""
        return self.plan.chosen.engine

    def for_vllm(
        self, facts: dict[str, Any], observed: Observed | None, method: str, criterion: str, segments: int, tries: int
    ) -> dict[str, Any]:
        """The allocation of a checkpoint for vLLM, as in its file. ``method``: as in a recipe's quantize.method."""
        spec, counts = self.question.spec, self.question.counts
        cards = Cards(self.plan, self.question)
        every = cards.methods(method)
        prober = None
        if observed is None:
            found = prior_checkpoints(spec, every, counts)
        else:
            if observed.tokens is not None:
                text = read_tokens(observed.tokens, spec.vocab_size).evenly(observed.sequences)
                prober = prober_of_checkpoint(
                    observed.checkpoint, every, text, observed.work, observed.progress, dissolve=self.dissolve,
                    scores=observed.scores,
                )  # fmt: skip
            kept = by_criterion(observed.scores, criterion, groups_of(spec, self.dissolve))
            found = measured_checkpoints(
                observed.checkpoint, every, observed.scores, counts, kept, observed.progress, prober=prober,
                segments=segments,
            )  # fmt: skip
        best, decided, methods = decide_methods(found, within(cards), prober, tries)
        return allocation_json(best, spec, None, decided, {**facts, **self._facts(), "methods": methods})

    def for_llamacpp(
        self, facts: dict[str, Any], damages: Damages, prober: Prober | None, tries: int
    ) -> dict[str, Any]:
        """The allocation of a GGUF file, as in its file."""
        spec = self.question.spec
        devices = Devices(self.plan, spec, self.question.target, self.question.serve)
        parts = damages.parts
        assert isinstance(parts, FileParts)
        losses = devices.prior_losses() if prober is None else measured_caches(prober, devices.caches)
        decided = decide(damages, lambda made: devices.budgets(made.problem(0), parts, losses), prober, tries)
        return allocation_json(damages, spec, None, decided, {**facts, **self._facts(), "kv_losses": losses})

    def _facts(self) -> dict[str, Any]:
        chosen = self.plan.chosen
        uniform = {
            "format": chosen.format, "experts": chosen.experts_kept, "kv_dtype": chosen.kv_dtype,
            "predicted_kl": chosen.predicted_loss,
        }  # fmt: skip
        return {"target": self.question.target.name, "uniform": uniform}
