"""`observe` against llm-compressor's REAPPruningModifier and a plain transformers forward: same checkpoint, tokens,
batches, dtype (float32 computed, bfloat16 stored) and threads. Time, memory, and whether both choose the same experts.

    .venv/bin/python benchmarks/llm_compressor.py [--rounds N] [--sequences N] [--layers N] [--threads N]

llm-compressor runs in its own environments (tools/llmcompressor_env.py, made where missing): the newest release and the
first with the modifier. Every contender is a process of its own (contenders.py), cold, in turn, another one first in
each round; medians of the rounds.

pass     seconds of the forward (plain), of `observe`, of `oneshot`. Importing is in none; loading the weights is in
         `observe`'s alone, which reads them as it goes. Hashing the checkpoint (once for a model), `from_pretrained`
         and taking the experts apart are "loading".
CPU      seconds of all threads within the pass.
whole    seconds of the process.
memory   peak anonymous memory above that after imports, loading included, sampled every 5 ms.
VmHWM    the kernel's peak with everything: the interpreter, libraries, and mapped files, which it can drop.

Exit status 1 where a limit is missed: `observe` takes more than PLAIN of a plain forward, is less than FASTER times as
fast as an llm-compressor, takes more than MEMORY of its memory, or takes more than GROWTH of the memory with DEEP times
the layers; or where scores differ that must not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from models import make_checkpoint

from reapc.checkpoint.reader import Checkpoint
from reapc.stream.tokens import Tokens, write_tokens

ROOT = Path(__file__).resolve().parent.parent
PLAIN, FASTER, MEMORY, GROWTH = 1.1, 1.8, 0.5, 1.1
DEEP = 3
BATCH, LENGTH, VOCABULARY = 16, 512, 8192  # 8192 tokens, what reapc takes at once
SPARSITY = 0.25
SCORE_TOLERANCE = 1e-4  # relative, of the same sums in float32 in another order
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies matrices for every token

Job = dict[str, Any]
Found = dict[str, Any]


def rival(release: str, propagate: bool = True) -> Job:
    """The job of an llm-compressor."""
    return {"contender": "llmcompressor", "release": release, "propagate": propagate, "sparsity": SPARSITY}


ROWS: dict[str, Job] = {
    "plain": {"contender": "plain"},
    "observe": {"contender": "reapc", "moments": False},
    "observe + moments": {"contender": "reapc", "moments": True},
    "llm-compressor 0.14.0.1": rival("0.14.0.1"),
    "llm-compressor 0.13.0": rival("0.13.0"),
    # Does what `observe` does: no layer is run again after it was pruned.
    "llm-compressor 0.13.0, one pass": rival("0.13.0", propagate=False),
}
RIVALS = ("llm-compressor 0.14.0.1", "llm-compressor 0.13.0")
# How many layers must agree. By default, those behind the first see what the pruned ones give; 0.14's sequential
# pipeline computes without a causal mask where no sequence is padded (benchmarks/README.md).
AGREE: dict[str, int | None] = {"llm-compressor 0.13.0, one pass": None, "llm-compressor 0.13.0": 1, RIVALS[0]: 0}


class Runner:
    """Runs contenders on one token file, each in the Python of its release."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        self.threads = threads
        self.tokens = root / "tokens.safetensors"
        self.pythons: dict[str, Path] = {}

    def python(self, release: str | None) -> Path:
        """This environment's, or llm-compressor's, which is made where it is missing."""
        if release is None:
            return Path(sys.executable)
        if release not in self.pythons:
            command = [sys.executable, str(ROOT / "tools" / "llmcompressor_env.py"), release]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"llm-compressor {release} cannot be compared with (see above)")
            self.pythons[release] = Path(done.stdout.strip())
        return self.pythons[release]

    def run(self, folder: Path, job: Job) -> Found:
        """What one process found (contenders.py), and ``whole``, its seconds. SystemExit with its last words."""
        python = self.python(job.get("release"))
        work = Path(tempfile.mkdtemp(dir=self.root))
        result = work / "result.json"
        whole_job = {
            "folder": str(folder), "tokens": str(self.tokens), "batch": BATCH, "threads": self.threads,
            "work": str(work / "work"), "result": str(result), **job,
        }  # fmt: skip
        (work / "job.json").write_text(json.dumps(whole_job))
        threads = str(self.threads)
        env = {
            **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        }  # fmt: skip
        command = [python, Path(__file__).with_name("contenders.py"), work / "job.json"]
        start = time.perf_counter()
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - start
        if done.returncode or not result.is_file():
            sys.exit(f"{job} failed (exit {done.returncode})\n{(done.stdout + done.stderr)[-3000:]}")
        return {**json.loads(result.read_text()), "whole": whole}


def checkpoint_of(root: Path, layers: int) -> Path:
    """211M parameters with 8 layers."""
    return make_checkpoint(
        root / f"model-{layers}", hidden=512, width=256, layers=layers, experts=64, top_k=8, vocab_size=VOCABULARY
    )


def fastest_experts(runner: Runner, folder: Path) -> str:
    """transformers' implementation of experts in which the plain forward is fastest, by its first batch."""
    seconds = {
        how: runner.run(folder, {**ROWS["plain"], "experts": how, "sequences": BATCH})["seconds"]
        for how in EXPERTS_IMPLEMENTATIONS
    }
    print("plain, first batch: " + ", ".join(f"{how} {value:.2f} s" for how, value in seconds.items()), flush=True)
    return min(seconds, key=seconds.__getitem__)


