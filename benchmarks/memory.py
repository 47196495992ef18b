"""Peak anonymous memory of `observe` and `prune` above the baseline after imports, on a checkpoint of 2.3 GB; of
`observe` also from its FP8 quantization, and all of its memory under a bound.

Each pass runs in its own process, which samples its RssAnon every 5 ms.
    .venv/bin/python benchmarks/memory.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from models import make_checkpoint
from peak import peak_of

from reapc.checkpoint.reader import Checkpoint
from reapc.formats import weights
from reapc.progress import Silent
from reapc.stream.memory import Memory
from reapc.stream.tokens import Tokens

BOUND = 700_000_000


def child(which: str, folder: Path) -> None:
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from reapc.observe.observe import observe
    from reapc.prune.rewrite import prune
    from reapc.stream import StreamedModel  # noqa: F401

    checkpoint = Checkpoint(folder)
    ids = np.random.default_rng(0).integers(0, 2048, (16, 512)).astype(np.int32)
    tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(16, np.int32))
    kept = {layer: list(range(48)) for layer in checkpoint.spec.moe_layers}
    work = folder.parent / f"work-{which}"
    bounded = Memory(BOUND) if which == "bound" else None
    if which == "prune":
        peak = peak_of(lambda: prune(checkpoint, kept, work, Silent()))
    else:
        with bounded or nullcontext():
            peak = peak_of(lambda: observe(checkpoint, tokens, work, Silent(), memory=bounded))
    layer = max(sum(checkpoint.entries[n].bytes for n in stored(checkpoint, i)) for i in kept)
    limit = 500e6 + (0 if which == "prune" else layer)
    what = {"fp8": "observe, FP8", "bound": "observe, bounded"}.get(which, which)
    if bounded is not None:
        peak, limit = bounded.peak_bytes, float(BOUND)
    print(
        f"{what:16} peak anonymous memory {peak / 1e6:6.0f} MB {'in all' if bounded else 'above the baseline'}; "
        f"limit {limit / 1e6:.0f} MB (largest layer {layer / 1e6:.0f} MB, checkpoint {checkpoint.bytes / 1e9:.2f} GB): "
        f"{peak / limit:.2f}x"
    )
    if peak > limit:
        raise SystemExit(1)


def stored(checkpoint: Checkpoint, index: int) -> list[str]:
    """The tensors on disk of a layer."""
    prefix = f"{checkpoint.spec.layers[index].prefix}."
    return [name for name in checkpoint.entries if name.startswith(prefix)]


def quantize(folder: Path, out: Path) -> Path:
    """The checkpoint in FP8 with scales of 128 x 128 tiles."""
    from reapc.quantize import checkpoint as quantizer

    fmt = weights.parse("fp8")
    assert fmt is not None
    ids = np.zeros((1, 8), np.int32)
    tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(1, np.int32))
    quantizer.quantize(folder, out, fmt, tokens, Silent(), method="auto", iters=None)
    return out


def main() -> None:
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as name:
        folder = make_checkpoint(Path(name) / "model", hidden=1024, width=768, layers=8, experts=64, top_k=8)
        small = quantize(folder, Path(name) / "fp8")
        for which, source in (("observe", folder), ("fp8", small), ("bound", folder), ("prune", folder)):
            subprocess.run([sys.executable, __file__, which, str(source)], check=True)


if __name__ == "__main__":
    main()
