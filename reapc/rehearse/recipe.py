"""The recipe of the rehearsal: the real plan's decisions written down, for the tiny model on a budget that holds it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.mix import Mix
from reapc.observe.corpora.presets import resolve
from reapc.plan import Plan
from reapc.planner.search import make_plan
from reapc.recipe import Recipe, make_recipe
from reapc.rehearse.shrink import Shrunk
from reapc.rehearse.tokenizer import PRE_TOKENIZER

CONTEXT, CONCURRENCY = 512, 2
SEQUENCES, TOKENS, HELD_OUT = 16, 128, 4
ITERS = 1  # of AutoRound: that it runs is what is tried, not what it reaches


@dataclass(frozen=True)
class Rehearsed:
    """The tiny model's recipe and plan, and what was taken over from the real plan or changed, in words."""

    recipe: Recipe
    plan: Plan
    notes: tuple[str, ...]


def rehearsal_of(recipe: Recipe, real: Plan, real_spec: ModelSpec, shrunk: Shrunk, model: Path) -> Rehearsed:
    """The recipe that does to ``model``, the tiny checkpoint, what ``real`` decided. CannotBeDone where the planner
    refuses the format for the tiny widths, at any group size."""
    problem: ReapcError | None = None
    for name in _formats(real.chosen.format):
        tiny = make_recipe(_sections(recipe, real, shrunk, model, name), model.parent / f"{recipe.name}.toml")
        try:
            plan = make_plan(tiny, shrunk.spec, str(model), buildable=True)
        except ReapcError as error:
            problem = problem or error
            continue
        return Rehearsed(tiny, plan, tuple(_notes(recipe, real, real_spec, plan, shrunk, name)))
    assert problem is not None
    raise problem


def _formats(name: str) -> list[str]:
    """The plan's format, then the same with smaller groups."""
    found = re.search(r"g(\d+)", name) if weights.parse(name) else None
    if found is None:
        return [name]
    sizes = [size for size in weights.GROUPS if size < int(found[1])]
    return [name, *(name[: found.start(1)] + str(size) + name[found.end(1) :] for size in sorted(sizes, reverse=True))]


def _sections(recipe: Recipe, real: Plan, shrunk: Shrunk, model: Path, fmt: str) -> dict[str, Any]:
    chosen, quantize, prune = real.chosen, recipe.quantize, recipe.prune
    target: dict[str, Any] = recipe.target.model_dump(exclude_defaults=True)
    for key in ("vram", "vram_total", "ram"):
        if key in target:
            target[key] = f"{target[key]}B"
    if recipe.target.gpus:
        target.update(gpus=1, nodes=1)
    target["name"] = f"a part of {recipe.target.name}"
    text = _local_text(recipe)
    sections: dict[str, Any] = {
        "model": {"source": str(model.resolve())},
        "target": target,
        "serve": {
            **recipe.serve.model_dump(mode="json", exclude={"experimental"}),
            "experimental": recipe.serve.experimental,
            "engine": chosen.engine,
            "context": min(CONTEXT, recipe.serve.context),
            "concurrency": min(CONCURRENCY, recipe.serve.concurrency),
            "kv_cache": chosen.kv_dtype if recipe.serve.kv_cache == "auto" else recipe.serve.kv_cache,
            "tensor_parallel": "auto",
        },
        "prune": {
            "method": prune.method,
            "mtp": prune.mtp,
            "dissolve_groups": prune.dissolve_groups,
            "heal": prune.heal,
        },
        "quantize": {
            "method": quantize.writer,
            "format": fmt,
            "imatrix": quantize.imatrix,
            "heal": quantize.heal and fmt.lower() not in ("bf16", "f16"),
            "iters": min(ITERS, quantize.iters) if quantize.iters != "auto" else ITERS,
            "pre_tokenizer": PRE_TOKENIZER,
        },
        "calibration": {
            "data": str(text.resolve()) if text else "auto",
            "sequences": min(SEQUENCES, recipe.calibration.sequences),
            "tokens": min(TOKENS, recipe.calibration.tokens),
            "seed": recipe.calibration.seed,
        },
        "verify": {"sequences": min(HELD_OUT, recipe.verify.sequences)},
    }
    if prune.method != "none":
        sections["prune"]["experts"] = shrunk.experts_kept
    return sections


def _local_text(recipe: Recipe) -> Path | None:
    """The text file or folder that calibrates; None for what the tiny model does not read: token ids, which are those
    of the real tokenizer, and mixes, which may have to be downloaded."""
    data = recipe.calibration.data
    if isinstance(data, str) and data.endswith(".safetensors"):
        return None
    found = resolve(data, recipe.base)
    if isinstance(found, Mix):
        return Path(found.sources[0].source) if found.at_most else None
    return found


def _notes(recipe: Recipe, real: Plan, spec: ModelSpec, plan: Plan, shrunk: Shrunk, fmt: str) -> list[str]:
    chosen, tiny = real.chosen, plan.chosen
    place = chosen.placement
    notes = [
        f"from the plan of {real.model}: {chosen.engine}, {chosen.format}, {chosen.experts_kept} of {spec.num_experts} "
        f"experts ({chosen.experts_kept / spec.num_experts:.1%}); here {shrunk.experts_kept} of "
        f"{shrunk.spec.num_experts} ({shrunk.experts_kept / shrunk.spec.num_experts:.1%})",
        f"weights: {tiny.weights_bytes / chosen.weights_bytes:.2g} of the real plan's; context {tiny.context} x "
        f"{tiny.concurrency} in place of {chosen.context} x {chosen.concurrency}",
    ]
    if fmt != chosen.format:
        notes.append(f"{fmt} in place of {chosen.format}: the tiny widths do not hold its groups")
    if recipe.target.gpus > 1:
        parallel = f"TP {place.tensor_parallel}, PP {place.pipeline_parallel}, EP {place.expert_parallel}"
        layout = f"layers per card {', '.join(map(str, place.layers_per_device))}"
        notes.append(
            f"one card of {recipe.target.card} in place of {recipe.target.gpus}: the plan's layout "
            f"({parallel if chosen.engine == 'vllm' else layout}) is not rehearsed"
        )
    if place.offloaded_layers:
        notes.append(f"experts of {place.offloaded_layers} layers lie in RAM there; here everything is on the card")
    if recipe.serve.speculative != "none":
        notes.append('serve.speculative = "mtp" is kept: the launch line drafts with the MTP layers')
    if fmt.startswith("auto-round") or (recipe.quantize.method == "auto_round"):
        notes.append(f"AutoRound tunes for {ITERS} step at most")
    if (recipe.calibration.data != "auto" and _local_text(recipe) is None) or recipe.verify.data != "auto":
        notes.append(
            "calibration and held-out text are Python's documentation: token ids belong to a tokenizer, and a mix is "
            "not downloaded"
        )
    limits = (recipe.verify.max_kl, recipe.verify.min_top1, recipe.verify.max_perplexity_ratio)
    if any(limit is not None for limit in limits):
        notes.append("the limits in [verify] are not applied: random numbers say nothing about quality")
    return [*notes, *shrunk.notes]
