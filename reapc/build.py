"""The passes in order: decide, observe, decide again, prune, quantize, verify, emit; each stage cached by key."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reapc import __version__
from reapc.allocated import allocate_build, allocates
from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import make_folder, remove, require_room
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.source import fetch
from reapc.emit import write_result
from reapc.errors import ReapcError
from reapc.estimate import Estimate, estimate
from reapc.formats.gguf_types import UNQUANTIZED
from reapc.formats.weights import WeightFormat
from reapc.healing import heal_and_judge, split
from reapc.observe.corpus import load_data, load_split
from reapc.observe.observe import observe, observe_reference
from reapc.observe.reference import read_reference
from reapc.observe.scores import Scores, load_scores
from reapc.output import existing_result
from reapc.plan import Plan
from reapc.planner import prior
from reapc.progress import Progress
from reapc.prune.criteria import choose, dropped_share, expert_values, groups_of
from reapc.prune.rewrite import check_scores, prune
from reapc.prune.stability import stability
from reapc.quantize import checkpoint as quantizer
from reapc.quantize.decoded import decode
from reapc.quantize.starved import starved
from reapc.recipe import Recipe
from reapc.requirements import Requirements
from reapc.stages import StageCache, cache_root, digest_of
from reapc.stream.families import check_family, check_state
from reapc.stream.tokens import Tokens
from reapc.toolchain import find_llamacpp
from reapc.verify.fidelity import Fidelity, check_limits, log_probs, measure
from reapc.verify.fit import FitRow, check_fit
from reapc.verify.quantized import check_quantized


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


def _llamacpp_version() -> str:
    return find_llamacpp().version


def _build_key(inputs: _Inputs, tools: dict[str, str]) -> str:
    """Identity of the result: everything that its bytes depend on. ``tools``: versions of the quantizer's packages."""
    recipe = inputs.recipe.model_dump(mode="json", exclude={"name", "base", "output", "model"})
    return digest_of(
        {
            "recipe": recipe,
            "model": [inputs.checkpoint.digest, inputs.checkpoint.side_digest],
            "tools": [_llamacpp_version(), tools],
            "calibration": inputs.calibration.digest,
            "held_out": inputs.held_out.digest,
            "scores": digest_of(inputs.scores.to_json()) if inputs.scores else None,
            "reapc": __version__,
        }
    )


