"""The rehearsal itself: plan the real recipe, make the tiny model, and take it through every pass to an answer."""

from __future__ import annotations

import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from reapc.arch import ModelSpec, model_spec
from reapc.build import Build
from reapc.checkpoint.source import config_of
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.published import published_format
from reapc.passes import Passes, Staged
from reapc.plan import Plan
from reapc.planner.search import make_plan
from reapc.progress import Silent
from reapc.recipe import Recipe
from reapc.rehearse.checkpoint import write_checkpoint
from reapc.rehearse.recipe import Rehearsed, rehearsal_of
from reapc.rehearse.shrink import Shrunk, shrink
from reapc.rehearse.tokenizer import write_tokenizer
from reapc.stages import StageCache
from reapc.stream.tokens import Tokens
from reapc.units import format_bytes, format_seconds
from reapc.verify.fidelity import compare
from reapc.verify.fit import result_bytes

STEPS = ("shrink", "make", "check", "observe", "prune", "convert", "quantize", "verify", "emit", "serve")
# What 16 bit weights and an f16 KV cache cost these random models was 0.0006 to 0.0094 (8 recipes, 2026-11-24); two
# router rows in each other's place cost Qwen3 0.0465, which a bound of 0.05 let through (tests/test_rehearse.py).
CONVERTED_KL = 0.02
State = Literal["ok", "failed", "skipped", "not reached"]
READY_SECONDS = 120.0
LAST_WORDS = 12
PROMPT, ANSWER_TOKENS = "The quick brown fox", 8


@dataclass
class Step:
    """One row: what was done, how long it took, and what was seen, or the first words of what refused it; ``words``
    are its last ones."""

    name: str
    state: State = "not reached"
    seconds: float = 0.0
    seen: str = ""
    words: tuple[str, ...] = ()


@dataclass
class Report:
    """A whole rehearsal. ``plan`` is the real recipe's."""

    plan: Plan
    folder: Path
    steps: list[Step]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every step ran, or was left out for a reason."""
        return all(step.state in ("ok", "skipped") for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        chosen = self.plan.chosen
        return {
            "ok": self.ok,
            "model": self.plan.model,
            "target": self.plan.target,
            "engine": chosen.engine,
            "format": chosen.format,
            "experts_kept": chosen.experts_kept,
            "num_experts": self.plan.num_experts,
            "steps": [asdict(step) for step in self.steps],
            "notes": self.notes,
        }


class _Failed(Exception):
    """A step failed; its row says how."""


class Log(Silent):
    """Keeps what the passes say in a file, for a reader of a failure."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, line: str) -> None:
        """Adds one line."""
        with self.path.open("a") as file:
            file.write(f"{line}\n")


class Steps:
    """The rows, in order; ``tell`` is called with each that ends."""

    def __init__(self, tell: Callable[[Step], None], log: Log) -> None:
        self.rows = [Step(name) for name in STEPS]
        self.tell, self.log = tell, log

    def __getitem__(self, name: str) -> Step:
        return next(row for row in self.rows if row.name == name)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Times the block as step ``name``; what it raises ends the rehearsal."""
        row, start = self[name], time.monotonic()
        try:
            yield row
        except _Failed:
            raise
        except Exception as error:
            row.seconds = time.monotonic() - start
            self.fail(row, error)
        row.seconds = time.monotonic() - start
        if row.state == "not reached":
            row.state = "ok"
        self.tell(row)

    def fail(self, row: Step, error: Exception) -> None:
        """Notes the words of ``error`` and raises _Failed."""
        row.state = "failed"
        text = str(error)
        self.log.log(text)
        if not isinstance(error, ReapcError):
            self.log.log("".join(traceback.format_exception(error)))
            text = (
                f"{type(error).__name__}: {error}\nThis is a fault of reapc or of a library, not of the recipe. --keep "
                f"FOLDER keeps its traceback in {self.log.path.name}."
            )
        first, *rest = text.splitlines() or [""]
        row.seen, row.words = first, tuple(line for line in rest if line.strip())[-LAST_WORDS:]
        self.tell(row)
        raise _Failed from error

    def next_row(self) -> Step:
        """The first step that was not reached."""
        return next(row for row in self.rows if row.state == "not reached")


@dataclass(kw_only=True)
class _WatchedPasses(Passes):
    """Passes whose conversion is a step, in which llama.cpp's own figures of the file are held against the pruned
    checkpoint's."""

    steps: Steps
    held_out: Tokens

    def convert(self, pruned: Staged, outtype: str) -> Staged:
        with self.steps.step("convert") as row:
            converted = super().convert(pruned, outtype)
            found = compare(pruned.path, converted.path, self.held_out, self.progress)
            row.seen = f"GGUF in {outtype} against the pruned checkpoint: KL {found.kl:.5f}, top-1 {found.top1:.1%}"
            if found.kl > CONVERTED_KL:
                raise CannotBeDone(
                    f"what llama.cpp computes of the converted file is another model than the pruned checkpoint: KL "
                    f"{found.kl:.3f}"
                )
        return converted


