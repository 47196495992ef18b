"""Predicted bytes against real ones: the file, the weights in it, and what llama.cpp says it would allocate."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from reapc.errors import ReapcError
from reapc.plan import Plan


@dataclass(frozen=True)
class FitRow:
    """One quantity in bytes; ``actual`` is None where nothing here can measure it."""

    name: str
    predicted_bytes: int
    actual_bytes: int | None
    source: str


def result_bytes(result: Path) -> int:
    """Bytes of a GGUF file, or of all safetensors shards of a folder."""
    if result.is_file():
        return result.stat().st_size
    return sum(path.stat().st_size for path in result.glob("*.safetensors"))


def tensor_bytes(result: Path) -> int:
    """Bytes of the tensors alone, without headers."""
    if result.is_file():
        from gguf import GGUFReader

        return sum(int(tensor.n_bytes) for tensor in GGUFReader(str(result)).tensors)
    from reapc.checkpoint.reader import Checkpoint

    return Checkpoint(result).bytes


def llama_allocation(gguf: Path, plan: Plan) -> tuple[int, int, int] | None:
    """Model, context and compute bytes that llama.cpp's own ``llama-fit-params`` prints (MiB precision);
    None when that tool is absent, or is one that does not answer in this form."""
    from reapc.toolchain import find_llamacpp

    tools = find_llamacpp()
    if tools.fit_params is None:
        return None
    chosen = plan.chosen
    command = [
        str(tools.fit_params), "-m", str(gguf), "-c", str(-(-chosen.context // 256) * 256 * chosen.concurrency),
        "-np", str(chosen.concurrency), "-ctk", chosen.kv_dtype, "-ctv", chosen.kv_dtype, "-fa", "on", "-nr",
        "-fitp", "on",
    ]  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tools.fit_params.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = [[int(n) for n in line[1:]] for line in lines if len(line) == 4 and all(n.isdigit() for n in line[1:])]
    if done.returncode or not rows:
        return None
    model, context, compute = (sum(column) << 20 for column in zip(*rows, strict=True))
    return model, context, compute


def check_fit(result: Path, plan: Plan) -> list[FitRow]:
    """The rows of the build's size table. ReapcError (exit 1) when the weights are larger than predicted by so
    much that a device's budget would break."""
    chosen = plan.chosen
    real_weights = tensor_bytes(result)
    rows = [
        FitRow("file", chosen.file_bytes, result_bytes(result), "size on disk"),
        FitRow("weights", chosen.weights_bytes, real_weights, "sum of the tensors' bytes"),
    ]
    allocation = llama_allocation(result, plan) if chosen.engine == "llama.cpp" else None
    rows.append(
        FitRow("KV cache", chosen.kv_bytes, allocation[1] if allocation else None, "llama-fit-params, to the MiB")
    )
    spare = plan.chosen.placement.fullest.free_bytes
    excess = real_weights - chosen.weights_bytes
    if excess > max(spare, 0):
        raise ReapcError(
            f"{result}: the weights are {real_weights} bytes, {excess} more than predicted, and the budget has "
            f"only {spare} to spare",
            exit_code=1,
        )
    return rows
