"""What healing a layer costs, in plain forwards of that layer over the same tokens (limit LIMIT): both streams, the
sweeps, reading and writing of states included; the streamed forward in the same run. Prints the ratio; exit 1 above.

.venv/bin/python benchmarks/heal.py [--sequences N] [--rounds N] [--limit X]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from models import make_checkpoint

from reapc.checkpoint.reader import Checkpoint
from reapc.progress import Silent
from reapc.prune import heal
from reapc.prune.heal import Healing
from reapc.prune.rewrite import prune
from reapc.quantize.folder_form import FolderForm
from reapc.stream.model import StreamedModel
from reapc.stream.run import run_layers, states_of
from reapc.stream.tokens import Tokens

LIMIT = 6.0
LAYERS, EXPERTS, TOP_K = 3, 32, 4
HIDDEN, WIDTH, VOCABULARY, LENGTH = 1024, 512, 4096, 512


def tokens_of(sequences: int, seed: int) -> Tokens:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (sequences, LENGTH)).astype(np.int32)
    return Tokens(ids, np.ones(ids.shape, bool), np.zeros(sequences, np.int32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=48, help=f"of {LENGTH} tokens; a sixth of them choose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=LIMIT)
    args = parser.parse_args()
    choosing = max(1, args.sequences // 6)
    fit, choice = tokens_of(args.sequences - choosing, 0), tokens_of(choosing, 1)
    heal.LEAST_GAIN = float("-inf")  # every sweep, which a random model would not be found worth
    forward, healing = [], []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="reapc-bench-") as place:
        root = Path(place)
        folder = make_checkpoint(
            root / "model", hidden=HIDDEN, width=WIDTH, layers=LAYERS, experts=EXPERTS, top_k=TOP_K,
            vocab_size=VOCABULARY,
        )  # fmt: skip
        original = Checkpoint(folder)
        kept = {layer: list(range(EXPERTS * 3 // 4)) for layer in original.spec.moe_layers}
        prune(original, kept, root / "pruned", Silent())
        pruned = Checkpoint(root / "pruned")
        for number in range(args.rounds):
            model = StreamedModel(original)
            (root / f"plain-{number}").mkdir()
            start = time.perf_counter()
            sets = [
                (states_of(model, part, root / f"plain-{number}", f"plain-{i}"), False)
                for i, part in enumerate((fit, choice))
            ]
            run_layers(model, sets, lambda i: None, lambda i, o: None, Silent())
            forward.append(time.perf_counter() - start)
            work = root / f"heal-{number}"
            work.mkdir()
            start = time.perf_counter()
            reports = Healing(model, StreamedModel(pruned), fit, choice, work, Silent(), FolderForm(pruned)).run()
            healing.append(time.perf_counter() - start)
    a, b = statistics.median(healing), statistics.median(forward)
    print(
        f"{os.cpu_count()} cores; {LAYERS} layers of {EXPERTS} experts top-{TOP_K}, {EXPERTS * 3 // 4} kept, "
        f"hidden {HIDDEN}, width {WIDTH}; "
        f"{args.sequences} x {LENGTH} tokens; medians of {args.rounds}; {datetime.now(UTC):%Y-%m-%d}"
    )
    print(f"forward {b:.2f} s, healing {a:.2f} s: {a / b:.2f} forwards (limit {args.limit:g})")
    print("left on the tokens that choose: " + ", ".join(f"{r.choice[1] / r.choice[0]:.0%}" for r in reports))
    return int(a / b > args.limit)


if __name__ == "__main__":
    sys.exit(main())