def print_table(runs: dict[str, list[Found]]) -> dict[str, dict[str, float]]:
    """Prints the medians, and returns them."""
    fields = ("seconds", "cpu_seconds", "load_seconds", "whole", "anonymous_bytes", "high_water_bytes")
    middle = {
        name: {field: statistics.median(found[field] for found in each) for field in fields}
        for name, each in runs.items()
    }
    plain = middle["plain"]
    print("\n| contender | transformers | pass | CPU | loading | whole | pass / plain | memory | / plain | VmHWM |")
    print("|---" * 10 + "|")
    for name, m in middle.items():
        print(
            f"| {name} | {runs[name][0]['transformers']} | {m['seconds']:.2f} s | {m['cpu_seconds']:.2f} s "
            f"| {m['load_seconds']:.2f} s | {m['whole']:.1f} s | {m['seconds'] / plain['seconds']:.2f}x "
            f"| {m['anonymous_bytes'] / 1e6:.0f} MB | {m['anonymous_bytes'] / plain['anonymous_bytes']:.2f}x "
            f"| {m['high_water_bytes'] / 1e6:.0f} MB |"
        )
    print()
    return middle


def kept_of(reap: list[float]) -> set[int]:
    """What is left when the lowest scores are dropped, as many as SPARSITY says (rounded down)."""
    return set(np.argsort(reap, kind="stable")[int(len(reap) * SPARSITY) :].tolist())


def disagreements(ours: Found, runs: dict[str, list[Found]]) -> list[str]:
    """Prints by layer how far scores and kept experts are apart; those that must not be."""
    print("\nby layer, largest relative difference of a score / share of the kept experts that `observe` keeps too:")
    failed = []
    for name, layers in AGREE.items():
        theirs = runs[name][0]
        apart = [float(np.max(np.abs(np.divide(b, a) - 1))) for a, b in zip(ours["reap"], theirs["reap"], strict=True)]
        same = [len(kept_of(a) & set(b)) / len(b) for a, b in zip(ours["reap"], theirs["kept"], strict=True)]
        print(f"  {name}: {' '.join(f'{a:.0e}/{s:.2f}' for a, s in zip(apart, same, strict=True))}")
        bound = max([0.0, *apart[:layers]])
        if bound > SCORE_TOLERANCE:
            failed.append(f"{name}: scores differ by {bound:.1e}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32, help=f"of {LENGTH} tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"), prefix="reapc-bench-") as place:
        root = Path(place)
        runner = Runner(root, args.threads)
        for release in ("0.14.0.1", "0.13.0"):
            runner.python(release)
        folder, deep = checkpoint_of(root, args.layers), checkpoint_of(root, DEEP * args.layers)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (args.sequences, LENGTH)).astype(np.int32)
        write_tokens(runner.tokens, Tokens(ids, np.ones(ids.shape, bool), np.zeros(len(ids), np.int32)))
        spec = Checkpoint(folder).spec
        print(
            f"{os.cpu_count()} cores, {args.threads} threads; {spec.parameters / 1e6:.0f}M parameters, "
            f"{spec.num_layers} layers of {spec.num_experts} experts top-{spec.top_k}; {len(ids)} x {LENGTH} tokens in "
            f"batches of {BATCH}; medians of {args.rounds}; {datetime.now(UTC):%Y-%m-%d}, "
            f"load average {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        experts = fastest_experts(runner, folder)
        names = list(ROWS)
        runs: dict[str, list[Found]] = {name: [] for name in names}
        deeper = []
        for turn in range(args.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                found = runner.run(folder, {"experts": experts, **ROWS[name]})
                runs[name].append(found)
                print(f"  round {turn + 1}: {name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
            deeper.append(runner.run(deep, ROWS["observe"])["anonymous_bytes"])
    print(f"plain with experts {experts!r}; torch {', '.join(sorted({each[0]['torch'] for each in runs.values()}))}")
    middle = print_table(runs)
    ours = middle["observe"]

    def check(what: str, value: float, limit: float, most: bool = True) -> None:
        good = value <= limit if most else value >= limit
        print(f"{what}: {value:.2f}x ({'at most' if most else 'at least'} {limit}x){'' if good else '  MISSED'}")
        if not good:
            failed.append(f"{what}: {value:.2f}x")

    check("time, observe / plain", ours["seconds"] / middle["plain"]["seconds"], PLAIN)
    for name in RIVALS:
        check(f"time, {name} / observe", middle[name]["seconds"] / ours["seconds"], FASTER, most=False)
        check(f"memory, observe / {name}", ours["anonymous_bytes"] / middle[name]["anonymous_bytes"], MEMORY)
    most = statistics.median(deeper)
    grown = f"memory, observe with {DEEP * args.layers} layers ({most / 1e6:.0f} MB) / with {args.layers}"
    check(grown, most / ours["anonymous_bytes"], GROWTH)
    failed += disagreements(runs["observe"][0], runs)
    print(f"\nload average after {os.getloadavg()[0]:.1f}; {len(failed)} failed")
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
