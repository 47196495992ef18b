"""The checkpoint that llm-compressor's own REAP prunes: ``llmcompressor_reap.py MODEL TOKENS RATIO OUT [--release R]``.

It decides in its own environment (tools/llmcompressor_env.py makes it where it is missing); the checkpoint with the
experts that it keeps is written by reapc's own pruning, since both copy the rows. Prints as JSON which experts it kept
in every layer, and how many of them reapc's ``reap`` keeps on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from llmcompressor_run import RELEASE, done_by

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import choose, kept_count
from reapc.prune.rewrite import Kept, prune
from reapc.stream.tokens import read_tokens


def kept_by(model: Path, tokens: Path, ratio: float, release: str = RELEASE) -> Kept:
    """Experts kept by layer, with its default of running a layer again after it was pruned. CannotBeDone with the end
    of what it said where it fails."""
    kept = done_by("llmcompressor", model, tokens, release, propagate=True, sparsity=ratio, batch=16)["kept"]
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
