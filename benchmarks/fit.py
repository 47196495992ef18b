"""`reapc fit --vram 24GB` over the whole catalogue against `llmfit fit` (PyPI, native code), cold, in one run.

Prints both medians and their ratio, and `reapc inspect`. llmfit is installed into an environment of its own in build/.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLMFIT = "llmfit==1.1.17"
REPEATS = 7


def llmfit() -> Path | None:
    """The llmfit command, installed on first use; None where it cannot be had."""
    folder = ROOT / "build" / "llmfit"
    command = folder / "bin" / "llmfit"
    if not command.exists():
        venv.create(folder, with_pip=True)
        done = subprocess.run([folder / "bin" / "pip", "install", "--quiet", LLMFIT], check=False)
        if done.returncode:
            return None
    return command


def seconds(command: list[str | Path]) -> float:
    """Wall time of one cold start; the exit code must be 0."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Alternates the commands, so that a busy moment hits all of them."""
    reapc: list[str | Path] = [Path(sys.executable).parent / "reapc"]
    commands: dict[str, list[str | Path]] = {
        "reapc fit": [*reapc, "fit", "--vram", "24GB", "--json"],
        "reapc fit (table)": [*reapc, "fit", "--vram", "24GB"],
        "reapc inspect": [*reapc, "inspect", "glm-5", "--json"],
    }
    peer = llmfit()
    if peer:
        commands["llmfit fit"] = [peer, "--memory", "24G", "fit", "--json"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)  # once for the disk cache
    for _ in range(REPEATS):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, median of {REPEATS} cold starts")
    for name, value in medians.items():
        print(f"{name:<20}{value:6.2f} s  (fastest {min(times[name]):.2f} s)")
    if peer:
        print(f"ratio reapc fit / llmfit fit: {medians['reapc fit'] / medians['llmfit fit']:.2f}")
    else:
        print("llmfit could not be installed: no ratio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
