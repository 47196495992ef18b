"""Which experts llm-compressor's REAP keeps of a model, and the checkpoint with them, written by reapc's own pruning
(both copy the rows): ``llmcompressor_reap.py MODEL TOKENS RATIO OUT [RELEASE]``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reapc.checkpoint.reader import Checkpoint
from reapc.progress import Silent
from reapc.prune.rewrite import prune

ROOT = Path(__file__).resolve().parents[2]


def kept_by(model: Path, tokens: Path, ratio: float, release: str = "0.13.0") -> dict[int, list[int]]:
    """Experts kept by layer, with its default of running a layer again after it was pruned."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "llmcompressor_env.py", release],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        job = {
            "contender": "llmcompressor", "release": release, "propagate": True, "sparsity": ratio,
            "folder": str(model.absolute()), "tokens": str(tokens.absolute()), "batch": 16,
            "threads": os.cpu_count() or 1, "work": str(work / "work"), "result": str(work / "result.json"),
        }  # fmt: skip
        (work / "job.json").write_text(json.dumps(job))
        subprocess.run(
            [made.stdout.strip(), ROOT / "benchmarks" / "contenders.py", work / "job.json"], cwd=work, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        kept = json.loads((work / "result.json").read_text())["kept"]
    layers = Checkpoint(model).spec.moe_layers
    return {layer: sorted(experts) for layer, experts in zip(layers, kept, strict=True)}


def main() -> None:
    model, tokens, ratio, out, *release = sys.argv[1:]
    prune(Checkpoint(Path(model)), kept_by(Path(model), Path(tokens), float(ratio), *release), Path(out), Silent())


if __name__ == "__main__":
    main()
