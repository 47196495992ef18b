"""The sweep: every configuration of the grid is built, measured on the panel and thrown away again; what was measured
stays, so that an interrupted sweep goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reapc import __version__
from reapc.checkpoint.atomic import make_folder, remove, write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.observe.reference import read_reference
from reapc.observe.scores import Scores
from reapc.passes import Passes, Staged, llamacpp_version
from reapc.progress import Progress
from reapc.prune.criteria import CRITERIA, choose, groups_of
from reapc.quantize import checkpoint as quantizer
from reapc.stages import StageCache, digest_of
from reapc.stream.tokens import Tokens
from reapc.sweep.grid import Budget, Mix
from reapc.sweep.panel import Sequences, by_sequence
from reapc.verify.fidelity import log_probs, vocabulary_of
from reapc.verify.fit import result_bytes, tensor_bytes

_LATER = ("refit", "label")  # fields that came later: what was measured before there were any is still known
OBSERVED = "observe"  # the stages that every configuration needs, and the next sweep


@dataclass(frozen=True)
class Point:
    """A configuration and what it was measured to be worth. ``file_bytes``: of the file or folder, headers and all."""

    mix: Mix
    figures: Sequences
    file_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "mix": asdict(self.mix),
            "figures": self.figures.to_json(),
            "file_bytes": self.file_bytes,
            "seconds": self.seconds,
        }

    @staticmethod
    def of(value: dict[str, Any]) -> Point:
        types = tuple((name, kind) for name, kind in value["mix"]["types"])
        return Point(
            Mix(**{**value["mix"], "types": types}),
            Sequences.of(value["figures"]),
            int(value["file_bytes"]),
            float(value["seconds"]),
        )


@dataclass(frozen=True)
class Settings:
    """``heal``: how what is pruned is measured: False unhealed, True healed. ``iters``: AutoRound's steps. ``refit``:
    the last of these ways, and what keeps every expert, healed after quantization too."""

    criteria: tuple[str, ...] = ("reap",)
    heal: tuple[bool, ...] = (False, True)
    iters: int | None = None
    dissolve_groups: bool = False
    refit: bool = False


def expanded(mixes: Iterable[Mix], experts: int, settings: Settings) -> list[Mix]:
    """Every mix by every criterion, healed and not, each once; what keeps every expert has neither."""
    found: dict[Mix, None] = {}

    def add(mix: Mix, last: bool) -> None:
        found[mix] = None
        if settings.refit and last and mix.quantized:
            found[replace(mix, refit=True)] = None

    for mix in mixes:
        if mix.kept == experts:
            add(mix, True)
            continue
        for criterion in settings.criteria:
            for healed in settings.heal:
                add(replace(mix, criterion=criterion, healed=healed), healed is settings.heal[-1])
    return list(found)


class Sweep:
    """One sweep in the folder ``out``: points/ holds what was measured, stages/ what is being built."""

    def __init__(
        self, passes: Passes, panel: Tokens, out: Path, progress: Progress, settings: Settings, name: str = ""
    ) -> None:
        known = ("auto", *CRITERIA)
        unknown = [criterion for criterion in settings.criteria if criterion not in known]
        if unknown:
            raise ReapcError(f"--criteria {unknown[0]}: no such criterion", hint=f"known: {', '.join(known)}")
        passes.checkpoint.refuse_quantized("a sweep")
        make_folder(out)
        self.passes, self.panel, self.out, self.progress, self.settings = passes, panel, out, progress, settings
        self.scores: Scores
        self.reference: Path
        self.name = name

    def observe(self) -> None:
        """Scores with second moments, and the reference of the panel."""
        self.passes.cache = StageCache(self.out / "stages" / OBSERVED, self.progress.log)
        self.scores, self.reference = self.passes.observe(self.panel, self.name, None, moments=True)

    def run(self, mixes: Sequence[Mix], also: Sequence[tuple[str, Path]] = ()) -> dict[str, Point]:
        """Points of all mixes by their names, and of the models of others by theirs. ``observe`` comes first."""
        reference = self.reference
        wanted = sorted(mixes, key=lambda mix: (mix.kept, mix.criterion, mix.healed, -mix.bytes))
        found: dict[str, Point] = {}
        with self.progress.task("sweep", len(wanted) + len(also), "points") as advance:
            for place, mix in enumerate(wanted):
                found[mix.name] = self._point(mix, reference)
                following = wanted[place + 1] if place + 1 < len(wanted) else None
                if following is None or _variant(following) != _variant(mix):
                    remove(self.out / "stages" / _variant(mix))
                if following is None or (following.kept, following.criterion) != (mix.kept, mix.criterion):
                    remove(self.out / "stages" / _pruned(mix))
                advance(1)
            for name, path in also:
                found[name] = self._other(name, path, reference)
                advance(1)
        for left in (self.out / "stages").iterdir():  # by an interrupted sweep of another grid
            if left.name != OBSERVED:
                remove(left)
        return found

    def _stored(self, name: str, depends: dict[str, Any]) -> tuple[Path, Point | None]:
        """Where a point is kept, and the point where it was measured before."""
        path = self.out / "points" / f"{name}-{digest_of(depends)[:12]}.json"
        return path, Point.of(json.loads(path.read_text())) if path.is_file() else None

    def common(self) -> dict[str, Any]:
        """What every figure of the sweep depends on."""
        model = self.passes.checkpoint
        return {
            "model": [model.digest, model.side_digest],
            "calibration": self.passes.calibration.digest,
            "panel": self.panel.digest,
            "seed": self.passes.seed,
            "reapc": __version__,
        }

    def _point(self, mix: Mix, reference: Path) -> Point:
        """One configuration, measured or read back."""
        tools: Any = llamacpp_version()
        if not mix.is_gguf:
            fmt = _parsed(mix)
            tools = quantizer.versions(quantizer.writer_for(fmt)) if fmt.quantized else {}
        described = {key: value for key, value in asdict(mix).items() if value or key not in _LATER}
        depends = {**self.common(), "mix": described, "iters": self.settings.iters, "tools": tools}
        path, known = self._stored(mix.name, depends)
        if known is not None:
            return known
        start = time.monotonic()
        return self._measured(path, mix, self._built(mix), reference, start)

    def _other(self, name: str, path: Path, reference: Path) -> Point:
        """A model that somebody else made, on the same panel."""
        if vocabulary_of(path) != self.passes.checkpoint.spec.vocab_size:
            raise ReapcError(f"--also {name}={path}: has another vocabulary than the model of this sweep")
        size = tensor_bytes(path)
        kept = Checkpoint(path).spec.num_experts if path.is_dir() else 0
        stat = path.stat()
        depends = {**self.common(), "path": str(path.resolve()), "bytes": size, "time": stat.st_mtime_ns}
        stored, known = self._stored(f"also-{digest_of(name)[:8]}", depends)
        if known is not None:
            return replace(known, mix=replace(known.mix, format=name))
        return self._measured(stored, Mix(name, kept, size), path, reference, time.monotonic())

    def _measured(self, stored: Path, mix: Mix, result: Path, reference: Path, start: float) -> Point:
        scratch = self.out / "stages" / "verify.work"
        try:
            results = log_probs(result, self.panel, scratch, self.progress)
            figures = by_sequence(self.panel, read_reference(reference), results)
        finally:
            remove(scratch)
        if result.is_dir() and (size := tensor_bytes(result)) != mix.bytes:
            # of a float32 source what is not quantized has four bytes
            self.progress.log(f"{mix.name}: {size:,} bytes, {mix.bytes:,} predicted; it counts as what it has")
            mix = replace(mix, bytes=size)
        point = Point(mix, figures, result_bytes(result), time.monotonic() - start)
        make_folder(stored.parent)
        write_text(stored, json.dumps(point.to_json()))
        kl, top1 = figures.mean(figures.tokens > 0)
        self.progress.log(f"{mix.name}: KL {kl:.5f}, top-1 {100 * top1:.2f} %")
        return point

    def _built(self, mix: Mix) -> Path:
        """The file or folder of a configuration."""
        passes, spec = self.passes, self.passes.checkpoint.spec
        model = passes.source
        if mix.kept < spec.num_experts or spec.mtp_layers:  # which are left out everywhere
            passes.cache = StageCache(self.out / "stages" / _pruned(mix), self.progress.log)
            dissolve, criterion = self.settings.dissolve_groups, mix.criterion or "reap"
            if criterion == "auto":
                kept, criterion = passes.choose(self.scores, mix.kept, dissolve).kept, "reap"
            else:
                kept = choose(self.scores, criterion, mix.kept, groups_of(spec, dissolve))
            model = passes.prune(kept, self.scores, criterion, "drop", dissolve)
        passes.cache = StageCache(self.out / "stages" / _variant(mix), self.progress.log)
        if mix.healed:
            model, _ = passes.heal(model)
        result = self._quantized(mix, model)
        return passes.heal_quantized(model, result, mix.format, types=dict(mix.types))[0] if mix.refit else result

    def _quantized(self, mix: Mix, model: Staged) -> Path:
        if mix.is_gguf:
            return self.passes.quantize_gguf(model, mix.format, types=dict(mix.types))
        fmt = _parsed(mix)
        if not fmt.quantized:
            return model.path
        return self.passes.quantize_checkpoint(model, fmt, iters=self.settings.iters)[0]


def _pruned(mix: Mix) -> str:
    """Folder of the stages that healed and unhealed mixes share."""
    return f"{mix.kept}-{mix.criterion or 'all'}"


def _variant(mix: Mix) -> str:
    """Folder of the stages of one pruned model."""
    return f"{_pruned(mix)}-{'healed' if mix.healed else 'plain'}"


def _parsed(mix: Mix) -> weights.WeightFormat:
    parsed = weights.parse(mix.format)
    assert parsed is not None
    return parsed


def fits(point: Point, budget: Budget) -> bool:
    """Whether a point's tensors are within a budget."""
    return point.mix.bytes <= budget.bytes
