"""What pruning costs the demo model, against what the planner expects of it from the scores.

.venv/bin/python benchmarks/prune_damage.py [MODEL]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.observe.reference import read_reference
from reapc.planner.prior import measured_pruning_loss
from reapc.progress import Silent
from reapc.prune.criteria import choose, dropped_share
from reapc.prune.rewrite import prune
from reapc.stream.tokens import read_tokens
from reapc.verify.fidelity import log_probs, measure

DEMO = Path(__file__).resolve().parent.parent / "demo"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO / "model"
    checkpoint = Checkpoint(folder)
    experts, vocab = checkpoint.spec.num_experts, checkpoint.spec.vocab_size
    calibration = read_tokens(DEMO / "calibration.safetensors", vocab)
    held_out = read_tokens(DEMO / "held_out.safetensors", vocab)
    held_out = held_out.take(np.arange(0, held_out.sequences, 2))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        reference = work / "reference.safetensors"
        scores = observe(
            checkpoint, calibration, work / "observe", Silent(), held_out=held_out, reference=reference, moments=False
        )
        print("criterion     kept  share dropped        KL   expected   top-1   perplexity")
        for criterion in ("reap", "weighted_sum", "frequency"):
            for kept in (experts - 2, experts * 7 // 8 - 1, experts * 3 // 4, experts // 2):
                out = work / f"{criterion}-{kept}"
                prune(checkpoint, choose(scores, criterion, kept), out, Silent())
                lost = measure(held_out, read_reference(reference), log_probs(out, held_out, work / "c", Silent()))
                share = dropped_share(scores, criterion, kept)
                expected = measured_pruning_loss(1 - kept / experts, share)
                print(
                    f"{criterion:12} {kept:5} {share:14.4f} {lost.kl:9.4f} {expected:10.4f} {lost.top1:7.4f} "
                    f"{lost.perplexity_a:6.2f} -> {lost.perplexity_b:6.2f}"
                )


if __name__ == "__main__":
    main()