class _Watched(Build):
    """A build in a stage cache of its own, whose passes are steps."""

    def __init__(self, recipe: Recipe, log: Log, stages: Path, steps: Steps) -> None:
        super().__init__(recipe, log, cache=StageCache(stages, log.log))
        self.steps = steps
        self.passes = _WatchedPasses(**vars(self.passes), steps=steps, held_out=self.inputs.held_out)

    def _observe(self) -> Any:
        with self.steps.step("observe") as row:
            found = super()._observe()
            row.seen = f"{_amount(self.inputs.calibration)} through {self.inputs.checkpoint.spec.num_layers} layers"
        return found

    def _prune(self, kept: dict[int, list[int]], plan: Plan, *others: Any) -> Any:
        with self.steps.step("prune") as row:
            found = super()._prune(kept, plan, *others)
            row.seen = f"{plan.chosen.experts_kept} of {plan.num_experts} experts kept in {len(kept)} layers"
        return found

    def _quantize(self, pruned: Staged, plan: Plan) -> Path:
        if plan.chosen.engine != "llama.cpp":
            with self.steps.step("convert") as row:
                row.state, row.seen = "skipped", "vLLM reads the checkpoint itself"
        with self.steps.step("quantize") as row:
            found = super()._quantize(pruned, plan)
            row.seen = f"{plan.chosen.format}, {format_bytes(result_bytes(found))}"
        return found

    def _fidelity(self, result: Path, reference: Path) -> Any:
        with self.steps.step("verify") as row:
            found = super()._fidelity(result, reference)
            row.seen = f"KL {found.kl:.4f}, top-1 {found.top1:.1%} on {_amount(self.inputs.held_out)}"
        return found

    def _emit(self, out: Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        with self.steps.step("emit") as row:
            manifest = super()._emit(out, *arguments, **named)
            row.seen = f"{len(manifest['files'])} files, {_fit_words(manifest)}"
        return manifest


def rehearse(
    recipe: Recipe, folder: Path, *, serve: bool = True, tell: Callable[[Step], None] = lambda step: None,
    begun: Callable[[Plan], None] = lambda plan: None,
) -> Report:  # fmt: skip
    """Rehearses ``recipe`` in ``folder``, which is empty or not there. ``begun`` is called with the real plan, ``tell``
    with each step that ends.

    ReapcError where the real recipe cannot be planned; what comes after that is told in the report."""
    model = recipe.model
    where = f"{model.source}/config.json"
    config = config_of(model.source, model.revision, recipe.base)
    spec = model_spec(config, where)
    usual = make_plan(recipe, spec, model.source)
    plan = make_plan(recipe, spec, model.source, buildable=True)
    begun(plan)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "rehearsal.log")
    steps = Steps(tell, log)
    report = Report(plan, folder, steps.rows)
    if usual.chosen.format != plan.chosen.format:
        report.notes.append(f"`reapc plan` chooses {usual.chosen.format}, which a build of this version cannot write")
    try:
        rehearsed = _prepare(recipe, config, spec, plan, folder, steps, report)
        with steps.step("check") as row:
            build = _Watched(rehearsed.recipe, log, folder / "stages", steps)
            row.seen = f"{build.inputs.checkpoint.spec.model_type} can be built; tools and calibration text are there"
        try:
            build.run(folder / "out")
        except _Failed:
            raise
        except Exception as error:  # between two passes: the one that was to come did not
            steps.fail(steps.next_row(), error)
        _serve(folder / "out", plan.chosen.engine, serve, steps)
    except _Failed:
        pass
    return report


