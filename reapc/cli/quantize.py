"""``reapc quantize MODEL --format Q4_K_M --out FILE``: a checkpoint as a quantized GGUF file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click

from reapc.errors import ReapcError


@click.command("quantize")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--format", "ftype", required=True, help="A llama.cpp type: Q4_K_M, Q3_K_M, IQ4_XS, Q8_0, BF16 ...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .gguf file to write.")
@click.option("--data", default="auto", help="Calibration for the imatrix: as in `reapc observe`.")
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids for the imatrix.")
@click.option("--imatrix/--no-imatrix", default=True, help="Weigh the rounding by observed inputs.")
@click.option("--pre-tokenizer", help="Name of llama.cpp's pre-tokenizer, when it does not know the model's.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def command(
    model: str,
    revision: str | None,
    ftype: str,
    out: Path,
    data: str,
    tokens: Path | None,
    imatrix: bool,
    pre_tokenizer: str | None,
    as_json: bool,
) -> None:
    """Convert MODEL (a folder or a hub id) to GGUF and quantize it with llama.cpp's own tools."""
    from reapc.checkpoint.source import fetch
    from reapc.formats.gguf import check_format

    fmt = check_format(ftype)
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    if tokens is not None and data != "auto":
        raise ReapcError("--data and --tokens are both given", hint="remove one of them")
    folder = fetch(model, revision, Path("."))
    from reapc.checkpoint.atomic import make_folder, require_room
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.observe.corpus import load_data
    from reapc.observe.observe import observe
    from reapc.quantize import gguf
    from reapc.quantize.imatrix import write_from_scores

    checkpoint, progress = Checkpoint(folder), make_progress()
    make_folder(out.parent)
    require_room(out.parent, 3 * checkpoint.spec.parameters, "the GGUF files")
    with tempfile.TemporaryDirectory(prefix=".reapc-quantize-", dir=out.parent) as name:
        work = Path(name)
        if fmt in ("BF16", "F16"):
            gguf.convert(folder, out, fmt.lower(), pre_tokenizer, log=progress.log)
        else:
            gguf.convert(folder, work / "base.gguf", "bf16", pre_tokenizer, log=progress.log)
            matrix = None
            if imatrix:
                source = str(tokens) if tokens is not None else data
                sequences = 1 << 30 if tokens is not None else 128
                calibration = load_data(folder, source, Path("."), 512, sequences, 0, checkpoint.spec.vocab_size)
                scores = observe(checkpoint, calibration, work / "observe", progress)
                matrix = work / "imatrix.gguf"
                write_from_scores(matrix, scores, calibration)
            threads = os.cpu_count() or 1
            gguf.quantize(work / "base.gguf", out, fmt, matrix, threads=threads, log=progress.log)
    size = out.stat().st_size
    if as_json:
        click.echo(json.dumps({"output": str(out), "format": fmt, "bytes": size}))
    else:
        click.echo(f"{out}: {fmt}, {size:,} bytes")
