"""Peak anonymous memory of `observe` and `prune` above the baseline after imports, on a checkpoint of 2.3 GB.

Each pass runs in its own process, which samples its RssAnon every 5 ms.
    .venv/bin/python benchmarks/memory.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from models import make_checkpoint


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise SystemExit("this benchmark reads RssAnon from /proc (Linux)")


def peak_of(work) -> int:
    """Bytes above the baseline while ``work()`` runs."""
    base = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    done.set()
    thread.join()
    return peak - base


def child(which: str, folder: Path) -> None:
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from reapc.checkpoint.reader import Checkpoint
    from reapc.observe.observe import observe
    from reapc.progress import Silent
    from reapc.prune.rewrite import prune
    from reapc.stream import StreamedModel  # noqa: F401
    from reapc.stream.tokens import Tokens

    checkpoint = Checkpoint(folder)
    ids = np.random.default_rng(0).integers(0, 2048, (16, 512)).astype(np.int32)
    tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(16, np.int32))
    kept = {layer: list(range(48)) for layer in checkpoint.spec.moe_layers}
    work = folder.parent / f"work-{which}"
    if which == "observe":
        peak = peak_of(lambda: observe(checkpoint, tokens, work, Silent()))
    else:
        peak = peak_of(lambda: prune(checkpoint, kept, work, Silent()))
    layer = max(sum(checkpoint.entries[t.name].bytes for t in layer.tensors) for layer in checkpoint.spec.layers)
    limit = 500e6 + (layer if which == "observe" else 0)
    print(
        f"{which:8} peak anonymous memory {peak / 1e6:6.0f} MB above the baseline; limit {limit / 1e6:.0f} MB "
        f"(largest layer {layer / 1e6:.0f} MB, checkpoint {checkpoint.bytes / 1e9:.2f} GB): {peak / limit:.2f}x"
    )
    if peak > limit:
        raise SystemExit(1)


def main() -> None:
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder = make_checkpoint(Path(name) / "model", hidden=1024, width=768, layers=8, experts=64, top_k=8)
        for which in ("observe", "prune"):
            subprocess.run([sys.executable, __file__, which, str(folder)], check=True)


if __name__ == "__main__":
    main()
