"""`observe` against a plain transformers forward: same model, tokens, threads and dtype, one run. Prints a ratio.

.venv/bin/python benchmarks/observe.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from models import make_checkpoint
from transformers import AutoModelForCausalLM

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.stream.tokens import Tokens

ROUNDS, SEQUENCES, LENGTH = 3, 32, 512


def plain_forward(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in ids.split(16):
            model.model(batch, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name) / "model", hidden=512, width=384, layers=4, experts=32, top_k=4)
        ids = np.random.default_rng(0).integers(0, 2048, (SEQUENCES, LENGTH)).astype(np.int32)
        tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(SEQUENCES, np.int32))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch_ids = torch.from_numpy(ids.astype(np.int64))
        checkpoint = Checkpoint(folder)
        checkpoint.digest  # noqa: B018 - hashed once, not part of the forward
        rows: dict[str, list[float]] = {"plain": [], "scores": [], "scores + imatrix": []}
        plain_forward(model, torch_ids[:16])
        for _ in range(ROUNDS):
            rows["plain"].append(plain_forward(model, torch_ids))
            for label, moments in (("scores", False), ("scores + imatrix", True)):
                start = time.perf_counter()
                observe(checkpoint, tokens, Path(name) / "work", Silent(), moments=moments)
                rows[label].append(time.perf_counter() - start)
    plain = statistics.median(rows["plain"])
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for label, times in rows.items():
        middle = statistics.median(times)
        print(f"{label:18} {ids.size / middle:9.0f} tokens/s   {middle / plain:.2f}x the plain forward's time")


if __name__ == "__main__":
    main()
