"""The checkpoint that llm-compressor's own REAP prunes: ``llmcompressor_reap.py MODEL TOKENS RATIO OUT [--release R]``.

It decides in its own environment (tools/llmcompressor_env.py makes it where it is missing); the checkpoint with the
experts that it keeps is written by reapc's own pruning, since both copy the rows. Prints as JSON which experts it kept
in every layer, and how many of them reapc's ``reap`` keeps on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import choose, kept_count
from reapc.prune.rewrite import Kept, prune
from reapc.stream.tokens import read_tokens

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "0.13.0"


def kept_by(model: Path, tokens: Path, ratio: float, release: str = RELEASE) -> Kept:
    """Experts kept by layer, with its default of running a layer again after it was pruned. CannotBeDone with the end
    of what it said where it fails."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "llmcompressor_env.py", release],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if made.returncode:  # it has said why
        raise CannotBeDone(f"there is no environment for llm-compressor {release}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        job = {
            "contender": "llmcompressor", "release": release, "propagate": True, "sparsity": ratio,
            "folder": str(model.absolute()), "tokens": str(tokens.absolute()), "batch": 16,
            "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1), "work": str(work / "work"),
            "result": str(work / "result.json"),
        }  # fmt: skip
        (work / "job.json").write_text(json.dumps(job))
        # what leads to reapc's packages stays out of the other environment
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [made.stdout.strip(), ROOT / "benchmarks" / "contenders.py", work / "job.json"], cwd=work, text=True,
            capture_output=True, env={**environment, "HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        if done.returncode:
            said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-25:])
            raise CannotBeDone(f"llm-compressor {release} failed on {model} (exit {done.returncode}):\n{said}")
        kept = json.loads((work / "result.json").read_text())["kept"]
    layers = Checkpoint(model).spec.moe_layers
    return {layer: sorted(experts) for layer, experts in zip(layers, kept, strict=True)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors with input_ids")
    parser.add_argument("ratio", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("--release", default=RELEASE)
    asked = parser.parse_args(arguments)
    try:
        checkpoint = Checkpoint(asked.model)
        theirs = kept_by(asked.model, asked.tokens, asked.ratio, asked.release)
        prune(checkpoint, theirs, asked.out, Silent())
        tokens = read_tokens(asked.tokens, checkpoint.spec.vocab_size)
        with tempfile.TemporaryDirectory() as work:
            scores = observe(checkpoint, tokens, Path(work), Silent(), moments=False)
        ours = choose(scores, "reap", kept_count(checkpoint.spec.num_experts, asked.ratio))
    except ReapcError as error:
        print(f"llmcompressor_reap.py: {error}", file=sys.stderr)
        return error.exit_code
    common = {layer: len(set(experts) & set(ours[layer])) for layer, experts in theirs.items()}
    print(json.dumps({"kept": theirs, "kept_by_reapc_too": common, "of": {k: len(v) for k, v in theirs.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
