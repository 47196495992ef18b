"""The passes of one model and one calibration text, each a cached stage: observe, prune, decode, heal, convert,
quantize. A stage is known by a key of everything that its bytes depend on; builds and sweeps share them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reapc import __version__
from reapc.checkpoint.atomic import remove
from reapc.checkpoint.reader import Checkpoint
from reapc.choice.measure import Choice, choose_measured
from reapc.formats.weights import WeightFormat
from reapc.healing import heal_and_judge, heal_quantized
from reapc.observe.observe import observe, observe_reference
from reapc.observe.scores import Scores, load_scores
from reapc.progress import Progress
from reapc.prune.criteria import expert_values
from reapc.prune.rewrite import Mtp, prune
from reapc.quantize import checkpoint as quantizer
from reapc.quantize.decoded import decode
from reapc.quantize.starved import starved
from reapc.stages import StageCache, digest_of
from reapc.stream.tokens import Tokens
from reapc.toolchain import find_llamacpp

UNQUANTIZED_GGUF = ("BF16", "F16")


class Staged(NamedTuple):
    """What a stage gave: a file or folder, and the key of its bytes."""

    path: Path
    key: str


def llamacpp_version() -> str:
    return find_llamacpp().version


@dataclass
class Passes:
    """``seed``: of the quantizers; ``pre_tokenizer``: see ``quantize.gguf.convert``."""

    checkpoint: Checkpoint
    calibration: Tokens
    cache: StageCache
    progress: Progress
    seed: int = 0
    pre_tokenizer: str | None = None

    @property
    def source(self) -> Staged:
        """The model as it is."""
        return Staged(self.checkpoint.folder, digest_of([self.checkpoint.digest, self.checkpoint.side_digest]))

    def reference(self, held_out: Tokens) -> Path:
        """The original's log-probabilities of held-out text."""
        depends = {"model": self.checkpoint.digest, "held_out": held_out.digest, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            observe_reference(self.checkpoint, held_out, scratch, folder / "reference.safetensors", self.progress)

        folder, _ = self.cache.run("reference", depends, work)
        return folder / "reference.safetensors"

    def observe(
        self, held_out: Tokens, name: str, revision: str | None, *, moments: bool = False
    ) -> tuple[Scores, Path]:
        """Scores and the reference of held-out text, in one pass. ``name``, ``revision``: what the scores say they are
        of."""
        depends = {
            "model": self.checkpoint.digest,
            "calibration": self.calibration.digest,
            "held_out": held_out.digest,
            "reapc": __version__,
            **({"moments": True} if moments else {}),
        }

        def work(folder: Path, scratch: Path) -> None:
            observe(
                self.checkpoint, self.calibration, scratch, self.progress, held_out=held_out,
                reference=folder / "reference.safetensors", moments=moments, model_name=name, revision=revision,
                out=folder / "scores.safetensors",
            )  # fmt: skip

        folder, _ = self.cache.run("observe", depends, work)
        return load_scores(folder / "scores.safetensors"), folder / "reference.safetensors"

    def choose(self, scores: Scores, experts: int, dissolve_groups: bool) -> Choice:
        """Which experts stay, by the criterion that loses least on calibration text."""
        depends = {
            "model": self.checkpoint.digest,
            "scores": digest_of(scores.to_json()),
            "experts": experts,
            "calibration": self.calibration.digest,
            "seed": self.seed,
            "dissolve_groups": dissolve_groups,
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            found = choose_measured(
                self.checkpoint, scores, experts, self.calibration, scratch, self.progress,
                dissolve_groups=dissolve_groups, seed=self.seed,
            )  # fmt: skip
            found.save(folder / "choice.json")
            remove(scratch)

        folder, _ = self.cache.run("choice", depends, work)
        return Choice.load(folder / "choice.json")

    def prune(
        self, kept: Mapping[int, list[int]], scores: Scores, worth: str, mtp: Mtp, dissolve_groups: bool
    ) -> Staged:
        """The pruned checkpoint. ``worth``: the criterion whose values say which experts matter more (``prune``)."""
        depends = {
            "model": [self.checkpoint.digest, self.checkpoint.side_digest],
            "kept": {str(k): v for k, v in kept.items()},
            "dissolve_groups": dissolve_groups,
            "mtp": mtp,
            "worth": worth,
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            prune(
                self.checkpoint, dict(kept), folder / "model", self.progress, mtp=mtp,
                dissolve_groups=dissolve_groups, values=expert_values(scores, worth),
            )  # fmt: skip

        folder, key = self.cache.run("prune", depends, work)
        return Staged(folder / "model", key)

    def decode(self, pruned: Staged) -> Staged:
        """A quantized checkpoint in 16 bit."""
        depends = {"model": pruned.key, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            decode(Checkpoint(pruned.path), folder / "model", self.progress)

        folder, key = self.cache.run("decode", depends, work)
        return Staged(folder / "model", key)

    def heal(self, pruned: Staged) -> tuple[Staged, dict[str, Any]]:
        """The pruned checkpoint refitted to the original on the calibration text, and what became of it."""
        depends = {
            "original": self.checkpoint.digest,
            "model": pruned.key,
            "calibration": self.calibration.digest,
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            found = heal_and_judge(
                self.checkpoint, pruned.path, self.calibration, scratch, folder / "model", self.progress
            )
            (folder / "healing.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")

        folder, key = self.cache.run("heal", depends, work)
        return Staged(folder / "model", key), json.loads((folder / "healing.json").read_text())

    def quantize_checkpoint(
        self, pruned: Staged, fmt: WeightFormat, method: str = "auto", iters: int | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """The checkpoint in ``fmt``, and the quantizer's facts. ``method``, ``iters``: see ``quantizer.quantize``."""
        tool = quantizer.writer_for(fmt, method)
        depends = {
            "model": pruned.key,
            "format": fmt.name,
            "writer": [tool.tool, tool.export],
            "iters": (iters or "auto") if tool.tool == "auto-round" else None,
            "calibration": self.calibration.digest if tool.tool != "reapc" else None,
            "seed": self.seed,
            "tools": quantizer.versions(tool),
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            facts = quantizer.quantize(
                pruned.path, folder / "model", fmt, self.calibration, self.progress, method=method, iters=iters,
                seed=self.seed, threads=os.cpu_count() or 1, scratch=scratch,
            )  # fmt: skip
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")

        folder, _ = self.cache.run("quantize", depends, work)
        return folder / "model", json.loads((folder / "facts.json").read_text())

    def starved(self, pruned: Staged) -> dict[str, Any]:
        """Experts of the pruned model that too little of the calibration text reaches, from its own routing."""
        depends = {"model": pruned.key, "calibration": self.calibration.digest, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            out = folder / "scores.safetensors"
            observe(Checkpoint(pruned.path), self.calibration, scratch, self.progress, moments=False, out=out)

        folder, _ = self.cache.run("routing", depends, work)
        found = starved(load_scores(folder / "scores.safetensors"))
        if found["count"]:
            self.progress.log(f"quantize: {found['summary']}")
        return found

    def quantize_gguf(
        self, pruned: Staged, fmt: str, with_imatrix: bool = True, types: Mapping[str, str] | None = None
    ) -> Path:
        """The GGUF file of a type, with an importance matrix where the type takes one and it is wanted. ``types``: of
        every tensor by its name, in the place of what the type's own rules give."""
        from reapc.quantize import gguf

        if types:
            fmt = "Q8_0"  # whose rules raise and lower nothing beside a list of types
        base = self.convert(pruned, "f16" if fmt == "F16" else "bf16")
        if fmt in UNQUANTIZED_GGUF:
            return base.path
        imatrix = self._imatrix_for(pruned, fmt, with_imatrix, types)
        depends = {
            "base": base.key,
            "imatrix": imatrix.key if imatrix else "",
            "format": fmt,
            "tools": llamacpp_version(),
            **({"types": dict(types)} if types else {}),
        }

        def work(folder: Path, scratch: Path) -> None:
            matrix, threads = imatrix.path if imatrix else None, os.cpu_count() or 1
            log = self.progress.log
            gguf.quantize(base.path, folder / "model.gguf", fmt, matrix, threads=threads, log=log, types=types)

        folder, _ = self.cache.run("quantize", depends, work)
        return folder / "model.gguf"

    def _imatrix_for(
        self, pruned: Staged, fmt: str, with_imatrix: bool, types: Mapping[str, str] | None
    ) -> Staged | None:
        """The importance matrix that a GGUF is quantized with."""
        wanted = with_imatrix and (types or fmt != "Q8_0")  # llama-quantize rounds Q8_0 without one
        return self.imatrix(pruned) if wanted else None

    def heal_quantized(
        self, pruned: Staged, result: Path, fmt: str, with_imatrix: bool = True, types: Mapping[str, str] | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """What ``pruned`` was quantized to (a stage's GGUF or folder), refitted to the original once more, and what
        became of it. ``fmt`` and the rest as for ``quantize_gguf``."""
        matrix = None if result.is_dir() else self._imatrix_for(pruned, fmt, with_imatrix, types)
        depends = {
            "original": self.checkpoint.digest,
            "model": pruned.key,
            "result": result.parent.name,
            "imatrix": matrix.key if matrix else "",
            "calibration": self.calibration.digest,
            "tools": llamacpp_version() if result.suffix == ".gguf" else "",
            "reapc": __version__,
        }

        def work(folder: Path, scratch: Path) -> None:
            found = heal_quantized(
                self.checkpoint, pruned.path, result, matrix.path if matrix else None, self.calibration, scratch,
                folder / result.name, self.progress,
            )  # fmt: skip
            (folder / "healing.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")

        folder, _ = self.cache.run("heal-quantized", depends, work)
        return folder / result.name, json.loads((folder / "healing.json").read_text())

    def convert(self, pruned: Staged, outtype: str) -> Staged:
        """The pruned checkpoint as GGUF in 16 bit."""
        from reapc.quantize import gguf

        depends = {"model": pruned.key, "type": outtype, "pre": self.pre_tokenizer, "tools": llamacpp_version()}

        def work(folder: Path, scratch: Path) -> None:
            gguf.convert(pruned.path, folder / "model.gguf", outtype, self.pre_tokenizer, log=self.progress.log)

        folder, key = self.cache.run("convert", depends, work)
        return Staged(folder / "model.gguf", key)

    def imatrix(self, pruned: Staged) -> Staged:
        """The importance matrix, from the second moments of the pruned model's own routing."""
        depends = {"model": pruned.key, "calibration": self.calibration.digest, "reapc": __version__}

        def work(folder: Path, scratch: Path) -> None:
            from reapc.quantize.imatrix import write_from_scores

            checkpoint = Checkpoint(pruned.path)
            scores = observe(checkpoint, self.calibration, scratch, self.progress, moments=True)
            write_from_scores(folder / "imatrix.gguf", scores, self.calibration, checkpoint.spec)

        folder, key = self.cache.run("imatrix", depends, work)
        return Staged(folder / "imatrix.gguf", key)
