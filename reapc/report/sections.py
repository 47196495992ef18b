"""What the sections of a build's report show. Each function gives its template's values, or raises Missing with the
sentence that stands in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reapc.plan import Candidate, Plan
from reapc.report import tables
from reapc.report.data import BuildData, Missing
from reapc.report.devices import equal_devices, names_of
from reapc.report.heatmap import heat_map, legend
from reapc.report.svg import Plot, bar, figures
from reapc.report.tables import Table
from reapc.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from reapc.prune.stability import Stability

PARTS = (
    ("weights", "c0"), ("KV cache", "c1"), ("state", "c2"), ("workspace", "c3"), ("overhead", "c4"),
)  # fmt: skip


def decision(data: BuildData) -> dict[str, Any]:
    """What was chosen, why, and what was not."""
    plan = data.plan
    prior = data.plans.get("from_prior")
    chosen = plan.chosen
    changed = ""
    if prior and (prior.chosen.experts_kept, prior.chosen.format) != (chosen.experts_kept, chosen.format):
        changed = (
            f"Before anything was observed the plan was {prior.chosen.experts_kept} experts in {prior.chosen.format}; "
            "the scores changed it."
        )
    found = data.manifest.get("fidelity")
    measured = found.get("kl") if isinstance(found, dict) else None
    return {
        "plan": plan,
        "rows": list(decision_rows(data).items()),
        "changed": changed,
        "predicted": tables.kl(chosen.predicted_loss),
        "measured": None if measured is None else tables.kl(measured),
        "runners_up": _candidates(plan.runners_up, plan) if plan.runners_up else None,
        "refused": _refused(plan) if plan.refused else None,
        "choice": _choice(data.manifest.get("choice")),
    }


def _choice(choice: Any) -> dict[str, Any] | None:
    """How the criterion was chosen, where it was measured: the winner's reason, and the losers' figures."""
    if not isinstance(choice, dict) or "winner" not in choice:
        return None
    rows = []
    for name, own in (choice.get("candidates") or {}).items():
        against = own.get("kl_less_reap") or {}
        interval = against.get("interval")
        rows.append(
            [
                name, tables.percent(own.get("layer_error")), tables.kl(own.get("kl")), tables.percent(own.get("top1")),
                tables.NONE if not against else f"{against['mean']:+.4f}", tables.signed(interval),
                f"the same experts as {own['same_as']}" if own.get("same_as") else "",
            ]
        )  # fmt: skip
    head = ("criterion", "lost of a layer's output", "KL", "top-1", "KL less reap's", "95 % interval", "")
    protected = {layer: list(experts) for layer, experts in (choice.get("protected") or {}).items() if experts}
    return {
        "winner": str(choice["winner"]),
        "why": str(choice.get("why", "")),
        "table": Table("Criteria, measured on calibration text", head, rows, (0, 6)) if rows else None,
        "left_out": [f"{name}: {why}" for name, why in (choice.get("left_out") or {}).items()],
        "protected": "; ".join(f"layer {layer}: {', '.join(map(str, found))}" for layer, found in protected.items()),
    }


def decision_rows(data: BuildData) -> dict[str, str]:
    """The decision in words, by what it is of."""
    plan = data.plan
    chosen, place = plan.chosen, plan.chosen.placement
    if chosen.engine == "llama.cpp":
        layout = "layers per device " + ", ".join(map(str, place.layers_per_device))
        if place.offloaded_layers:
            layout += f"; experts of the first {place.offloaded_layers} layers in RAM"
    else:
        layout = (
            f"tensor parallel {place.tensor_parallel}, pipeline parallel {place.pipeline_parallel}, "
            f"expert parallel {place.expert_parallel}"
        )
    ceiling = chosen.decode_tokens_per_second_ceiling
    return {
        "Model": f"{plan.model} ({plan.family}, {plan.num_experts} experts per layer, {plan.top_k} per token)",
        "Target": plan.target,
        "Experts kept": f"{chosen.experts_kept} of {plan.num_experts} per layer ({chosen.prune_ratio:.1%} pruned)",
        "Criterion": plan.criterion,
        "Healed": _healed(data.manifest.get("healing")),
        "Healed after quantization": _healed(data.manifest.get("healing_quantized")),
        "Format": f"{chosen.format}, {chosen.bits_per_expert_weight:.2f} bits per expert weight",
        "Engine": chosen.engine,
        "Layout": layout,
        "Context": f"{chosen.context:,} tokens x {chosen.concurrency}, KV cache in {chosen.kv_dtype}",
        "Decoding": f"at most {ceiling:,.0f} tokens/s by bandwidth" if ceiling else "bandwidth not known",
    }


def _candidates(candidates: Sequence[Candidate], plan: Plan) -> Table:
    rows = [
        [
            item.engine, item.format, f"{item.experts_kept} of {plan.num_experts}",
            f"{item.bits_per_expert_weight:.2f}", format_bytes(item.file_bytes),
            format_bytes(item.placement.fullest.free_bytes), tables.kl(item.predicted_loss),
        ]
        for item in (plan.chosen, *candidates)
    ]  # fmt: skip
    head = ("engine", "format", "experts", "bits", "file", "free on the fullest", "predicted KL")
    return Table("The choice, then the runners-up, best first", head, rows, (0, 1))


def _refused(plan: Plan) -> Table:
    grouped: dict[tuple[str, str], list[str]] = {}
    for refusal in plan.refused:
        grouped.setdefault((refusal.engine, refusal.reason), []).append(refusal.format)
    rows = [[engine, ", ".join(dict.fromkeys(names)), reason] for (engine, reason), names in grouped.items()]
    return Table("Refused, with the reason", ("engine", "formats", "reason"), rows, (0, 1, 2))


def memory(data: BuildData) -> dict[str, Any]:
    """Bytes per device, as predicted, and what the result really is."""
    devices = data.plan.chosen.placement.devices
    bars, rows = [], []
    for group in equal_devices(devices):
        d = group[0]
        amounts = (d.weights_bytes, d.kv_bytes, d.state_bytes, d.workspace_bytes, d.overhead_bytes)
        capacity = format_bytes(d.capacity_bytes) if d.given else "a capacity that nobody stated"
        said = f"{format_bytes(d.used_bytes)} of {capacity}"
        free = f", {format_bytes(d.free_bytes)} free" if d.given else ""
        parts = [(float(amount), f"fill {css}") for amount, (_, css) in zip(amounts, PARTS, strict=True)]
        whole = max(d.capacity_bytes, d.used_bytes, 1)
        bars.append(
            {"name": names_of(group), "said": said + free, "bar": bar(f"{names_of(group)}: {said}{free}", parts, whole)}
        )
        rows.append(
            [names_of(group), *map(tables.size, amounts), capacity, format_bytes(d.free_bytes) if d.given else "-"]
        )
    present = [i for i in range(len(PARTS)) if any(row[1 + i] != tables.size(0) for row in rows)]
    head = ["device", *(PARTS[i][0] for i in present), "capacity", "free"]
    table = Table("Predicted bytes per device", head, [[r[0], *(r[1 + i] for i in present), *r[-2:]] for r in rows])
    fit = data.manifest.get("fit") or []
    proof = [
        [
            str(row["name"]), tables.size(row["predicted_bytes"]),
            "not measured" if row["actual_bytes"] is None else tables.size(row["actual_bytes"]),
            tables.NONE if row["actual_bytes"] is None else f"{row['actual_bytes'] - row['predicted_bytes']:+,}",
            str(row["source"]),
        ]
        for row in fit
    ]  # fmt: skip
    proof_head = ("bytes", "predicted", "real", "difference", "measured by")
    return {
        "bars": bars,
        "legend": [PARTS[i] for i in present],
        "parts": table,
        "proof": Table("Predicted and real bytes", proof_head, proof, (0, 4)) if proof else None,
    }  # fmt: skip


def experts(data: BuildData) -> dict[str, Any]:
    """Scores and routed tokens of every expert, and which of them stay."""
    from reapc.prune.criteria import CRITERIA

    scores, kept = data.scores, data.kept
    sums = {layer: scores.layer(layer) for layer in scores.layers}
    if not sums:
        raise Missing("No layer with experts was observed.")
    chosen_by = data.plan.criterion
    criterion = chosen_by if chosen_by in CRITERIA else "reap"  # what gives no value to each expert is drawn by reap
    worth = {layer: found[CRITERIA[criterion]] for layer, found in sums.items()}
    routed = {layer: found["routed_tokens"] for layer, found in sums.items()}
    used = {layer: counts > 0 for layer, counts in routed.items()}
    rows, lost = [], []
    for layer, values in worth.items():
        stays = np.zeros(len(values), bool)
        stays[kept.get(layer, range(len(values)))] = True
        mass = sums[layer]["gate_norm_sum"]
        share = [1 - found[stays].sum() / max(found.sum(), 1e-300) for found in (routed[layer], mass)]
        lost.append(share)
        cut = f"{figures(values[stays].min())} / {figures(values[~stays].max())}" if not stays.all() else tables.NONE
        rows.append(
            [
                str(layer), str(int(stays.sum())), cut, tables.percent(share[0]), tables.percent(share[1]),
                f"{int(routed[layer].min()):,} / {int(np.median(routed[layer])):,} / {int(routed[layer].max()):,}",
                str(int((~used[layer]).sum())),
            ]
        )  # fmt: skip
    head = (
        "layer", "kept", "least kept / most dropped", "routed tokens dropped", "saliency dropped",
        "routed tokens, least / median / most", "never routed to",
    )  # fmt: skip
    name = f"Scores ({criterion})"
    mean = np.mean(lost, axis=0)
    return {
        "criterion": criterion,
        "chosen_by": chosen_by,
        "ranked": heat_map(worth, kept, used, name, ranked=True),
        "placed": heat_map(worth, kept, used, name, ranked=False),
        "routed": heat_map(routed, kept, used, "Routed tokens", ranked=False),
        "legend": legend(),
        "tokens": f"{int(scores.header['tokens']):,}",
        "dropped": [tables.percent(float(value)) for value in mean],
        "layers": Table("Experts by layer", head, rows, ()),
        "never": sum(int((~found).sum()) for found in used.values()),
    }


def _healed(healing: Any) -> str:
    if not isinstance(healing, dict) or not healing:
        return "no"
    return "yes" if healing.get("healed") else "tried, and not kept: it made the result worse"


def healing(data: BuildData) -> dict[str, Any]:
    """What refitting the experts gave back, by layer: after pruning, and once more after quantization."""
    steps = [
        _healing_step(found, after, lacked)
        for key, after, lacked in (
            ("healing", "before quantization", "the pruned layer"),
            ("healing_quantized", "after quantization", "the quantized layer"),
        )
        if (found := data.manifest.get(key))
    ]
    if not steps:
        raise Missing("This build was not healed (prune.heal and quantize.heal in the recipe).")
    return {"steps": steps}


def _healing_step(found: Mapping[str, Any], when: str, lacked: str) -> dict[str, Any]:
    layers = found["layers"]
    plot = Plot.of(
        f"Residual left after healing, of {len(layers)} layers, in percent of what {lacked} lacked",
        (0, len(layers)), (0, 100), height=200,
        x_label="layer", y_label="% of the residual left", x_marks=[],
    )  # fmt: skip
    plot.level(100, "as pruned")
    for place, layer in enumerate(layers):
        fit, other = (100 * _left(layer[part]) for part in ("fit", "choice"))
        said = f"layer {layer['layer']}: {other:.1f} % left on other tokens, {fit:.1f} % on those fitted"
        if not layer["kept"]:
            other, said = 100.0, said + "; not kept"
        plot.column(place + 0.1, place + 0.9, other, 0 if layer["kept"] else 4, said)
        plot.line([(place + 0.1, fit), (place + 0.9, fit)], 3)
    every = max(1, -(-len(layers) // 12))
    named = {place + 0.5: str(layer["layer"]) for place, layer in enumerate(layers) if place % every == 0}
    plot.x.marks, plot.x.format = list(named), named.__getitem__
    rows = [
        [
            str(layer["layer"]), f"{layer['choice'][0]:.3g}",
            *(tables.percent(1 - _left(layer[part])) for part in ("fit", "choice")),
            "yes" if layer["kept"] else "no", str(layer["changed"]),
        ]
        for layer in layers
    ]  # fmt: skip
    head = (
        "layer",
        "lacking, mean square",
        "removed, fitted tokens",
        "removed, other tokens",
        "kept",
        "experts changed",
    )
    before, after = found["before"], found["after"]
    return {
        "when": when,
        "healed": bool(found["healed"]),
        "some_left": not all(layer["kept"] for layer in layers),
        "plot": plot.render(),
        "layers": Table("Residual by layer", head, rows, ()),
        "outcome": Table(
            f"The model {when}, on {after['tokens']:,} tokens that nothing was fitted to",
            ("", "KL", "top-1"),
            [
                [name, tables.kl(f["kl"]), tables.percent(f["top1"])]
                for name, f in (("unhealed", before), ("healed", after))
            ],
        ),
    }


def _left(pair: Sequence[float]) -> float:
    return float(pair[1] / max(pair[0], 1e-300))


def stability(data: BuildData) -> dict[str, Any]:
    """How far the choice of experts depends on the calibration text."""
    from reapc.prune.stability import Stability

    stored = data.get("stability", "how stable the choice is")
    found = Stability(**stored)
    drawn = None
    if found.curve:
        plot = Plot.of(
            "Share of the dropped experts that a part of the data already names",
            (0, max(tokens for _, tokens, _ in found.curve)), (0, 100), x_label="calibration tokens",
            y_label="% of the dropped experts in common", x_format=_thousands, height=200,
        )  # fmt: skip
        plot.line([(tokens, 100 * share) for _, tokens, share in found.curve])
        for sequences, tokens, share in found.curve:
            plot.mark(tokens, 100 * share, f"{sequences:,} sequences, {tokens:,} tokens: {100 * share:.0f} %")
        plot.level(100 * found.chance, "by chance")
        drawn = plot.render()
    rows = [[a, b, f"{100 * share:.0f} %"] for a, b, share in sorted(found.domains, key=lambda pair: pair[2])]
    head = ("domain", "and domain", "dropped experts in common")
    return {
        "lines": [line[0].upper() + line[1:] + "." for line in _stability_lines(found)],
        "plot": drawn,
        "domains": Table("Domains by themselves", head, rows, (0, 1)) if rows else None,
    }


def _stability_lines(found: Stability) -> list[str]:
    """What it says in words; many pairs of domains that disagree are one line, the table has them all."""
    lines, pairs = found.lines(), found.disagreeing
    if len(pairs) < 3:
        return lines
    start = 0 if found.halves is None else 1
    one = (
        f"{len(pairs)} of {len(found.domains)} pairs of domains would drop other experts for the most part (down to "
        f"{100 * min(pair[2] for pair in pairs):.0f} % in common): the mix decides which of them is served"
    )
    return [*lines[:start], one, *lines[start + len(pairs) :]]


def _thousands(value: float) -> str:
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def provenance(data: BuildData) -> dict[str, Any]:
    """What this was made from, with what, and how to make it again."""
    manifest = data.manifest
    recipe = manifest.get("recipe") or {}
    seed = (recipe.get("calibration") or {}).get("seed") if isinstance(recipe, dict) else None

    def text(key: str) -> str:
        if not (found := manifest.get(key)):
            return ""
        amount = f", {found['sequences']:,} sequences" if "sequences" in found else ""
        return f"{found.get('source') or 'not named'}: {found.get('tokens', 0):,} tokens{amount}"

    facts = {
        "Command": manifest.get("command"),
        "Date": manifest.get("date"),
        "Model": data.model,
        "Model digest": (manifest.get("model") or {}).get("digest"),
        "Calibration": text("calibration"),
        "Calibration digest": (manifest.get("calibration") or {}).get("digest"),
        "Held-out text": text("held_out"),
        "Held-out digest": (manifest.get("held_out") or {}).get("digest"),
        "Seed": seed,
        "Build key": manifest.get("key"),
    }
    stages = manifest.get("stage_seconds") or {}
    reused = set(manifest.get("reused") or ())
    rows = [[name, "reused" if name in reused else format_seconds(value)] for name, value in stages.items()]
    files = [[name, f"{size:,}"] for name, size in sorted((manifest.get("files") or {}).items())]
    total = manifest.get("seconds")
    if total is not None:
        rows.append(["all, with checks", format_seconds(total)])
    return {
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "versions": Table("Versions", ("package", "version"), list((manifest.get("versions") or {}).items()), (0, 1)),
        "stages": Table("Stages", ("stage", "time"), rows),
        "files": Table("Files", ("file", "bytes"), files),
        "recipe": json.dumps(_given(recipe), indent=2, ensure_ascii=False) if recipe else "",
    }  # fmt: skip


def _given(value: Any) -> Any:
    """A recipe without what it leaves open."""
    if isinstance(value, dict):
        return {k: _given(v) for k, v in value.items() if v is not None and v != "" and v != {}}
    return value