def _prepare(
    recipe: Recipe, config: dict[str, Any], spec: ModelSpec, plan: Plan, folder: Path, steps: Steps, report: Report
) -> Rehearsed:
    """The tiny model's config, recipe and files."""
    path = folder / "model"
    path.mkdir(exist_ok=True)
    with steps.step("shrink") as row:
        vocabulary = write_tokenizer(path, str(config["model_type"]))
        shrunk = shrink(config, plan.model, plan.chosen.experts_kept, vocabulary)
        rehearsed = rehearsal_of(recipe, plan, spec, shrunk, path)
        report.notes += rehearsed.notes
        row.seen = _shrunk_words(spec, shrunk)
    with steps.step("make") as row:
        written = write_checkpoint(shrunk, path)
        kind = f"{published_format(shrunk.spec)}, as the source" if shrunk.spec.quantization else shrunk.spec.dtype
        row.seen = f"{written.tensors:,} tensors, {format_bytes(written.bytes)}, {kind}"
        if shrunk.spec.vision_parameters and not written.vision:
            report.notes.append("the vision tower has no weights here: the installed transformers has none like it")
    return rehearsed


def _shrunk_words(spec: ModelSpec, shrunk: Shrunk) -> str:
    tiny = shrunk.spec
    kinds = len({layer.kind for layer in tiny.layers})
    mtp = f" and {len(tiny.mtp_layers)} MTP" if tiny.mtp_layers else ""
    return (
        f"{tiny.num_layers}{mtp} of {spec.num_layers} layers ({kinds} kind{'s' if kinds > 1 else ''}), "
        f"{tiny.num_experts} of {spec.num_experts} experts, top-{tiny.top_k}, hidden {tiny.hidden_size} of "
        f"{spec.hidden_size}"
    )


def _serve(out: Path, engine: str, wanted: bool, steps: Steps) -> None:
    """Starts serve.sh, asks for one completion, and stops it."""
    with steps.step("serve") as row:
        if not wanted:
            row.state, row.seen = "skipped", "--no-serve"
        elif engine == "vllm" and shutil.which("vllm") is None:
            row.state, row.seen = "skipped", "no vllm command on PATH"
        else:
            row.seen = _completion(out)


def _completion(out: Path) -> str:
    from reapc.serving.built import read_built
    from reapc.serving.watch import Serving

    log = out.parent / "serve.log"
    with Serving(read_built(out), "127.0.0.1", free_port(), log) as serving:
        ready = serving.wait(READY_SECONDS, lambda seconds, line: None)
        answer = serving.client.stream(PROMPT, ANSWER_TOKENS)
        stopped = serving.server.stop()
    how = "stopped cleanly" if stopped else "had to be killed"
    return f"ready after {format_seconds(ready)}, {answer.tokens} tokens answered, {how}"


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _amount(tokens: Tokens) -> str:
    return f"{tokens.sequences} x {tokens.length} tokens"


def _fit_words(manifest: dict[str, Any]) -> str:
    row = next((row for row in manifest["fit"] if row["name"] == "weights"), None)
    if row is None or row["actual_bytes"] is None:
        return "weights not measured"
    predicted, real = row["predicted_bytes"], row["actual_bytes"]
    if predicted == real:
        return f"weights of {real:,} bytes as predicted"
    return f"weights of {real:,} bytes, {predicted:,} predicted"
