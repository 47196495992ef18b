"""The allocation inside a build: measured on the calibration text, under the budgets of the plan's devices, as a cached
stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from reapc import __version__
from reapc.allocate.allocation import allocation_json, decide, measured
from reapc.allocate.sensitivity import Prober
from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import remove
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.observe.scores import Scores
from reapc.passes import Passes
from reapc.plan import Plan
from reapc.planner.devices import Devices
from reapc.planner.question import from_recipe
from reapc.planner.tensor_groups import file_parts
from reapc.quantize.imatrix import entries_of
from reapc.recipe import Recipe
from reapc.stages import digest_of
from reapc.stream.tokens import Tokens
from reapc.toolchain import find_llamacpp

SEQUENCES = 32  # of the calibration text, to measure KL on


def allocates(recipe: Recipe, plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether a build allocates. CannotBeDone for a checkpoint that is quantized: its weights have no errors to add."""
    if not recipe.quantize.allocate or plan.chosen.engine != "llama.cpp":
        return False
    if checkpoint.quantization is not None:
        raise CannotBeDone(
            f"{checkpoint.folder}: quantize.allocate = true needs a checkpoint in 16 bit",
            hint="set quantize.allocate = false",
        )
    return True


def allocate_build(
    recipe: Recipe,
    plan: Plan,
    checkpoint: Checkpoint,
    scores: Scores,
    calibration: Tokens,
    passes: Passes,
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the allocation's count and bytes, and the allocation as in its file."""
    spec: ModelSpec = checkpoint.spec
    devices = Devices(plan, spec, recipe.target)
    counts = from_recipe(recipe, spec, recipe.model.source, buildable=True).counts
    progress = passes.progress
    base, base_key = passes.convert(passes.source, "bf16")
    depends = {
        "base": base_key,
        "scores": digest_of([scores.to_json(), checkpoint.digest]),
        "calibration": calibration.digest,
        "plan": plan.chosen.placement.model_dump(mode="json"),
        "counts": counts,
        "criterion": plan.criterion,
        "dissolve_groups": recipe.prune.dissolve_groups,
        "tools": find_llamacpp().version,
        "reapc": __version__,
    }

    def work(folder: Path, scratch: Path) -> None:
        rows = np.unique(np.linspace(0, calibration.sequences - 1, min(SEQUENCES, calibration.sequences)).round())
        prober = Prober(
            base, calibration.take(rows.astype(np.int64)), entries_of(scores, spec), scratch, progress,
            os.cpu_count() or 1,
        )  # fmt: skip
        damages = measured(
            spec, base, scores, counts, plan.criterion, progress, prober=prober, dissolve=recipe.prune.dissolve_groups
        )
        decided = decide(damages, lambda made: devices.budgets(made.problem(0), made.parts), prober)
        facts = {"model": recipe.model.source, "digest": checkpoint.digest, "criterion": plan.criterion}
        found = allocation_json(damages, spec, int(decided[0].best.bytes), decided, facts)
        (folder / "allocation.json").write_text(json.dumps(found, indent=2) + "\n")
        remove(scratch)

    folder, _ = passes.cache.run("allocate", depends, work)
    found = json.loads((folder / "allocation.json").read_text())
    parts = file_parts(spec)
    loss = next(
        (m["measured_kl"] for m in found["measured"] if m["experts"] == found["experts"]), found["predicted_kl"]
    )
    bits = found["bits_per_kept_expert_weight"]
    allocated = devices.planned(plan, spec, parts, found["groups"], found["experts"], loss, bits)
    progress.log(
        f"allocate: {found['experts']} experts, {bits:.2f} bits per kept expert weight; the uniform choice was "
        f"{plan.chosen.format} with {plan.chosen.experts_kept} experts"
    )
    return allocated, found
