"""AutoRound: rounding tuned layer by layer by signed gradient descent (arXiv 2309.05516), as AutoRound,
compressed-tensors or GPTQ checkpoints.

The library runs in its own process (``worker.py``), its output is taken apart and published by ``published.py``.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any, Literal

from reapc.arch import ModelSpec
from reapc.checkpoint.atomic import atomic_path, remove
from reapc.errors import ReapcError
from reapc.formats.weights import WeightFormat
from reapc.formats.writers import WRITERS
from reapc.progress import Progress
from reapc.quantize import quantization_config, worker
from reapc.quantize.published import Modules, default_of, linears, open_source, publish
from reapc.stream.tokens import Tokens

Export = Literal["auto_round", "auto_gptq", "llm_compressor"]


def quantize(
    source: Path,
    out: Path,
    fmt: WeightFormat,
    tokens: Tokens,
    progress: Progress,
    *,
    export: str | None = None,
    iters: int = 200,
    seed: int = 0,
    threads: int = 0,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Writes the 16 bit checkpoint ``source`` to the new folder ``out`` in ``fmt``, atomically.

    ``export`` is AutoRound's name of the layout (default: the one of the format's method), ``iters`` the tuning steps
    per layer (0: the scales are still searched by the calibration text's input magnitudes, the rounding is not tuned;
    padding counts in those, and not in tuning),
    ``threads`` 0 takes every core. The same seed and thread count give the same bytes on a CPU.

    ``scratch``: a folder that survives an interruption. AutoRound then resumes after the last finished layer (its
    AR_RESUME_DIR, for ``iters`` > 0); a resumed run draws other samples than an uninterrupted one. Without it a killed
    run starts again.

    Returns facts for the manifest. ReapcError where the request cannot be met, CannotBeDone where AutoRound fails."""
    layout = _export(fmt, export)
    checkpoint = open_source(source, fmt, out)
    modules = linears(checkpoint, fmt)
    start = time.monotonic()
    spec = checkpoint.spec
    default = default_of(fmt, modules)
    blocks = spec.layers[0].prefix.rpartition(".")[0]
    request = {
        "source": str(source.absolute()),
        "export": layout,
        "bits": default.bits,
        "group_size": default.group_size,
        "iters": iters,
        "seed": seed,
        "batch_size": worker.batch_rows(tokens),
        "layers": spec.num_layers,
        "layer_config": _exceptions(modules, default, blocks, spec),
    }
    key = json.dumps([request, checkpoint.digest, tokens.digest], sort_keys=True)
    with worker.scratch_folder(out, scratch, key) as work:
        if scratch is not None and iters:
            request["resume"] = str(work / "resume")
        else:
            remove(work / "raw")
        what = f"AutoRound to {fmt.label}"
        result = worker.run("_auto_round_main.py", what, work, request, tokens, spec.num_layers, threads, progress)
        with atomic_path(out) as partial:
            publish(checkpoint, Path(result["saved"]), partial, modules, _config(layout, fmt, modules, blocks))
    return {
        "tool": "auto-round",
        "version": importlib.metadata.version("auto-round"),
        "export": layout,
        "settings": {name: request[name] for name in ("bits", "group_size", "iters", "seed", "batch_size")}
        | {"sequences": tokens.sequences, "length": tokens.length, "tokens": tokens.count, "symmetric": True},
        "quantized": sum(item is not None for item in modules.values()),
        "resumed_layers": result["resumed_layers"],
        "peak_ram_bytes": result["peak_ram_bytes"],
        "device": result["device"],
        "seconds": time.monotonic() - start,
    }


def _export(fmt: WeightFormat, export: str | None) -> str:
    found = [writer for writer in WRITERS.get(fmt.method, ()) if writer.tool == "auto-round"]
    chosen = next((writer for writer in found if export in (None, writer.export)), None)
    if chosen is None:
        raise ReapcError(f"AutoRound does not write {fmt.name}" + (f" as {export!r}" if export else ""))
    if bad := [bits for bits in fmt.widths if bits not in chosen.bits]:
        raise ReapcError(
            f"{fmt.name}: AutoRound's {chosen.export} has no {bad[0]} bits",
            hint=f"it has {', '.join(map(str, chosen.bits))}; ct-w{bad[0]}g{fmt.group_size} has that width",
        )
    return chosen.export


def _exceptions(modules: Modules, default: WeightFormat, blocks: str, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """AutoRound's ``layer_config``: exact names of the linears of the main model that differ from the default."""
    prefixes = tuple(f"{layer.prefix}." for layer in spec.layers)
    return {
        module: quantization_config.changes(item, default) if item else {"bits": 16}
        for module, item in modules.items()
        if item != default and module.startswith(f"{blocks}.") and module.startswith(prefixes)
    }


def _config(layout: str, fmt: WeightFormat, modules: Modules, blocks: str) -> dict[str, Any]:
    if layout == "llm_compressor":
        return quantization_config.for_compressed_tensors(fmt, modules)
    if layout == "auto_gptq":
        return quantization_config.for_gptq(fmt, modules)
    return quantization_config.for_auto_round(fmt, modules, blocks)
