"""Joint mixes of a sweep: for every budget the expert count and each tensor's type, as the allocator chooses them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from reapc.allocate.allocation import Damages, decide, measured
from reapc.allocate.record import allocation_json
from reapc.allocate.sensitivity import Prober
from reapc.checkpoint.atomic import make_folder, remove, write_text
from reapc.errors import CannotBeDone
from reapc.planner.question import kept_counts
from reapc.prune.criteria import CRITERIA
from reapc.quantize.imatrix import entries_of
from reapc.stages import StageCache, digest_of
from reapc.sweep.grid import Budget, Mix
from reapc.sweep.run import Sweep

SEQUENCES = 32  # of the calibration text, to measure KL on


def joint_mixes(sweep: Sweep, budgets: Sequence[Budget], max_ratio: float) -> list[Mix]:
    """One mix for each budget that holds any; nothing where llama.cpp does not know the model."""
    passes, spec = sweep.passes, sweep.passes.checkpoint.spec
    if spec.gguf_arch is None:
        return []
    dissolve = sweep.settings.dissolve_groups
    counts = kept_counts(spec, max_ratio=max_ratio, dissolve_groups=dissolve)
    named = [criterion for criterion in sweep.settings.criteria if criterion in CRITERIA]
    criterion = named[-1] if named else "reap"
    work = sweep.out / "stages" / "joint"
    passes.cache = StageCache(work, sweep.progress.log)
    made: tuple[Damages, Prober] | None = None

    def damages() -> tuple[Damages, Prober]:
        """Measured once for all budgets."""
        base, _ = passes.convert(passes.source, "bf16")
        prober = Prober(
            base, passes.calibration.evenly(SEQUENCES), entries_of(sweep.scores, spec), work / "probes", sweep.progress,
            os.cpu_count() or 1,
        )  # fmt: skip
        found = measured(spec, base, sweep.scores, counts, criterion, sweep.progress, prober=prober, dissolve=dissolve)
        return found, prober

    found: list[Mix] = []
    for budget in budgets:
        depends = {**sweep.common(), "budget": budget.bytes, "counts": counts, "criterion": criterion}
        path = sweep.out / "allocations" / f"{digest_of(depends)[:16]}.json"
        if not path.is_file():
            made = made or damages()
            try:
                chosen = allocation_json(
                    made[0], spec, budget.bytes, decide(made[0], budget.bytes, made[1]), {"criterion": criterion}
                )
            except CannotBeDone as error:
                sweep.progress.log(f"joint, {budget.name}: {error}")
                continue
            make_folder(path.parent)
            write_text(path, json.dumps(chosen, indent=2) + "\n")
        found.append(_mix(budget, json.loads(path.read_text())))
    remove(work)
    return found


def _mix(budget: Budget, chosen: dict[str, Any]) -> Mix:
    name = f"joint@{budget.name.replace(' ', '')}"
    return Mix(name, chosen["experts"], chosen["data_bytes"], types=tuple(sorted(chosen["types"].items())))
