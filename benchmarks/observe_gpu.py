"""A layer of Qwen3-30B-A3B's shape through the real streamed code on a GPU: achieved FLOP/s against what a large bf16
matrix product reaches there. Needs an NVIDIA GPU, 4 GB of disk, about two minutes.

    .venv/bin/python benchmarks/observe_gpu.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from models import make_checkpoint

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.stream.memory import Memory
from reapc.stream.tokens import Tokens

# The published config but for its 48 layers, its heads (32 and 4 of 128; make_checkpoint has 8 and 2 of 64), and its
# vocabulary: nothing of them is in the experts, which are nine tenths of the layer's work.
SHAPE = dict(hidden=2048, width=768, experts=128, top_k=8)
LAYERS, SEQUENCES, LENGTH, ROUNDS = 2, 128, 512, 3


def seconds_of(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(size: int = 8192, products: int = 20) -> float:
    """FLOP/s of bf16 products of square matrices."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    seconds_of(lambda: a @ b)
    return 2 * size**3 * products / seconds_of(lambda: [a @ b for _ in range(products)])


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/observe_gpu.py: torch sees no GPU here; this benchmark measures one")
    rate = matrix_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s in bf16 products")
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Checkpoint(make_checkpoint(Path(name) / "model", layers=LAYERS, **SHAPE))
        checkpoint.digest  # noqa: B018 - read once, not part of the forward
        spec = checkpoint.spec
        ids = np.random.default_rng(0).integers(0, spec.vocab_size, (SEQUENCES, LENGTH)).astype(np.int32)
        tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(SEQUENCES, np.int32))
        layers = spec.active_parameters - spec.vocab_size * spec.hidden_size  # less the tied head
        flops = 2 * layers * ids.size  # attention's scores left out

        def run(moments: bool, memory: Memory) -> object:
            work = Path(name) / "work"
            return observe(
                checkpoint, tokens, work, Silent(), dtype=torch.bfloat16, device="cuda", moments=moments, memory=memory
            )

        run(True, Memory())
        for label, moments in (("scores", False), ("scores + second moments", True)):
            times = sorted(seconds_of(lambda moments=moments: run(moments, Memory())) for _ in range(ROUNDS))
            middle = times[ROUNDS // 2]
            print(
                f"{label:24} {ids.size / middle:9.0f} tokens/s for {LAYERS} layers, {flops / middle / 1e12:.1f} "
                f"TFLOP/s: {flops / middle / rate:.1%} of the matrix rate (the whole pass counted: reading, writing)"
            )


if __name__ == "__main__":
    main()
