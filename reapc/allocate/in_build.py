"""The allocation inside a build: measured on the calibration text, under the budgets of the plan's devices, as a cached
stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reapc import __version__
from reapc.allocate.allocation import decide, measured
from reapc.allocate.checkpoints import (
    decide_methods,
    measured_checkpoints,
    prober_of_checkpoint,
    within,
)
from reapc.allocate.masks import Kept, by_criterion, by_measuring
from reapc.allocate.record import allocation_json
from reapc.allocate.sensitivity import Prober, measured_caches, probed_counts
from reapc.checkpoint.atomic import remove
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.samples import samples_of
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.formats.gguf_types import UNQUANTIZED
from reapc.formats.weights import WeightFormat
from reapc.observe.scores import Scores
from reapc.passes import Passes, Staged
from reapc.plan import Plan
from reapc.planner.cards import Cards
from reapc.planner.checkpoint_units import CheckpointParts
from reapc.planner.devices import Devices, Taken, cache_name
from reapc.planner.question import Question, from_recipe
from reapc.planner.search import served_counts
from reapc.planner.tensor_groups import FileParts, file_parts
from reapc.prune.criteria import groups_of
from reapc.quantize import checkpoint as quantizer
from reapc.quantize.imatrix import entries_of
from reapc.recipe import Recipe
from reapc.stages import digest_of
from reapc.stream.tokens import Tokens
from reapc.toolchain import find_llamacpp

SEQUENCES = 32  # of the calibration text, to measure KL on


def allocates(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether a build allocates. CannotBeDone for a checkpoint that is quantized: its weights have no errors to add."""
    if not recipe.quantize.allocate:
        return False
    if checkpoint.quantization is not None:
        raise CannotBeDone(
            f"{checkpoint.folder}: quantize.allocate = true needs a checkpoint in 16 bit",
            hint="set quantize.allocate = false",
        )
    return True


def rounds(plan: Plan) -> bool:
    """Whether the plan's format leaves anything to allocate: not where all of it fits in 16 bit."""
    if plan.chosen.engine == "llama.cpp":
        return plan.chosen.format not in UNQUANTIZED
    fmt = weights.parse(plan.chosen.format)
    return fmt is not None and fmt.quantized


def allocated_format(found: dict[str, Any]) -> WeightFormat | None:
    """The format of an allocation for vLLM; None where nothing is quantized."""
    fmt = weights.parse(found["format"])
    return fmt if fmt is not None and fmt.quantized else None


@dataclass(frozen=True)
class _Wanted:
    """What both engines' allocations are made from."""

    recipe: Recipe
    plan: Plan
    checkpoint: Checkpoint
    scores: Scores
    text: Tokens
    question: Question
    kept: Callable[[int], Kept]
    passes: Passes

    @property
    def facts(self) -> dict[str, Any]:
        measured = {"measured_choice": True} if self.recipe.prune.method == "auto" else {}
        return {
            "model": self.recipe.model.source, "digest": self.checkpoint.digest, "criterion": self.plan.criterion,
            **measured,
        }  # fmt: skip


