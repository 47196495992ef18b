"""The allocation file: what was decided, what it rests on and how sure it is, as JSON; written, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reapc.allocate.allocation import Damages, Measurement, expert_bits, groups_of_choice, stored_types
from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.formats import weights
from reapc.formats.gguf_types import TYPES
from reapc.planner.allocate import Allocation, Choice
from reapc.planner.tensor_groups import WEIGHTED, FileParts, file_parts

FORMAT = "1"


def allocation_json(
    damages: Damages, spec: ModelSpec, budget: int | None, decided: tuple[Allocation, Choice, list[Measurement]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The allocation file: the decision, its certificate, what it rests on, its runners-up. ``budget``: None where each
    device had its own. ``facts``: model, digest, criterion."""
    found, taken, measurements = decided
    groups = groups_of_choice(damages, taken)
    expected = next((m.kl + taken.cache for m in measurements if m.of(taken)), taken.damage)
    kept_bits, original_bits = expert_bits(damages, spec, taken)
    if isinstance(damages.parts, FileParts):
        stored: dict[str, Any] = {"engine": "llama.cpp", "types": stored_types(damages, taken)}
    else:
        stored = {
            "engine": "vllm",
            "method": damages.parts.method,
            "format": damages.parts.format(groups).name,
        }
    return {
        "reapc_allocation": FORMAT,
        **facts,
        "experts": taken.experts,
        "num_experts": spec.num_experts,
        "budget_bytes": budget,
        "data_bytes": damages.parts.bytes_of(groups, taken.experts),
        "bits_per_kept_expert_weight": kept_bits,
        "bits_per_original_expert_weight": original_bits,
        "kv_dtype": taken.kv or None,
        "predicted_kl": taken.damage,
        "expected_kl": expected,
        "predicted": {
            "rounding": taken.damage - taken.fixed,
            "pruning": taken.fixed - taken.cache,
            "kv_cache": taken.cache,
            "source": damages.source,
        },
        "certificate": {
            "best_predicted_kl": found.best.damage,
            "lower_bound": found.lower_bound,
            "gap": found.gap,
            "relative_gap": found.relative_gap,
            "proved_by": found.best.proved_by,
            "counts_compared": found.cases,
            "counts_too_large": found.infeasible,
        },
        "measured": [measurement.to_json() for measurement in measurements],
        "probes": [probe.__dict__ for probe in damages.probes],
        "runners_up": [
            {
                "experts": c.experts,
                "predicted_kl": c.damage,
                "data_bytes": damages.parts.bytes_of(groups_of_choice(damages, c), c.experts),
                "kv_dtype": c.kv or None,
            }
            for c in found.runners_up
        ],
        "groups": groups,
        **stored,
    }


def read_allocation(path: Path) -> dict[str, Any]:
    """An allocation file; ReapcError where it is none, or names types that ggml does not have."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ReapcError(
            f"{path}: cannot be read: {error.strerror}", hint="`reapc allocate --out` writes one"
        ) from error
    except ValueError as error:
        raise ReapcError(f"{path}: not JSON: {error}", hint="`reapc allocate --out` writes one") from error
    if not isinstance(data, dict) or data.get("reapc_allocation") != FORMAT:
        raise ReapcError(f"{path}: no allocation of this version (reapc_allocation = {FORMAT!r} expected)")
    if data.get("engine") == "vllm":
        fmt = weights.parse(data["format"]) if isinstance(data.get("format"), str) else None
        if fmt is None:
            raise ReapcError(f"{path}: format = {data.get('format')!r}: a format of `reapc formats` is expected")
        return _with_count(data, path)
    types = data.get("types")
    if not isinstance(types, dict) or not types or not all(kind in TYPES for kind in types.values()):
        raise ReapcError(f"{path}: types: tensor names with ggml types are expected")
    return _with_count(data, path)


def _with_count(data: dict[str, Any], path: Path) -> dict[str, Any]:
    if type(data.get("experts")) is not int:
        raise ReapcError(f"{path}: experts = {data.get('experts')!r}: a count is expected")
    return data


def check_count(data: Mapping[str, Any], spec: ModelSpec, where: Path) -> None:
    """ReapcError unless the model has just the experts that were allocated for."""
    if data["experts"] != spec.num_experts:
        raise ReapcError(
            f"{where}: made for {data['experts']} experts, the model has {spec.num_experts}",
            hint=f"prune it first: reapc prune MODEL --scores SCORES --experts {data['experts']} "
            f"--criterion {data.get('criterion', 'reap')} --out DIR",
        )


def check_allocation(data: Mapping[str, Any], spec: ModelSpec, where: Path, imatrix: bool = True) -> None:
    """ReapcError unless the model has just the experts and the tensors that were allocated for in GGUF, and there is an
    importance matrix where a type needs one."""
    needs = sorted(set(data["types"].values()) & WEIGHTED)
    if needs and not imatrix:
        raise ReapcError(f"{where}: {', '.join(needs)} cannot be written with --no-imatrix", hint="leave it out")
    check_count(data, spec, where)
    parts = file_parts(spec)
    names = {tensor.name for group in parts.groups for tensor in group.tensors}
    if names != set(data["types"]):
        odd = sorted(names ^ set(data["types"]))
        raise ReapcError(f"{where}: made for another model: {len(odd)} tensors differ, {odd[0]} among them")
