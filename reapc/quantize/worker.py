"""A quantizer in a process of its own: its patches of transformers and its memory go with it.

The process is a script beside this file, run as ``python -P SCRIPT REQUEST``. It reads ``request.json`` and
``tokens.safetensors``, prints ``@reapc layer N`` when N layers are done (anything else it prints is shown only where
it fails), saves the model in ``raw`` and writes ``result.json``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reapc.arch import ModelSpec, load_config
from reapc.checkpoint.atomic import make_folder, remove
from reapc.formats import weights
from reapc.progress import Progress
from reapc.stream.families import TRANSFORMERS_TYPE
from reapc.stream.tokens import Tokens
from reapc.toolchain import run_logged

_LAYER = re.compile(r"@reapc layer (\d+)$")
_TOKENS_PER_BATCH = 4096
# The interpreter with torch, transformers and the quantizer loaded (measured: 0.6 GB with a tiny model).
_LOADED_BYTES = 1_000_000_000
# How often a tool holds the model, and its largest decoder layer, in units of their bytes in 16 bit. Fitted to the peak
# of two models of 0.93 GB (4 layers of 0.23 GB) and 0.97 GB (12 layers of 0.08 GB), and rounded up: AutoRound 0.16.1
# took 4.41 and 3.42 GB (it unfuses the experts into a second copy, and tunes a layer in float32 with gradients),
# GPTQModel 7.6.0 2.37 and 1.74 GB.
_COPIES: dict[str, tuple[float, float]] = {"auto-round": (2.4, 8), "gptqmodel": (1, 4)}


def batch_rows(tokens: Tokens) -> int:
    """Sequences that are run through a layer at once."""
    return max(1, min(8, _TOKENS_PER_BATCH // max(1, tokens.length)))


def model_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Bytes of the whole model in 16 bit and of its largest decoder layer."""
    bf16 = weights.parse("bf16")
    assert bf16 is not None
    largest = max(
        sum(weights.group_bytes(bf16, group, spec.num_experts) for group in layer.kind.tensors) for layer in spec.layers
    )
    return weights.checkpoint_bytes(bf16, spec, mtp=True), largest


def needed_bytes(spec: ModelSpec, tool: str) -> int:
    """RAM that ``tool`` needs for ``spec``, from ``_COPIES``. Activations of the calibration text are extra."""
    whole, largest = model_bytes(spec)
    models, layers = _COPIES[tool]
    return int(models * whole + layers * largest) + _LOADED_BYTES


def known_to_transformers(source: Path, work: Path) -> Path:
    """``source``, or where transformers knows its model_type by another name only (kimi_k2), a folder in ``work`` of
    links to its files with that name in config.json."""
    config = load_config(source)
    model_type = TRANSFORMERS_TYPE.get(str(config.get("model_type")))
    if model_type is None:
        return source
    view = work / "source"
    remove(view)
    view.mkdir()
    for path in source.absolute().iterdir():
        if path.name != "config.json":
            (view / path.name).symlink_to(path)
    config = {key: value for key, value in config.items() if key not in ("auto_map", "architectures")}
    (view / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    return view


@contextmanager
def scratch_folder(out: Path, scratch: Path | None, key: str) -> Iterator[Path]:
    """A folder on the disk of ``out`` that goes when the work is done. A given ``scratch`` outlives an interruption,
    and is emptied when what is in it was made for another ``key``."""
    if scratch is None:
        make_folder(out.parent)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            yield Path(folder).absolute()
        return
    scratch = scratch.absolute()
    mark = scratch / "key"
    if not mark.is_file() or mark.read_text() != key:
        remove(scratch)
    make_folder(scratch)
    mark.write_text(key)
    yield scratch
    remove(scratch)


def run(
    script: str,
    what: str,
    work: Path,
    request: dict[str, Any],
    tokens: Tokens,
    layers: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Runs ``script`` in the folder ``work`` and returns its result; CannotBeDone with its last words when it fails."""
    from safetensors.numpy import save_file

    remove(work / "result.json")
    make_folder(work / "tmp")
    save_file(
        {"input_ids": tokens.input_ids.astype(np.int64), "attention_mask": tokens.mask.astype(np.int64)},
        work / "tokens.safetensors",
    )
    settings = {"raw": str(work / "raw"), "tokens": str(work / "tokens.safetensors"), "threads": threads, **request}
    settings["source"] = str(known_to_transformers(Path(request["source"]), work))
    (work / "request.json").write_text(json.dumps({**settings, "result": str(work / "result.json")}))
    command: list[str | Path] = [sys.executable, "-P", Path(__file__).with_name(script), work / "request.json"]
    with progress.task(what, layers, "layers") as advance:
        run_logged(command, what, progress.log, env=_environment(work, threads), cwd=work, progress=_counter(advance))
    found: dict[str, Any] = json.loads((work / "result.json").read_text())
    return found


def _counter(advance: Callable[[float], None]) -> Callable[[str], None]:
    done = 0

    def see(line: str) -> None:
        nonlocal done
        if match := _LAYER.search(line):
            count = int(match[1])
            if count > done:
                advance(count - done)
                done = count

    return see


def _environment(work: Path, threads: int) -> dict[str, str]:
    """No network, no telemetry, temporary files beside the output, and no more threads than asked for."""
    count = str(threads or os.cpu_count() or 1)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "TMPDIR": str(work / "tmp"),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