class Build:
    """One build of one recipe."""

    def __init__(self, recipe: Recipe, progress: Progress, scores: Path | None = None) -> None:
        self.recipe = recipe
        self.progress = progress
        self.start = time.monotonic()
        self.stability: dict[str, Any] = {}
        self.healing: dict[str, Any] = {}
        self.allocation: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}  # what the manifest says of a quantized checkpoint
        self.cache = StageCache(cache_root() / "stages", progress.log)
        make_folder(self.cache.root)
        folder = fetch(recipe.model.source, recipe.model.revision, recipe.base)
        checkpoint = Checkpoint(folder)
        check_family(checkpoint.spec, str(folder))
        check_state(checkpoint.spec, checkpoint.config, str(folder))
        self.requirements = Requirements(recipe, checkpoint)
        self.first_plan = self.requirements.plan()
        self.tools = self.requirements.check_tools(self.first_plan.chosen)
        self.allocates = allocates(recipe, self.first_plan, checkpoint)
        given = load_scores(scores) if scores else None
        if given and scores:
            check_scores(given, checkpoint, scores)
        calibration, held_out = _split(recipe, folder, checkpoint.spec, progress)
        if recipe.prune.heal:
            split(calibration)  # refuses too few sequences before anything is computed
        self.inputs = _Inputs(recipe, checkpoint, calibration, held_out, given)

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
            inputs.checkpoint, self.first_plan, inputs.calibration, inputs.held_out, tool, iters, decoded, healed
        )

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
        if self.allocates and plan.chosen.engine == "llama.cpp" and plan.chosen.format not in UNQUANTIZED:
            plan, self.allocation = allocate_build(
                self.recipe, plan, inputs.checkpoint, scores, inputs.calibration, self._convert, self.cache,
                self.progress,
            )  # fmt: skip
        groups = groups_of(inputs.checkpoint.spec, self.recipe.prune.dissolve_groups)
        kept = choose(scores, plan.criterion, plan.chosen.experts_kept, groups)
        self._say_stability(scores, plan, groups)
        pruned, pruned_key = self._prune(kept, plan, scores)
        if self.requirements.decodes(plan.chosen):
            pruned, pruned_key = self._decode(pruned, pruned_key)
        if self.requirements.heals(plan.chosen):
            pruned, pruned_key = self._heal(pruned, pruned_key)
        result = self._quantize(pruned, pruned_key, plan)
        fit = check_fit(result, plan)
        fidelity = self._fidelity(result, reference)
        check_limits(fidelity, self.recipe.verify)
        manifest = self._emit(out, plan, scores, result, fit, fidelity, kept, reference)
        return BuildResult(out, manifest, fresh=True)

    def _observe(self) -> tuple[Scores, Path]:
        """Scores and the reference of held-out text; only the latter when the scores are given."""
        inputs = self.inputs
        if inputs.scores:
            given = {
                "model": inputs.checkpoint.digest,
                "held_out": inputs.held_out.digest,
                "reapc": __version__,
            }

            def reference(folder: Path, scratch: Path) -> None:
                out = folder / "reference.safetensors"
                observe_reference(inputs.checkpoint, inputs.held_out, scratch, out, self.progress)

            folder, _ = self.cache.run("reference", given, reference)
            return inputs.scores, folder / "reference.safetensors"
        depends = {
            "model": inputs.checkpoint.digest,
            "calibration": inputs.calibration.digest,
            "held_out": inputs.held_out.digest,
            "reapc": __version__,
            **({"moments": True} if self.allocates else {}),
        }

        def work(folder: Path, scratch: Path) -> None:
            observe(
                inputs.checkpoint,
                inputs.calibration,
                scratch,
                self.progress,
                held_out=inputs.held_out,
                reference=folder / "reference.safetensors",
                moments=self.allocates,
                model_name=inputs.recipe.model.source,
                revision=inputs.recipe.model.revision,
                out=folder / "scores.safetensors",
            )

        folder, _ = self.cache.run("observe", depends, work)
        return load_scores(folder / "scores.safetensors"), folder / "reference.safetensors"

    def _say_stability(self, scores: Scores, plan: Plan, groups: int) -> None:
        """How far the choice of experts depends on the calibration text: logged, and kept for the manifest."""
        found = stability(scores, plan.criterion, plan.chosen.experts_kept, groups)
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

    def _prune(self, kept: dict[int, list[int]], plan: Plan, scores: Scores) -> tuple[Path, str]:
        """The pruned checkpoint (the source itself when all of it stays) and its key."""
        checkpoint, mtp = self.inputs.checkpoint, self.recipe.prune.mtp
        whole = mtp == "prune" or not checkpoint.spec.mtp_layers
        if plan.chosen.experts_kept == checkpoint.spec.num_experts and whole:
            return checkpoint.folder, digest_of([checkpoint.digest, checkpoint.side_digest])
        model = [checkpoint.digest, checkpoint.side_digest]
        settings = self.recipe.prune
        depends = {
            "model": model,
            "kept": {str(k): v for k, v in kept.items()},
            "dissolve_groups": settings.dissolve_groups,
            "mtp": mtp,
            "reapc": __version__,
        }
        values = expert_values(scores, plan.criterion)

        def work(folder: Path, scratch: Path) -> None:
            prune(
                checkpoint, kept, folder / "model", self.progress, mtp=mtp, dissolve_groups=settings.dissolve_groups,
                values=values,
            )  # fmt: skip

        folder, key = self.cache.run("prune", depends, work)
        return folder / "model", key

    def _quantize(self, pruned: Path, pruned_key: str, plan: Plan) -> Path:
        """The GGUF file, or the folder that vLLM serves: the pruned one where it stays in what it is stored in."""
        if plan.chosen.engine == "llama.cpp":
            return self._quantize_gguf(pruned, pruned_key, plan)
        fmt = self.requirements.written(plan.chosen)
        return pruned if fmt is None else self._quantize_checkpoint(pruned, pruned_key, fmt)

    def _decode(self, pruned: Path, pruned_key: str) -> tuple[Path, str]:
        """A quantized checkpoint in 16 bit, and its key."""
        depends = {"model": pruned_key, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            decode(Checkpoint(pruned), folder / "model", self.progress)

        folder, key = self.cache.run("decode", depends, work)
        return folder / "model", key

    def _heal(self, pruned: Path, pruned_key: str) -> tuple[Path, str]:
        """The pruned checkpoint refitted to the original on the calibration text, and its key."""
        checkpoint, calibration = self.inputs.checkpoint, self.inputs.calibration
        depends = {
            "original": checkpoint.digest,
            "model": pruned_key,
            "calibration": calibration.digest,
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            found = heal_and_judge(checkpoint, pruned, calibration, scratch, folder / "model", self.progress)
            (folder / "healing.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")

        folder, key = self.cache.run("heal", depends, work)
        self.healing = json.loads((folder / "healing.json").read_text())
        return folder / "model", key

    def _quantize_checkpoint(self, pruned: Path, pruned_key: str, fmt: WeightFormat) -> Path:
        """The checkpoint in ``fmt``, reloaded strictly and compared with the pruned one tensor by tensor."""
        settings, calibration = self.recipe.quantize, self.inputs.calibration
        tool = quantizer.writer_for(fmt, settings.writer)
        iters = None if settings.iters == "auto" else settings.iters
        depends = {
            "model": pruned_key,
            "format": fmt.name,
            "writer": [tool.tool, tool.export],
            "iters": settings.iters if tool.tool == "auto-round" else None,
            "calibration": calibration.digest if tool.tool != "reapc" else None,
            "seed": self.recipe.calibration.seed,
            "tools": quantizer.versions(tool),
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            facts = quantizer.quantize(
                pruned, folder / "model", fmt, calibration, self.progress, method=settings.writer, iters=iters,
                seed=self.recipe.calibration.seed, threads=os.cpu_count() or 1, scratch=scratch,
            )  # fmt: skip
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")

        folder, _ = self.cache.run("quantize", depends, work)
        source = Checkpoint(pruned)
        report = check_quantized(folder / "model", fmt, source.spec, original=source, progress=self.progress)
        self.quantized = {"quantizer": json.loads((folder / "facts.json").read_text()), "reload": report.to_json()}
        if tool.tool != "reapc":
            self.quantized["starved"] = self._starved(pruned, pruned_key)
        return folder / "model"

    def _starved(self, pruned: Path, pruned_key: str) -> dict[str, Any]:
        """Experts of the pruned model that too little of the calibration text reaches, from its own routing."""
        depends = {"model": pruned_key, "calibration": self.inputs.calibration.digest, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            out = folder / "scores.safetensors"
            observe(Checkpoint(pruned), self.inputs.calibration, scratch, self.progress, moments=False, out=out)

        folder, _ = self.cache.run("routing", depends, work)
        found = starved(load_scores(folder / "scores.safetensors"))
        if found["count"]:
            self.progress.log(f"quantize: {found['summary']}")
        return found

    def _quantize_gguf(self, pruned: Path, pruned_key: str, plan: Plan) -> Path:
        """The GGUF file of the plan's type."""
        from reapc.quantize import gguf

        types = self.allocation.get("types")
        fmt = "Q8_0" if types else plan.chosen.format  # whose rules raise and lower nothing beside a list of types
        base, base_key = self._convert(pruned, pruned_key, "f16" if fmt == "F16" else "bf16")
        if fmt in ("BF16", "F16"):
            return base
        wanted = self.recipe.quantize.imatrix and (types or fmt != "Q8_0")  # llama-quantize rounds Q8_0 without one
        imatrix, imatrix_key = self._imatrix(pruned, pruned_key) if wanted else (None, "")
        depends = {"base": base_key, "imatrix": imatrix_key, "format": fmt, "tools": _llamacpp_version()}
        depends |= {"types": types} if types else {}

        def work(folder: Path, scratch: Path) -> None:
            threads = os.cpu_count() or 1
            gguf.quantize(
                base, folder / "model.gguf", fmt, imatrix, threads=threads, log=self.progress.log, types=types
            )

        folder, _ = self.cache.run("quantize", depends, work)
        return folder / "model.gguf"

    def _convert(self, pruned: Path, pruned_key: str, outtype: str) -> tuple[Path, str]:
        """The pruned checkpoint as GGUF in 16 bit, and its key."""
        from reapc.quantize import gguf

        pre = self.recipe.quantize.pre_tokenizer
        depends = {"model": pruned_key, "type": outtype, "pre": pre, "tools": _llamacpp_version()}

        def work(folder: Path, scratch: Path) -> None:
            gguf.convert(pruned, folder / "model.gguf", outtype, pre, log=self.progress.log)

        folder, key = self.cache.run("convert", depends, work)
        return folder / "model.gguf", key

    def _imatrix(self, pruned: Path, pruned_key: str) -> tuple[Path, str]:
        """The importance matrix, from the second moments of the pruned model's own routing."""
        depends = {"model": pruned_key, "calibration": self.inputs.calibration.digest, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            from reapc.quantize.imatrix import write_from_scores

            checkpoint = Checkpoint(pruned)
            scores = observe(checkpoint, self.inputs.calibration, scratch, self.progress, moments=True)
            write_from_scores(folder / "imatrix.gguf", scores, self.inputs.calibration, checkpoint.spec)

        folder, key = self.cache.run("imatrix", depends, work)
        return folder / "imatrix.gguf", key

    def _fidelity(self, result: Path, reference: Path) -> Fidelity:
        held_out = self.inputs.held_out
        scratch = self.cache.root / f"verify-{os.getpid()}.work"
        try:
            results = log_probs(result, held_out, scratch, self.progress)
            return measure(held_out, read_reference(reference), results)
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
            "recipe_name": inputs.recipe.name,
            "recipe": inputs.recipe.model_dump(mode="json"),
            "model": {"source": inputs.recipe.model.source, "digest": inputs.checkpoint.digest},
            "calibration": {"source": inputs.calibration.source, "tokens": inputs.calibration.count},
            "held_out": {"source": inputs.held_out.source, "tokens": inputs.held_out.count},
            "experts_kept": plan.chosen.experts_kept,
            "kept": {str(layer): experts for layer, experts in kept.items()},
            "never_routed": {str(layer): experts for layer, experts in scores.never_routed().items()},
            "stability": self.stability,
            "format": "allocated" if self.allocation else plan.chosen.format,
            "as_stored": self.requirements.copies(plan.chosen),
            "engine": plan.chosen.engine,
            "healing": self.healing,
            "allocation": self.allocation,
            "fit": [row.__dict__ for row in fit],
            **self.quantized,
            "fidelity": fidelity.to_json(),
            "stage_seconds": self.cache.seconds,
            "reused": self.cache.reused,
            "seconds": time.monotonic() - self.start,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {**_versions(), "llama.cpp": _llamacpp_version()},
        }
        plans = {"from_prior": self.first_plan, "from_scores": plan}
        return write_result(out, result, plans, inputs.recipe, scores, reference, inputs.held_out, facts)
