"""A checkpoint quantized by llm-compressor's own GPTQ, W4A16 in groups of 128:
``llmcompressor_quantize.py MODEL TOKENS OUT [--release R]``. For ``reapc sweep --also NAME=OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmcompressor_run import RELEASE, done_by

from reapc.checkpoint.atomic import atomic_path, refuse_existing
from reapc.checkpoint.reader import Checkpoint
from reapc.checkpoint.side_files import copy_side_files
from reapc.errors import ReapcError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors with input_ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("--release", default=RELEASE)
    asked = parser.parse_args(arguments)
    try:
        refuse_existing(asked.out)
        checkpoint = Checkpoint(asked.model)
        with atomic_path(asked.out) as partial:
            out = str(partial.absolute())
            done_by("llmcompressor_gptq", asked.model, asked.tokens, asked.release, out=out, batch=8)
            copy_side_files(checkpoint, partial)
    except ReapcError as error:
        print(f"llmcompressor_quantize.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