def allocate_build(
    recipe: Recipe, plan: Plan, checkpoint: Checkpoint, scores: Scores, calibration: Tokens, passes: Passes
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the allocation's count, KV type and bytes, and the allocation as in its file."""
    question = from_recipe(recipe, checkpoint.spec, recipe.model.source, buildable=True)
    question = replace(question, counts=served_counts(plan.chosen.engine, checkpoint.spec, question.counts))
    text = calibration.evenly(SEQUENCES)
    kept = _kept(recipe, plan, checkpoint, scores, calibration, passes, question.counts)
    wanted = _Wanted(recipe, plan, checkpoint, scores, text, question, kept, passes)
    depends = {
        "scores": digest_of([scores.to_json(), checkpoint.digest]),
        "calibration": calibration.digest,
        "plan": [plan.chosen.engine, plan.chosen.placement.model_dump(mode="json")],
        "counts": question.counts,
        "criterion": [plan.criterion, recipe.prune.method, passes.seed],
        "dissolve_groups": recipe.prune.dissolve_groups,
        "serve": recipe.serve.model_dump(mode="json", include={"context", "concurrency", "kv_cache"}),
        "reapc": __version__,
    }
    if plan.chosen.engine == "vllm":
        return _for_vllm(wanted, depends)
    return _for_llamacpp(wanted, depends)


def _kept(
    recipe: Recipe, plan: Plan, checkpoint: Checkpoint, scores: Scores, calibration: Tokens, passes: Passes,
    counts: tuple[int, ...],
) -> Callable[[int], Kept]:  # fmt: skip
    """The experts that stay at a count: with method "auto" what measuring chooses at the counts that are probed."""
    dissolve = recipe.prune.dissolve_groups
    groups, total = groups_of(checkpoint.spec, dissolve), checkpoint.spec.num_experts
    asked = probed_counts(total, counts)
    if recipe.prune.method != "auto" or not asked:
        return by_criterion(scores, plan.criterion, groups)
    try:
        samples_of(calibration, passes.seed)
    except ReapcError:  # the build says that it chooses by the plan's criterion then
        return by_criterion(scores, plan.criterion, groups)
    return by_measuring(scores, groups, asked, lambda count: passes.choose(scores, count, dissolve))


def _for_llamacpp(wanted: _Wanted, depends: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    spec, passes, recipe = wanted.checkpoint.spec, wanted.passes, wanted.recipe
    devices = Devices(wanted.plan, spec, recipe.target, recipe.serve)
    base: Staged = passes.convert(passes.source, "bf16")

    def work(folder: Path, scratch: Path) -> None:
        prober = Prober(
            base.path, wanted.text, entries_of(wanted.scores, spec), scratch, passes.progress, os.cpu_count() or 1
        )
        damages = measured(
            spec, base.path, wanted.scores, wanted.question.counts, wanted.plan.criterion, passes.progress,
            prober=prober, kept=wanted.kept,
        )  # fmt: skip
        parts = damages.parts
        assert isinstance(parts, FileParts)
        losses = measured_caches(prober, devices.caches)
        decided = decide(damages, lambda made: devices.budgets(made.problem(0), parts, losses), prober)
        found = allocation_json(damages, spec, None, decided, {**wanted.facts, "kv_losses": losses})
        (folder / "allocation.json").write_text(json.dumps(found, indent=2) + "\n")
        remove(scratch)

    folder, _ = passes.cache.run("allocate", {**depends, "base": base.key, "tools": find_llamacpp().version}, work)
    found = json.loads((folder / "allocation.json").read_text())
    _say(wanted, found)
    return devices.planned(wanted.plan, spec, file_parts(spec), _taken(found)), found


def _for_vllm(wanted: _Wanted, depends: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    passes, recipe = wanted.passes, wanted.recipe
    cards = Cards(wanted.plan, wanted.question)
    method = recipe.quantize.writer
    every = [parts for parts in cards.methods(method) if _installed(parts, method)]
    if not every:
        quantizer.versions(quantizer.writer_for(_format_of(cards.methods(method)[0]), method))  # says what is missing

    def work(folder: Path, scratch: Path) -> None:
        prober = prober_of_checkpoint(
            wanted.checkpoint, every, wanted.text, scratch, passes.progress,
            dissolve=recipe.prune.dissolve_groups, scores=wanted.scores,
        )  # fmt: skip
        damages = measured_checkpoints(
            wanted.checkpoint, every, wanted.scores, wanted.question.counts, wanted.kept, passes.progress,
            prober=prober,
        )  # fmt: skip
        best, decided, methods = decide_methods(damages, within(cards), prober)
        found = allocation_json(best, wanted.checkpoint.spec, None, decided, {**wanted.facts, "methods": methods})
        (folder / "allocation.json").write_text(json.dumps(found, indent=2) + "\n")
        remove(scratch)

    options = {parts.method: {unit.name: unit.types for unit in parts.groups} for parts in every}
    folder, _ = passes.cache.run("allocate", {**depends, "options": digest_of(options)}, work)
    found = json.loads((folder / "allocation.json").read_text())
    parts = next(parts for parts in every if parts.method == found["method"])
    _say(wanted, found)
    return cards.planned(wanted.plan, parts, _taken(found)), found


def _installed(parts: CheckpointParts, method: str) -> bool:
    """Whether the packages of its writer are there."""
    try:
        quantizer.versions(quantizer.writer_for(_format_of(parts), method))
    except CannotBeDone:
        return False
    return True


def _format_of(parts: CheckpointParts) -> WeightFormat:
    return parts.unquantized.base


def _taken(found: dict[str, Any]) -> Taken:
    return Taken(
        found["groups"], found["experts"], found["kv_dtype"], found["expected_kl"],
        found["bits_per_kept_expert_weight"],
    )  # fmt: skip


def _say(wanted: _Wanted, found: dict[str, Any]) -> None:
    uniform = wanted.plan.chosen
    cache = f" and {cache_name(found['kv_dtype'])}" if found["kv_dtype"] != uniform.kv_dtype else ""
    wanted.passes.progress.log(
        f"allocate: {found['experts']} experts, {found['bits_per_kept_expert_weight']:.2f} bits per kept expert "
        f"weight{cache}; the uniform choice was {uniform.format} with {uniform.experts_kept} experts"
    )
