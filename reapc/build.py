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

import numpy as np

from reapc import __version__
from reapc.checkpoint.atomic import atomic_path, make_folder, remove, require_room
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.source import fetch
from reapc.errors import CannotBeDone, ReapcError
from reapc.estimate import Estimate, estimate
from reapc.formats import weights
from reapc.formats.weights import WeightFormat
from reapc.observe.corpus import load_data
from reapc.observe.observe import observe, observe_reference
from reapc.observe.reference import read_reference
from reapc.observe.scores import Scores, load_scores
from reapc.output import existing_result, place
from reapc.plan import Plan
from reapc.planner import prior
from reapc.planner.search import make_plan
from reapc.probes import Host, available_ram
from reapc.progress import Progress
from reapc.prune.criteria import choose, dropped_share, expert_values, groups_of
from reapc.prune.rewrite import check_scores, prune
from reapc.quantize import checkpoint as quantizer
from reapc.quantize.starved import starved
from reapc.recipe import Recipe
from reapc.stages import StageCache, cache_root, digest_of
from reapc.stream.families import check_family, check_state
from reapc.stream.tokens import Tokens, write_tokens
from reapc.toolchain import find_llamacpp, require
from reapc.verify.fidelity import Fidelity, log_probs, measure
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


def _split(recipe: Recipe, folder: Path, vocab: int) -> tuple[Tokens, Tokens]:
    """Calibration and held-out tokens; without [verify] data, sequences that calibration does not use."""
    calibration, verify = recipe.calibration, recipe.verify
    own = verify.data != "auto"
    wanted = calibration.sequences + (0 if own else verify.sequences)
    tokens = load_data(folder, calibration.data, recipe.base, calibration.tokens, wanted, calibration.seed, vocab)
    if own:
        held_out = load_data(
            folder, verify.data, recipe.base, calibration.tokens, verify.sequences, calibration.seed, vocab
        )
        return tokens, held_out
    if tokens.sequences < 2:
        raise ReapcError(
            f"calibration.data = {calibration.data!r} has one sequence: none is left to verify with",
            hint="give [verify] data, or more calibration text",
        )
    spare = max(1, min(verify.sequences, tokens.sequences // 3))
    order = np.random.default_rng(calibration.seed).permutation(tokens.sequences)
    rest = order[spare : spare + calibration.sequences]
    return tokens.take(np.sort(rest)), tokens.take(np.sort(order[:spare]))


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


def _converter_decodes(checkpoint: Checkpoint) -> bool:
    """Whether the road to GGUF takes the checkpoint: 16 or 32 bit, or FP8, which llama.cpp's converter decodes."""
    return checkpoint.quantization is None or checkpoint.quantization.method == "fp8"


class Build:
    """One build of one recipe."""

    def __init__(self, recipe: Recipe, progress: Progress, scores: Path | None = None) -> None:
        self.recipe = recipe
        self.progress = progress
        self.start = time.monotonic()
        self.quantized: dict[str, Any] = {}  # what the manifest says of a quantized checkpoint
        self.cache = StageCache(cache_root() / "stages", progress.log)
        make_folder(self.cache.root)
        folder = fetch(recipe.model.source, recipe.model.revision, recipe.base)
        checkpoint = Checkpoint(folder)
        check_family(checkpoint.spec, str(folder))
        check_state(checkpoint.spec, checkpoint.config, str(folder))
        if recipe.serve.speculative == "mtp":
            raise CannotBeDone(
                'serve.speculative = "mtp": a build of this version drops the MTP layers that would draft',
                hint="plan with it, and build without",
            )
        if recipe.prune.mtp == "prune" and checkpoint.spec.mtp_layers:
            raise CannotBeDone(
                'prune.mtp = "prune": a build of this version does not count MTP layers in what it proves',
                hint="build without, or write the checkpoint with `reapc prune --mtp prune`",
            )
        self.first_plan = make_plan(recipe, checkpoint.spec, recipe.model.source, buildable=True)
        if not (self.first_plan.chosen.engine == "llama.cpp" and _converter_decodes(checkpoint)):
            checkpoint.refuse_quantized("a build")
        self.tools = self._check_tools(checkpoint)
        given = load_scores(scores) if scores else None
        if given and scores:
            check_scores(given, checkpoint, scores)
        calibration, held_out = _split(recipe, folder, checkpoint.spec.vocab_size)
        self.inputs = _Inputs(recipe, checkpoint, calibration, held_out, given)

    @property
    def key(self) -> str:
        return _build_key(self.inputs, self.tools)

    def _check_tools(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Whatever the plan's quantizer needs is looked for before anything is computed; versions of its packages."""
        chosen = self.first_plan.chosen
        if chosen.engine == "llama.cpp":
            for tool in ("convert", "quantize", "lib_dir"):
                require(tool)
            return {}
        fmt = weights.parse(chosen.format)
        if fmt is None or not fmt.quantized:
            return {}
        writer = quantizer.writer_for(fmt, self.recipe.quantize.writer, checkpoint.spec)
        versions = quantizer.versions(writer)
        room = available_ram(Host(), [])
        quantizer.require_memory(checkpoint.spec.with_experts(chosen.experts_kept), writer, room)
        return versions

    def expect(self) -> Estimate:
        """Time, disk and memory that the build is expected to need."""
        inputs, settings = self.inputs, self.recipe.quantize
        fmt = weights.parse(self.first_plan.chosen.format)
        tool = quantizer.writer_for(fmt, settings.writer).tool if fmt is not None and fmt.quantized else ""
        iters = quantizer.DEFAULT_ITERS if settings.iters == "auto" else settings.iters
        return estimate(inputs.checkpoint, self.first_plan, inputs.calibration, inputs.held_out, tool, iters)

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
        groups = groups_of(inputs.checkpoint.spec, self.recipe.prune.dissolve_groups)
        kept = choose(scores, plan.criterion, plan.chosen.experts_kept, groups)
        pruned, pruned_key = self._prune(kept, plan, scores)
        result = self._quantize(pruned, pruned_key, plan)
        fit = check_fit(result, plan)
        fidelity = self._fidelity(result, reference)
        self._check_thresholds(fidelity)
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
        }

        def work(folder: Path, scratch: Path) -> None:
            observed = observe(
                inputs.checkpoint,
                inputs.calibration,
                scratch,
                self.progress,
                held_out=inputs.held_out,
                reference=folder / "reference.safetensors",
                moments=False,
                model_name=inputs.recipe.model.source,
            )
            observed.save(folder / "scores.safetensors")

        folder, _ = self.cache.run("observe", depends, work)
        return load_scores(folder / "scores.safetensors"), folder / "reference.safetensors"

    def _second_plan(self, scores: Scores) -> Plan:
        """The same planner with the damage of pruning read off the scores."""
        dissolve = self.recipe.prune.dissolve_groups
        criterion, groups = self.first_plan.criterion, groups_of(self.inputs.checkpoint.spec, dissolve)

        def measured(kept: int) -> float:
            return prior.measured_pruning_loss(
                1 - kept / scores.header["num_experts"], dropped_share(scores, criterion, kept, groups)
            )

        source = self.inputs.recipe.model.source
        plan = make_plan(self.inputs.recipe, self.inputs.checkpoint.spec, source, measured, buildable=True)
        first, second = self.first_plan.chosen, plan.chosen
        if (first.experts_kept, first.format) != (second.experts_kept, second.format):
            self.progress.log(
                f"plan: measured scores changed the decision from {first.experts_kept} experts {first.format} to "
                f"{second.experts_kept} experts {second.format}"
            )
        return plan

    def _prune(self, kept: dict[int, list[int]], plan: Plan, scores: Scores) -> tuple[Path, str]:
        """The pruned checkpoint (the source itself when all of it stays) and its key."""
        checkpoint = self.inputs.checkpoint
        if plan.chosen.experts_kept == checkpoint.spec.num_experts and not checkpoint.spec.mtp_layers:
            return checkpoint.folder, digest_of([checkpoint.digest, checkpoint.side_digest])
        model = [checkpoint.digest, checkpoint.side_digest]
        settings = self.recipe.prune
        depends = {
            "model": model,
            "kept": {str(k): v for k, v in kept.items()},
            "dissolve_groups": settings.dissolve_groups,
            "reapc": __version__,
        }
        values = expert_values(scores, plan.criterion)

        def work(folder: Path, scratch: Path) -> None:
            prune(
                checkpoint, kept, folder / "model", self.progress, dissolve_groups=settings.dissolve_groups,
                values=values,
            )  # fmt: skip

        folder, key = self.cache.run("prune", depends, work)
        return folder / "model", key

    def _quantize(self, pruned: Path, pruned_key: str, plan: Plan) -> Path:
        """The GGUF file, or the folder that vLLM serves: the pruned one where it stays in 16 bit."""
        fmt = weights.parse(plan.chosen.format) if plan.chosen.engine == "vllm" else None
        if fmt is None:
            return self._quantize_gguf(pruned, pruned_key, plan)
        return self._quantize_checkpoint(pruned, pruned_key, fmt) if fmt.quantized else pruned

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
            counted = observe(Checkpoint(pruned), self.inputs.calibration, scratch, self.progress, moments=False)
            counted.save(folder / "scores.safetensors")

        folder, _ = self.cache.run("routing", depends, work)
        found = starved(load_scores(folder / "scores.safetensors"))
        if found["count"]:
            self.progress.log(f"quantize: {found['summary']}")
        return found

    def _quantize_gguf(self, pruned: Path, pruned_key: str, plan: Plan) -> Path:
        """The GGUF file of the plan's type."""
        from reapc.quantize import gguf

        fmt = plan.chosen.format
        base, base_key = self._convert(pruned, pruned_key, "f16" if fmt == "F16" else "bf16")
        if fmt in ("BF16", "F16"):
            return base
        wanted = self.recipe.quantize.imatrix and fmt != "Q8_0"  # llama-quantize rounds Q8_0 without one
        imatrix, imatrix_key = self._imatrix(pruned, pruned_key) if wanted else (None, "")
        depends = {"base": base_key, "imatrix": imatrix_key, "format": fmt, "tools": _llamacpp_version()}

        def work(folder: Path, scratch: Path) -> None:
            threads = os.cpu_count() or 1
            gguf.quantize(base, folder / "model.gguf", fmt, imatrix, threads=threads, log=self.progress.log)

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

    def _check_thresholds(self, fidelity: Fidelity) -> None:
        limits = self.inputs.recipe.verify
        before, after = fidelity.perplexity_a, fidelity.perplexity_b
        ratio = after / before if before and after else 1.0  # none where every sequence is a single token
        failures = []
        if limits.max_kl is not None and fidelity.kl > limits.max_kl:
            failures.append(f"KL {fidelity.kl:.5f} is {fidelity.kl - limits.max_kl:.5f} above max_kl {limits.max_kl}")
        if limits.min_top1 is not None and fidelity.top1 < limits.min_top1:
            failures.append(
                f"top-1 {fidelity.top1:.4f} is {limits.min_top1 - fidelity.top1:.4f} below min_top1 {limits.min_top1}"
            )
        if limits.max_perplexity_ratio is not None and ratio > limits.max_perplexity_ratio:
            failures.append(
                f"perplexity ratio {ratio:.4f} is {ratio - limits.max_perplexity_ratio:.4f} above "
                f"max_perplexity_ratio {limits.max_perplexity_ratio}"
            )
        if failures:
            raise CannotBeDone(
                "the result is worse than [verify] allows: " + "; ".join(failures),
                hint="allow more memory, more experts or bits, or relax [verify]; nothing was written to the output",
            )

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
        from reapc.emit import write_scripts

        inputs = self.inputs
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        with atomic_path(out) as partial:
            partial.mkdir(parents=True)
            if result.is_file():
                name = "model.gguf"
                place(result, partial / name)
            else:
                name = "model"
                for path in sorted(p for p in result.iterdir() if p.is_file() and not p.name.startswith(".")):
                    place(path, partial / name / path.name)
            scores.save(partial / "scores.safetensors")
            place(reference, partial / "reference.safetensors")
            write_tokens(partial / "held_out.safetensors", inputs.held_out)
            plans = {"from_prior": self.first_plan.to_json(), "from_scores": plan.to_json()}
            (partial / "plan.json").write_text(json.dumps(plans, indent=2) + "\n")
            write_scripts(partial, plan, name, inputs.recipe)
            files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
            manifest = {
                "key": self.key,
                "recipe_name": inputs.recipe.name,
                "recipe": inputs.recipe.model_dump(mode="json"),
                "model": {"source": inputs.recipe.model.source, "digest": inputs.checkpoint.digest},
                "calibration": {"source": inputs.calibration.source, "tokens": inputs.calibration.count},
                "held_out": {"source": inputs.held_out.source, "tokens": inputs.held_out.count},
                "experts_kept": plan.chosen.experts_kept,
                "kept": {str(layer): experts for layer, experts in kept.items()},
                "never_routed": {str(layer): experts for layer, experts in scores.never_routed().items()},
                "format": plan.chosen.format,
                "engine": plan.chosen.engine,
                "artifact": name,
                "fit": [row.__dict__ for row in fit],
                **self.quantized,
                "fidelity": fidelity.to_json(),
                "stage_seconds": self.cache.seconds,
                "reused": self.cache.reused,
                "seconds": time.monotonic() - self.start,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {**_versions(), "llama.cpp": _llamacpp_version()},
                "files": files,
            }
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest
