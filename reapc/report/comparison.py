"""Two builds side by side, from what their folders say: nothing is run. A difference is B minus A."""

from __future__ import annotations

from typing import Any

import numpy as np

from reapc.report.data import BuildData, Missing
from reapc.report.loss import sums_of

_FIT = ("name", "predicted_bytes", "actual_bytes", "source")
NOT_TOLD = "one of the builds does not tell"


def compare_builds(a: BuildData, b: BuildData) -> dict[str, Any]:
    """JSON data: ``a`` and ``b`` by themselves; ``not_comparable``, why their KLs must not be set against each other
    (empty where they may); ``fidelity`` by domain; ``kept`` by layer; ``stage_seconds``."""
    reason = not_comparable(a, b)
    return {
        "a": _build(a),
        "b": _build(b),
        "not_comparable": reason,
        "fidelity": fidelity(a, b, reason),
        "kept": kept(a, b),
        "stage_seconds": {
            name: [_seconds(build, name) for build in (a, b)]
            for name in dict.fromkeys(name for build in (a, b) for name in build.manifest.get("stage_seconds") or {})
        },
    }  # fmt: skip


def _seconds(build: BuildData, stage: str) -> float | str | None:
    """Seconds of a stage, or "reused"; None where it is none of this build's."""
    if stage in (build.manifest.get("reused") or ()):
        return "reused"
    found = (build.manifest.get("stage_seconds") or {}).get(stage)
    return None if found is None else float(found)


def _build(data: BuildData) -> dict[str, Any]:
    manifest = data.manifest
    try:
        chosen: dict[str, Any] | None = {
            "model": data.plan.model, "target": data.plan.target, "num_experts": data.plan.num_experts,
            "criterion": data.plan.criterion, **data.plan.chosen.summary(), "reasons": list(data.plan.reasons),
        }  # fmt: skip
    except Missing:
        chosen = None
    return {
        "folder": str(data.folder),
        "name": data.name,
        "date": manifest.get("date"),
        "reapc": (manifest.get("versions") or {}).get("reapc"),
        "model_digest": original(data),
        "held_out_digest": data.held_out_digest,
        "experts_kept": manifest.get("experts_kept"),
        "format": manifest.get("format"),
        "engine": manifest.get("engine"),
        "plan": chosen,
        "fit": [{key: row[key] for key in _FIT} for row in manifest.get("fit") or []],
        **{name: _healed(manifest.get(name)) for name in ("healing", "healing_quantized")},
        "seconds": manifest.get("seconds"),
    }


def _healed(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: found.get(key) for key in ("healed", "before", "after")} if found else None


def original(data: BuildData) -> str | None:
    """Digest of the model that was compiled."""
    found = (data.manifest.get("model") or {}).get("digest")
    return None if found is None else str(found)


def not_comparable(a: BuildData, b: BuildData) -> str:
    """Why the KLs of two builds must not be set against each other; empty where they may."""
    for what, first, second in (
        ("originals", original(a), original(b)),
        ("held-out texts", a.held_out_digest, b.held_out_digest),
    ):
        if first is None or second is None:
            return f"whether the {what} are the same is not known: {NOT_TOLD}"
        if first != second:
            return f"the {what} differ (digests {first[:12]} and {second[:12]})"
    return ""


def fidelity(a: BuildData, b: BuildData, reason: str) -> dict[str, Any]:
    """Figures of both by domain (``all`` first). With ``difference``, KL of B minus KL of A, paired by sequence, where
    they may be compared: its ``interval`` is over sequences, None where sequences were not stored or are too few."""
    found = [build.manifest.get("fidelity") or {} for build in (a, b)]
    rows = [{"all": f, **(f.get("domains") or {})} if f else {} for f in found]
    details = [_detail(build) for build in (a, b)]
    result: dict[str, Any] = {}
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        sides = [
            _figures(row[name], detail, name) if name in row else None
            for row, detail in zip(rows, details, strict=True)
        ]
        entry: dict[str, Any] = dict(zip("ab", sides, strict=True))
        first, second = sides
        if not reason and first and second:
            entry["difference"] = {
                "kl": second["kl"] - first["kl"],
                "interval": _paired(details[0], details[1], name),
                "top1": second["top1"] - first["top1"],
            }
        result[name] = entry
    return result  # fmt: skip


def _figures(row: dict[str, Any], detail: dict[str, Any] | None, name: str) -> dict[str, Any]:
    from reapc.verify.intervals import mean_interval

    interval = mean_interval(*sums_of(detail, name, "kl")) if detail else None
    kept = {key: row[key] for key in ("kl", "top1", "perplexity_a", "perplexity_b", "tokens")}
    return {**kept, "interval": None if interval is None else list(interval)}


def _paired(a: dict[str, Any] | None, b: dict[str, Any] | None, name: str) -> list[float] | None:
    from reapc.verify.intervals import mean_interval

    if a is None or b is None or a["held_out"] != b["held_out"]:
        return None
    first, counts = sums_of(a, name, "kl")
    second, _ = sums_of(b, name, "kl")
    interval = mean_interval(second - first, counts)
    return None if interval is None else list(interval)


def _detail(data: BuildData) -> dict[str, Any] | None:
    try:
        return data.detail
    except Missing:
        return None


def kept(a: BuildData, b: BuildData) -> dict[str, Any]:
    """Experts kept by layer: how many A keeps, how many B, how many of these are the same, and how many would be by
    chance. ``layers`` is empty, and ``reason`` says why, where expert numbers do not mean the same in both."""
    if original(a) is None or original(a) != original(b):
        return {"layers": {}, "reason": "the builds are not known to be of one original"}
    try:
        first, second, experts = a.kept, b.kept, int(a.plan.num_experts)
    except Missing as error:
        return {"layers": {}, "reason": str(error)}
    layers = {
        str(layer): {
            "a": len(first[layer]), "b": len(second[layer]),
            "common": len(set(first[layer]) & set(second[layer])),
            "chance": len(first[layer]) * len(second[layer]) / experts,
        }
        for layer in sorted(set(first) & set(second))
    }  # fmt: skip
    share = float(np.mean([row["common"] / min(row["a"], row["b"]) for row in layers.values()])) if layers else None
    return {"layers": layers, "share": share, "reason": ""}
