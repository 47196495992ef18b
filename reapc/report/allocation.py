"""The report's section on an allocation: which type the tensors of each layer got, and how sure the choice is."""

from __future__ import annotations

import re
from typing import Any

from reapc.report import tables
from reapc.report.data import BuildData
from reapc.report.tables import Table

_LAYER = re.compile(r"(?:blk|layers)\.(\d+)\.(.+)$")


def allocation(data: BuildData) -> dict[str, Any]:
    """Missing where the build allocated nothing."""
    found = data.get("allocation", "a type for each tensor: all were written by one file type's rules")
    proof = found["certificate"]
    budget = found["budget_bytes"]
    of = f"of {tables.size(budget)}" if budget else "in all"
    cache = f" KV cache: {found['kv_dtype']}." if found.get("kv_dtype") else ""
    lines = [
        f"{found['experts']} of {found['num_experts']} experts, {tables.size(found['data_bytes'])} {of}; "
        f"{found['bits_per_kept_expert_weight']:.2f} bits per expert weight.{cache}",
        f"Predicted KL {tables.kl(found['predicted_kl'])} ({found['predicted']['source']}); no choice can be predicted "
        f"below {tables.kl(proof['lower_bound'])} ({proof['proved_by']}).",
        *(
            f"A mix with {row['experts']} experts was built and measured on calibration text: predicted "
            f"{tables.kl(row['predicted_kl'])}, KL {tables.kl(row['measured_kl'])}."
            for row in found["measured"]
        ),
    ]
    others = [
        [str(row["experts"]), tables.kl(row["predicted_kl"]), tables.size(row["data_bytes"])]
        for row in found["runners_up"]
    ]
    head = ("experts", "predicted KL", "bytes")
    return {
        "lines": lines,
        "types": _types(found["groups"]),
        "others": Table("Runners-up", head, others, ()) if others else None,
    }


def _types(groups: dict[str, str]) -> Table:
    """Rows: runs of layers in which every group has the same type; columns: the groups of a layer."""
    layers: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    for name, kind in groups.items():
        if match := _LAYER.match(name):
            layers.setdefault(int(match[1]), {})[match[2]] = kind
        else:
            outside[name] = kind
    parts = list(dict.fromkeys(part for own in layers.values() for part in own))
    runs: list[tuple[int, int, dict[str, str]]] = []
    for index, own in sorted(layers.items()):
        if runs and runs[-1][2] == own and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index, own)
        else:
            runs.append((index, index, own))
    rows = [
        [str(first) if first == last else f"{first} to {last}", *(own.get(part, tables.NONE) for part in parts)]
        for first, last, own in runs
    ]
    words = "; outside the layers: " + ", ".join(f"{name} {kind}" for name, kind in outside.items()) if outside else ""
    return Table(f"Type by layer{words}", ("layer", *parts), rows, range(len(parts) + 1))
