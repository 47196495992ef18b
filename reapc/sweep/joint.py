"""Joint mixes of a sweep: for every budget the expert count and each tensor's type, as the allocator chooses them, in a
GGUF file and in a checkpoint for vLLM, as far as the formats ask for either."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from reapc.allocate.allocation import decide, measured
from reapc.allocate.checkpoints import decide_methods, measured_checkpoints, prober_of_checkpoint
from reapc.allocate.in_build import SEQUENCES
from reapc.allocate.masks import by_criterion
from reapc.allocate.record import allocation_json
from reapc.allocate.sensitivity import Prober
from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import make_folder, remove, write_text
from reapc.engines import vllm_rules
from reapc.engines.vllm_rules import Layout
from reapc.errors import CannotBeDone
from reapc.formats import writers
from reapc.formats.gguf_types import DEFAULT_TYPES
from reapc.planner.cards import parts_of_methods
from reapc.planner.checkpoint_units import CheckpointParts
from reapc.planner.question import kept_counts
from reapc.prune.criteria import CRITERIA, groups_of
from reapc.quantize.imatrix import entries_of
from reapc.stages import StageCache, digest_of
from reapc.sweep.grid import Budget, Mix
from reapc.sweep.run import Sweep

Decide = Callable[[int], dict[str, Any]]  # the allocation of so many bytes; CannotBeDone where nothing fits


def joint_mixes(sweep: Sweep, budgets: Sequence[Budget], formats: Sequence[str], max_ratio: float) -> list[Mix]:
    """One mix for each budget that holds any, as a GGUF file where ``formats`` has types of those, and as a checkpoint
    where it has formats of vLLM's, in their methods and group sizes."""
    spec = sweep.passes.checkpoint.spec
    counts = kept_counts(spec, max_ratio=max_ratio, dissolve_groups=sweep.settings.dissolve_groups)
    allocator = _Allocator(sweep, counts)
    found: list[Mix] = []
    if any(fmt in DEFAULT_TYPES for fmt in formats):
        for budget, chosen in allocator.allocations(budgets, allocator.files, {}):
            types = tuple(sorted(chosen["types"].items()))
            found.append(Mix(_name(budget), chosen["experts"], chosen["data_bytes"], types=types))
    if every := _methods(spec, formats):
        options = {"methods": {parts.method: parts.types() for parts in every}}
        for budget, chosen in allocator.allocations(budgets, lambda: allocator.checkpoints(every), options):
            label = f"joint-{chosen['method']}@{_name(budget).partition('@')[2]}"
            found.append(Mix(chosen["format"], chosen["experts"], chosen["data_bytes"], label=label))
    remove(allocator.work)
    return found


def _name(budget: Budget) -> str:
    return f"joint@{budget.name.replace(' ', '')}"


def _methods(spec: ModelSpec, formats: Sequence[str]) -> list[CheckpointParts]:
    """Of each method that ``formats`` name, as far as it is written here and vLLM serves it on one card."""
    alone = Layout(1, 1, 1)
    return parts_of_methods(
        spec, (name for name in formats if name not in DEFAULT_TYPES),
        lambda fmt: writers.writer(fmt, spec=spec) is not None,
        lambda fmt, group: vllm_rules.group_refusal(spec, fmt, group, alone)[0],
    )  # fmt: skip


class _Allocator:
    """What measures for all budgets of a sweep, in the folder ``work``."""

    def __init__(self, sweep: Sweep, counts: Sequence[int]) -> None:
        self.sweep, self.counts = sweep, counts
        self.spec = sweep.passes.checkpoint.spec
        named = [criterion for criterion in sweep.settings.criteria if criterion in CRITERIA]
        self.criterion = named[-1] if named else "reap"
        self.dissolve = sweep.settings.dissolve_groups
        self.work = sweep.out / "stages" / "joint"
        self.text = sweep.passes.calibration.evenly(SEQUENCES)
        self.facts = {"criterion": self.criterion}

    def allocations(
        self, budgets: Sequence[Budget], begin: Callable[[], Decide], options: dict[str, Any]
    ) -> list[tuple[Budget, dict[str, Any]]]:
        """The allocation of every budget that holds any; of those that were found before, as they were. ``begin``
        measures, once; ``options``: what its choices depend on."""
        sweep, decided = self.sweep, None
        found: list[tuple[Budget, dict[str, Any]]] = []
        for budget in budgets:
            depends = {
                **sweep.common(), "budget": budget.bytes, "counts": self.counts, "criterion": self.criterion, **options,
            }  # fmt: skip
            path = sweep.out / "allocations" / f"{digest_of(depends)[:16]}.json"
            if not path.is_file():
                decided = decided or begin()
                try:
                    chosen = decided(budget.bytes)
                except CannotBeDone as error:
                    sweep.progress.log(f"joint, {budget.name}: {error}")
                    continue
                make_folder(path.parent)
                write_text(path, json.dumps(chosen, indent=2) + "\n")
            found.append((budget, json.loads(path.read_text())))
        return found

    def files(self) -> Decide:
        """Of GGUF files."""
        sweep, spec = self.sweep, self.spec
        sweep.passes.cache = StageCache(self.work, sweep.progress.log)
        base, _ = sweep.passes.convert(sweep.passes.source, "bf16")
        entries = entries_of(sweep.scores, spec)
        prober = Prober(base, self.text, entries, self.work / "probes", sweep.progress, os.cpu_count() or 1)
        damages = measured(
            spec, base, sweep.scores, self.counts, self.criterion, sweep.progress, prober=prober, dissolve=self.dissolve
        )
        return lambda budget: allocation_json(damages, spec, budget, decide(damages, budget, prober), self.facts)

    def checkpoints(self, every: Sequence[CheckpointParts]) -> Decide:
        """Of checkpoints, in the method that loses least."""
        sweep, checkpoint = self.sweep, self.sweep.passes.checkpoint
        prober = prober_of_checkpoint(
            checkpoint, every, self.text, self.work / "checkpoint-probes", sweep.progress, dissolve=self.dissolve,
            scores=sweep.scores,
        )  # fmt: skip
        kept = by_criterion(sweep.scores, self.criterion, groups_of(self.spec, self.dissolve))
        damages = measured_checkpoints(
            checkpoint, every, sweep.scores, self.counts, kept, sweep.progress, prober=prober
        )

        def allocation(budget: int) -> dict[str, Any]:
            best, decided, methods = decide_methods(damages, budget, prober)
            return allocation_json(best, self.spec, budget, decided, {**self.facts, "methods": methods})

        return allocation
