"""`prune` against `cp` plus fsync of the bytes that it keeps, one run, warm file cache. Prints a ratio.

.venv/bin/python benchmarks/prune.py
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from models import make_checkpoint

from reapc.checkpoint.reader import Checkpoint
from reapc.progress import Silent
from reapc.prune.rewrite import prune

ROUNDS = 3


def copy_and_sync(files: list[Path], out: Path) -> float:
    start = time.perf_counter()
    out.mkdir()
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    subprocess.run(["sync", *[str(path) for path in out.iterdir()]], check=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        base = Path(name)
        folder = make_checkpoint(base / "model", hidden=1024, width=768, layers=8, experts=48, top_k=4)
        checkpoint = Checkpoint(folder)
        kept = {layer: list(range(0, 48, 4)) + list(range(1, 48, 2)) for layer in checkpoint.spec.moe_layers}
        kept = {layer: sorted(set(experts)) for layer, experts in kept.items()}
        ours, theirs = [], []
        prune(checkpoint, kept, base / "reference", Silent())
        files = sorted((base / "reference").glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        for i in range(ROUNDS):
            start = time.perf_counter()
            prune(checkpoint, kept, base / f"pruned-{i}", Silent())
            ours.append(time.perf_counter() - start)
            theirs.append(copy_and_sync(files, base / f"copied-{i}"))
            shutil.rmtree(base / f"pruned-{i}")
            shutil.rmtree(base / f"copied-{i}")
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"kept {size / 1e9:.2f} GB of {checkpoint.bytes / 1e9:.2f} GB ({len(kept[0])} of 48 experts)")
    print(f"cp + fsync {size / b / 1e6:8.0f} MB/s")
    print(f"prune      {size / a / 1e6:8.0f} MB/s   {a / b:.2f}x the time of cp + fsync")


if __name__ == "__main__":
    main()
