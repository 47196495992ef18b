"""GPTQ by GPTQModel: columns rounded one by one, each error carried on to those that follow (arXiv 2210.17323).

The library runs in its own process (``worker.py``), its output is taken apart and published by ``published.py``.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

from reapc.checkpoint.atomic import atomic_path, remove
from reapc.errors import ReapcError
from reapc.formats.weights import WeightFormat
from reapc.progress import Progress
from reapc.quantize import quantization_config, worker
from reapc.quantize.published import linears, open_source, publish
from reapc.quantize.starved import STARVED_SHARE
from reapc.stream.tokens import Tokens

DAMP = 0.05  # GPTQModel's own default


def quantize(
    source: Path,
    out: Path,
    fmt: WeightFormat,
    tokens: Tokens,
    progress: Progress,
    *,
    damp_percent: float = DAMP,
    act_group_aware: bool = True,
    all_experts: bool = False,
    seed: int = 0,
    threads: int = 0,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Writes the 16 bit checkpoint ``source`` to the new folder ``out`` in ``fmt``, atomically.

    ``damp_percent``: what is added to the diagonal of the inputs' second moments, as a share of its mean.
    ``act_group_aware``: the columns with the largest inputs first, within the order of the groups, so that the result
    needs no reordering (desc_act) that engines refuse. ``all_experts``: every token calibrates every expert
    (ExpertsRoutingBypass) instead of those it is routed to. ``threads`` 0 takes every core, at least two: GPTQModel
    7.6 needs two.

    It starts again when it was interrupted, ``scratch`` is only where it works. A linear that fewer than
    ``STARVED_SHARE`` of the calibration tokens reach is rounded to nearest: those are in "fallback" of the facts that
    are returned, by module name. ReapcError where the request cannot be met, CannotBeDone where GPTQModel fails."""
    if fmt.method != "gptq":
        raise ReapcError(f"GPTQModel does not write {fmt.name}")
    checkpoint = open_source(source, fmt, out)
    modules = linears(checkpoint, fmt)
    start = time.monotonic()
    config = quantization_config.for_gptq(fmt, modules)
    request = {
        "source": str(source.absolute()),
        "bits": config["bits"],
        "group_size": config["group_size"],
        "dynamic": config.get("dynamic"),
        "damp_percent": damp_percent,
        "act_group_aware": act_group_aware,
        "all_experts": all_experts,
        "fallback_share": STARVED_SHARE,
        "seed": seed,
        "batch_size": worker.batch_rows(tokens),
    }
    key = json.dumps([request, checkpoint.digest, tokens.digest], sort_keys=True)
    with worker.scratch_folder(out, scratch, key) as work:
        remove(work / "raw")
        what = f"GPTQ to {fmt.label}"
        result = worker.run("_gptq_main.py", what, work, request, tokens, checkpoint.spec.num_layers, threads, progress)
        with atomic_path(out) as partial:
            publish(checkpoint, work / "raw", partial, modules, config)
    settings = ("bits", "group_size", "damp_percent", "act_group_aware", "all_experts", "seed", "batch_size")
    return {
        "tool": "gptqmodel",
        "version": importlib.metadata.version("gptqmodel"),
        "export": "gptq",
        "settings": {name: request[name] for name in settings}
        | {"sequences": tokens.sequences, "length": tokens.length, "tokens": tokens.count, "symmetric": True},
        "quantized": sum(item is not None for item in modules.values()),
        "fallback": {
            "threshold_share": STARVED_SHARE,
            "count": len(result["fallback"]),
            "modules": result["fallback"],
        },
        "peak_ram_bytes": result["peak_ram_bytes"],
        "device": result["device"],
        "seconds": time.monotonic() - start,
    }
