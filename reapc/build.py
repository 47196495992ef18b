"""The passes in order: decide, observe, decide again, prune, quantize, verify, emit; each stage cached by key."""

from __future__ import annotations

import importlib.metadata
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reapc import __version__
from reapc.allocate.in_build import allocate_build, allocated_format, allocates, rounds
from reapc.allocate.needs import Needs, allocation_needs
from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import make_folder, remove, require_room
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.source import fetch
from reapc.choice.samples import samples_of
from reapc.emit import write_result
from reapc.errors import ReapcError
from reapc.estimate import Estimate, estimate
from reapc.formats.weights import WeightFormat
from reapc.healing import split
from reapc.observe.corpus import load_data, load_split
from reapc.observe.reference import read_reference
from reapc.observe.scores import Scores, load_scores
from reapc.output import existing_result
from reapc.passes import Passes, Staged, llamacpp_version
from reapc.plan import Plan
from reapc.planner import prior
from reapc.planner.question import from_recipe
from reapc.planner.search import served_counts
from reapc.progress import Progress
from reapc.prune.criteria import CRITERIA, choose, dropped_share, groups_of
from reapc.prune.rewrite import check_scores
from reapc.prune.stability import stability
from reapc.quantize import checkpoint as quantizer
from reapc.recipe import Recipe
from reapc.requirements import Requirements
from reapc.stages import StageCache, cache_root, digest_of
from reapc.stream.families import check_family, check_state
from reapc.stream.tokens import Tokens
from reapc.verify.detail import Detail
from reapc.verify.fidelity import Fidelity, check_limits, log_probs, measure
from reapc.verify.fit import FitRow, check_fit
from reapc.verify.quantized import check_quantized
from reapc.verify.token_text import token_text


@dataclass(frozen=True)
class BuildResult:
    """What a build reports. ``fresh`` is False when the output was there already."""

    output: Path
    manifest: dict[str, Any]
    fresh: bool


@dataclass(frozen=True)
class _Inputs:
    recipe: Recipe
    checkpoint: Checkpoint
    calibration: Tokens
    held_out: Tokens
    scores: Scores | None


def _split(recipe: Recipe, folder: Path, spec: ModelSpec, progress: Progress) -> tuple[Tokens, Tokens]:
    """Calibration and held-out tokens; without [verify] data, samples that calibration does not use, in the same mix
    of domains."""
    calibration, verify = recipe.calibration, recipe.verify
    own = verify.data != "auto"
    settings: dict[str, Any] = {"context": spec.max_context, "progress": progress}
    if own and verify.data == calibration.data and not verify.data.endswith(".safetensors"):
        raise ReapcError(
            f"verify.data = {verify.data!r} is calibration.data: the same text would be held out",
            hint="leave verify.data out: samples that calibration does not use are then held out",
        )
    tokens, held_out = load_split(
        folder, calibration.data, recipe.base, calibration.tokens, calibration.sequences,
        0 if own else verify.sequences, calibration.seed, spec.vocab_size, **settings,
    )  # fmt: skip
    if held_out is None:
        held_out = load_data(
            folder, verify.data, recipe.base, calibration.tokens, verify.sequences, calibration.seed, spec.vocab_size,
            **settings,
        )  # fmt: skip
    return tokens, held_out


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
    return {"reapc": __version__, **{name: importlib.metadata.version(name) for name in names}}


def _described(tokens: Tokens) -> dict[str, Any]:
    """What the manifest says of a text."""
    return {"source": tokens.source, "tokens": tokens.count, "sequences": tokens.sequences, "digest": tokens.digest}


def _build_key(inputs: _Inputs, tools: dict[str, str]) -> str:
    """Identity of the result: everything that its bytes depend on. ``tools``: versions of the quantizer's packages."""
    recipe = inputs.recipe.model_dump(mode="json", exclude={"name", "base", "output", "model"})
    return digest_of(
        {
            "recipe": recipe,
            "model": [inputs.checkpoint.digest, inputs.checkpoint.side_digest],
            "tools": [llamacpp_version(), tools],
            "calibration": inputs.calibration.digest,
            "held_out": inputs.held_out.digest,
            "scores": digest_of(inputs.scores.to_json()) if inputs.scores else None,
            "reapc": __version__,
        }
    )


def _values_of(criterion: str) -> str:
    """The criterion whose values say what experts are worth: reap's where it has none (greedy removal, "none")."""
    return criterion if criterion in CRITERIA else "reap"


class Build:
    """One build of one recipe."""

    def __init__(
        self, recipe: Recipe, progress: Progress, scores: Path | None = None, cache: StageCache | None = None,
        command: str = "",
    ) -> None:  # fmt: skip
        """``command``: what the user typed, for the manifest. ``cache``: by default that of all builds."""
        self.recipe = recipe
        self.command = command
        self.progress = progress
        self.start = time.monotonic()
        self.stability: dict[str, Any] = {}
        self.healing: dict[str, Any] = {}
        self.healing_quantized: dict[str, Any] = {}
        self.choice: dict[str, Any] = {}
        self.allocation: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}  # what the manifest says of a quantized checkpoint
        self.cache = cache or StageCache(cache_root() / "stages", progress.log)
        make_folder(self.cache.root)
        folder = fetch(recipe.model.source, recipe.model.revision, recipe.base)
        checkpoint = Checkpoint(folder)
        check_family(checkpoint.spec, str(folder))
        check_state(checkpoint.spec, checkpoint.config, str(folder))
        self.requirements = Requirements(recipe, checkpoint)
        self.first_plan = self.requirements.plan()
        self.tools = self.requirements.check_tools(self.first_plan.chosen)
        self.allocates = allocates(recipe, checkpoint)
        given = load_scores(scores) if scores else None
        if given and scores:
            check_scores(given, checkpoint, scores)
        calibration, held_out = _split(recipe, folder, checkpoint.spec, progress)
        if recipe.prune.heal or recipe.quantize.heal:
            split(calibration)  # refuses too few sequences before anything is computed
        self.inputs = _Inputs(recipe, checkpoint, calibration, held_out, given)
        self.passes = Passes(
            checkpoint, calibration, self.cache, progress, recipe.calibration.seed, recipe.quantize.pre_tokenizer
        )
        self.detail = Detail(held_out)

    @property
    def key(self) -> str:
        return _build_key(self.inputs, self.tools)

    def expect(self) -> Estimate:
        """Time, disk and memory that the build is expected to need."""
        inputs, settings, chosen = self.inputs, self.recipe.quantize, self.first_plan.chosen
        fmt = self.requirements.written(chosen)
        tool = quantizer.writer_for(fmt, settings.writer).tool if fmt is not None else ""
        iters = quantizer.DEFAULT_ITERS if settings.iters == "auto" else settings.iters
        decoded = self.requirements.decodes(chosen)
        healed = self.requirements.heals(chosen)
        return estimate(
            inputs.checkpoint, self.first_plan, inputs.calibration, inputs.held_out, tool, iters, decoded, healed,
            self.requirements.measures(chosen), self.requirements.heals_quantized(chosen), self._allocation(),
        )  # fmt: skip

    def _allocation(self) -> Needs | None:
        """What allocating is expected to need; None where nothing is allocated."""
        inputs, plan = self.inputs, self.first_plan
        if not (self.allocates and rounds(plan)):
            return None
        question = from_recipe(self.recipe, inputs.checkpoint.spec, self.recipe.model.source, buildable=True)
        counts = served_counts(plan.chosen.engine, inputs.checkpoint.spec, question.counts)
        return allocation_needs(inputs.checkpoint, plan, inputs.calibration, counts)

    def run(self, out: Path) -> BuildResult:
        """Builds into ``out``; does nothing when this very result is there."""
        inputs = self.inputs
        manifest = existing_result(out, self.key, inputs.recipe.name)
        if manifest is not None:
            return BuildResult(out, manifest, fresh=False)
        expected = self.expect()
        self.progress.log(f"expected (estimate): {expected.describe()}")
        require_room(self.cache.root, expected.disk_bytes, "the build's stages")
        require_room(out.parent, self.first_plan.chosen.file_bytes, "the result")

        scores, reference = self._observe()
        plan = self._second_plan(scores)
        if self.allocates and rounds(plan):
            plan, self.allocation = allocate_build(
                self.recipe, plan, inputs.checkpoint, scores, inputs.calibration, self.passes
            )  # fmt: skip
        groups = groups_of(inputs.checkpoint.spec, self.recipe.prune.dissolve_groups)
        plan, kept = self._choose(scores, plan, groups)
        self._say_stability(scores, plan, groups)
        pruned = self._prune(kept, plan, scores)
        result = self._heal_quantized(pruned, self._quantize(pruned, plan), plan)
        fit = check_fit(result, plan)
        fidelity = self._fidelity(result, reference)
        check_limits(fidelity, self.recipe.verify)
        manifest = self._emit(out, plan, scores, result, fit, fidelity, kept, reference)
        return BuildResult(out, manifest, fresh=True)

    def _observe(self) -> tuple[Scores, Path]:
        """Scores and the reference of held-out text; only the latter when the scores are given."""
        inputs, model = self.inputs, self.recipe.model
        if inputs.scores:
            return inputs.scores, self.passes.reference(inputs.held_out)
        return self.passes.observe(inputs.held_out, model.source, model.revision, moments=self.allocates)

    def _choose(self, scores: Scores, plan: Plan, groups: int) -> tuple[Plan, dict[int, list[int]]]:
        """The experts that stay: by the recipe's criterion, or by the one that measuring has chosen."""
        calibration, count = self.inputs.calibration, plan.chosen.experts_kept
        if not self.requirements.measures(plan.chosen):
            return plan, choose(scores, _values_of(plan.criterion), count, groups)
        seed, dissolve = self.recipe.calibration.seed, self.recipe.prune.dissolve_groups
        try:
            samples_of(calibration, seed)
        except ReapcError as error:
            self.choice = {"winner": plan.criterion, "why": f"not measured: {error}"}
            self.progress.log(f"choice: {plan.criterion}, {self.choice['why']}")
            return plan, choose(scores, plan.criterion, count, groups)
        found = self.passes.choose(scores, count, dissolve)
        self.choice = found.figures
        return plan.model_copy(update={"criterion": found.winner}), found.kept

    def _say_stability(self, scores: Scores, plan: Plan, groups: int) -> None:
        """How far the choice of experts depends on the calibration text: logged, and kept for the manifest."""
        found = stability(scores, _values_of(plan.criterion), plan.chosen.experts_kept, groups)
        for line in found.lines():
            self.progress.log(f"scores: {line}")
        self.stability = found.to_json()

    def _second_plan(self, scores: Scores) -> Plan:
        """The same planner with the damage of pruning read off the scores."""
        dissolve = self.recipe.prune.dissolve_groups
        criterion, groups = self.first_plan.criterion, groups_of(self.inputs.checkpoint.spec, dissolve)

        def measured(kept: int) -> float:
            return prior.measured_pruning_loss(
                1 - kept / scores.header["num_experts"], dropped_share(scores, criterion, kept, groups)
            )

        plan = self.requirements.plan(measured)
        first, second = self.first_plan.chosen, plan.chosen
        if (first.experts_kept, first.format) != (second.experts_kept, second.format):
            self.progress.log(
                f"plan: measured scores changed the decision from {first.experts_kept} experts {first.format} to "
                f"{second.experts_kept} experts {second.format}"
            )
        return plan

    def _prune(self, kept: dict[int, list[int]], plan: Plan, scores: Scores) -> Staged:
        """The pruned checkpoint (the source itself when all of it stays), decoded and healed where that is needed."""
        checkpoint, settings, passes = self.inputs.checkpoint, self.recipe.prune, self.passes
        whole = settings.mtp == "prune" or not checkpoint.spec.mtp_layers
        pruned = passes.source
        if plan.chosen.experts_kept != checkpoint.spec.num_experts or not whole:
            # all candidates of a choice were measured with reap's values
            worth = "reap" if self.choice else _values_of(plan.criterion)
            pruned = passes.prune(kept, scores, worth, settings.mtp, settings.dissolve_groups)
        if self.requirements.decodes(plan.chosen):
            pruned = passes.decode(pruned)
        if self.requirements.heals(plan.chosen):
            pruned, self.healing = passes.heal(pruned)
        return pruned

    def _quantize(self, pruned: Staged, plan: Plan) -> Path:
        """The GGUF file, or the folder that vLLM serves: the pruned one where it stays in what it is stored in."""
        if plan.chosen.engine == "llama.cpp":
            types = self.allocation.get("types")
            return self.passes.quantize_gguf(pruned, plan.chosen.format, self.recipe.quantize.imatrix, types)
        fmt = allocated_format(self.allocation) if self.allocation else self.requirements.written(plan.chosen)
        return pruned.path if fmt is None else self._quantize_checkpoint(pruned, fmt)

    def _heal_quantized(self, pruned: Staged, result: Path, plan: Plan) -> Path:
        """The result refitted once more, where the recipe asks for it and anything was quantized."""
        heal = self.recipe.quantize.heal
        if not heal or not (self.allocation or self.requirements.heals_quantized(plan.chosen)):  # a mix has no format
            if heal:
                self.progress.log(f"quantize.heal: {plan.chosen.format} is not quantized here, so nothing to heal")
            return result
        imatrix, types = self.recipe.quantize.imatrix, self.allocation.get("types")
        result, self.healing_quantized = self.passes.heal_quantized(pruned, result, plan.chosen.format, imatrix, types)
        return result

    def _quantize_checkpoint(self, pruned: Staged, fmt: WeightFormat) -> Path:
        """The checkpoint in ``fmt``, reloaded strictly and compared with the pruned one tensor by tensor."""
        settings = self.recipe.quantize
        iters = None if settings.iters == "auto" else settings.iters
        result, facts = self.passes.quantize_checkpoint(pruned, fmt, settings.writer, iters)
        source = Checkpoint(pruned.path)
        report = check_quantized(result, fmt, source.spec, original=source, progress=self.progress)
        self.quantized = {"quantizer": facts, "reload": report.to_json()}
        if quantizer.writer_for(fmt, settings.writer).tool != "reapc":
            self.quantized["starved"] = self.passes.starved(pruned)
        return result

    def _fidelity(self, result: Path, reference: Path) -> Fidelity:
        held_out = self.inputs.held_out
        scratch = self.cache.root / f"verify-{os.getpid()}.work"
        try:
            results = log_probs(result, held_out, scratch, self.progress)
            return measure(held_out, read_reference(reference), results, self.detail)
        finally:
            remove(scratch)

    def _emit(
        self,
        out: Path,
        plan: Plan,
        scores: Scores,
        result: Path,
        fit: list[FitRow],
        fidelity: Fidelity,
        kept: dict[int, list[int]],
        reference: Path,
    ) -> dict[str, Any]:
        inputs = self.inputs
        facts = {
            "key": self.key,
            "command": self.command,
            "recipe_name": inputs.recipe.name,
            "recipe": inputs.recipe.model_dump(mode="json"),
            "model": {"source": inputs.recipe.model.source, "digest": inputs.checkpoint.digest},
            "calibration": _described(inputs.calibration),
            "held_out": _described(inputs.held_out),
            "experts_kept": plan.chosen.experts_kept,
            "kept": {str(layer): experts for layer, experts in kept.items()},
            "never_routed": {str(layer): experts for layer, experts in scores.never_routed().items()},
            "stability": self.stability,
            "format": plan.chosen.format,
            "as_stored": self.requirements.copies(plan.chosen),
            "engine": plan.chosen.engine,
            "choice": self.choice,
            "healing": self.healing,
            "healing_quantized": self.healing_quantized,
            "allocation": self.allocation,
            "fit": [row.__dict__ for row in fit],
            **self.quantized,
            "fidelity": fidelity.to_json(),
            "stage_seconds": self.cache.seconds,
            "reused": self.cache.reused,
            "seconds": time.monotonic() - self.start,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**_versions(), "llama.cpp": llamacpp_version()},
        }
        plans = {"from_prior": self.first_plan, "from_scores": plan}
        return write_result(
            out, result, plans, inputs.recipe, scores, reference, inputs.held_out, facts,
            lambda: self.detail.to_json(token_text(inputs.checkpoint.folder)), self.progress.log,
        )  # fmt: skip
