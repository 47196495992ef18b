"""``reapc quantize MODEL --format FORMAT --out PATH``: a checkpoint as a quantized GGUF file, or as one that vLLM
serves."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reapc.errors import ReapcError

if TYPE_CHECKING:
    from reapc.formats.weights import WeightFormat

SEQUENCES, LENGTH = 128, 512
# llama-quantize's file type beside a list of types: the rules of Q8_0 raise and lower nothing
_ALLOCATED = "Q8_0"


@click.command("quantize")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--format", "name",
    help="A format of `reapc formats`: Q4_K_M, IQ4_XS, BF16 ... (GGUF); auto-round-w4g128, gptq-w4g128, ct-w4g128, "
    "fp8-block, auto-round-w4g32+attention=8 ... (for vLLM).",
)  # fmt: skip
@click.option(
    "--allocation", type=click.Path(path_type=Path),
    help="In the place of --format: the GGUF types that `reapc allocate --out` wrote. MODEL is already pruned.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .gguf file or the folder to write.")
@click.option("--data", default="auto", help="Calibration text: as in `reapc observe`.")
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids for the calibration.")
@click.option(
    "--method", type=click.Choice(["auto", "auto_round", "gptq", "fp8"]), default="auto",
    help="Whose quantizer writes it, where several can: auto_round writes gptq formats too.",
)  # fmt: skip
@click.option(
    "--iters", type=click.IntRange(min=0), help="AutoRound's tuning steps (default 200; 0: round to nearest)."
)
@click.option("--imatrix/--no-imatrix", default=True, help="GGUF: weigh the rounding by observed inputs.")
@click.option("--pre-tokenizer", help="GGUF: llama.cpp's pre-tokenizer, when it does not know the model's.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def command(
    model: str,
    revision: str | None,
    name: str | None,
    allocation: Path | None,
    out: Path,
    data: str,
    tokens: Path | None,
    method: str,
    iters: int | None,
    imatrix: bool,
    pre_tokenizer: str | None,
    as_json: bool,
) -> None:
    """Quantize MODEL (a folder or a hub id, in 16 bit): with llama.cpp's own tools to GGUF, with AutoRound, GPTQModel
    or a plain cast to FP8 for vLLM."""
    from reapc.planner.question import check_format

    if (name is None) == (allocation is None):
        raise ReapcError("give one of --format and --allocation")
    from reapc.allocate.record import check_count, read_allocation
    from reapc.arch import load_config, model_spec

    allocated = read_allocation(allocation) if allocation is not None else None
    if allocated is not None and allocated.get("engine") == "vllm":
        name = allocated["format"]
    engine, canonical = check_format(name) if name is not None else ("llama.cpp", _ALLOCATED)
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    if tokens is not None and data != "auto":
        raise ReapcError("--data and --tokens are both given", hint="remove one of them")
    from reapc.checkpoint.source import fetch
    from reapc.formats import weights

    source = str(tokens) if tokens is not None else data
    sequences = 1 << 30 if tokens is not None else SEQUENCES
    fmt = weights.parse(canonical) if name is not None else None
    if engine == "llama.cpp" or fmt is None or not fmt.quantized:  # bf16 and fp16 in any case: a GGUF in 16 bit
        ftype = canonical.upper().replace("FP16", "F16")
        if method != "auto" or iters is not None:
            raise ReapcError(f"--method and --iters mean nothing for {ftype}, which llama.cpp's quantizer writes")
        folder = fetch(model, revision, Path("."))
        summary = _to_gguf(folder, out, ftype, source, sequences, imatrix, pre_tokenizer, allocation)
    else:
        if pre_tokenizer is not None:
            raise ReapcError(f"--pre-tokenizer is for GGUF, and {canonical} is not a GGUF type")
        folder = fetch(model, revision, Path("."))
        if allocated is not None and allocation is not None:
            check_count(allocated, model_spec(load_config(folder), str(folder)), allocation)
        summary = _to_checkpoint(folder, out, fmt, source, sequences, method, iters)
    if as_json:
        click.echo(json.dumps(summary))
        return
    click.echo(f"{out}: {summary['format']}, {summary['bytes']:,} bytes")
    if "starved" in summary and summary["starved"]["count"]:
        click.echo(summary["starved"]["summary"])


def _to_gguf(
    folder: Path,
    out: Path,
    fmt: str,
    data: str,
    sequences: int,
    imatrix: bool,
    pre_tokenizer: str | None,
    allocation: Path | None,
) -> dict[str, Any]:
    from reapc.allocate.record import check_allocation, read_allocation
    from reapc.checkpoint.atomic import make_folder, require_room
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.observe.corpus import load_data
    from reapc.observe.observe import observe
    from reapc.quantize import gguf
    from reapc.quantize.imatrix import write_from_scores

    checkpoint, progress = Checkpoint(folder), make_progress()
    allocated = read_allocation(allocation) if allocation else None
    if allocated and allocation:
        check_allocation(allocated, checkpoint.spec, allocation, imatrix)
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
                vocab = checkpoint.spec.vocab_size
                calibration = load_data(folder, data, Path("."), LENGTH, sequences, 0, vocab)
                scores = observe(checkpoint, calibration, work / "observe", progress)
                matrix = work / "imatrix.gguf"
                write_from_scores(matrix, scores, calibration, checkpoint.spec)
            threads = os.cpu_count() or 1
            types = allocated["types"] if allocated else None
            gguf.quantize(work / "base.gguf", out, fmt, matrix, threads=threads, log=progress.log, types=types)
    summary = {"output": str(out), "format": "allocated" if allocated else fmt, "bytes": out.stat().st_size}
    return summary | ({"data_bytes": allocated["data_bytes"]} if allocated else {})


def _to_checkpoint(
    folder: Path, out: Path, fmt: WeightFormat, data: str, sequences: int, method: str, iters: int | None
) -> dict[str, Any]:
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.formats import weights
    from reapc.observe.corpus import load_data
    from reapc.observe.observe import observe
    from reapc.probes import Host, available_ram
    from reapc.quantize import checkpoint as quantizer
    from reapc.quantize.source import refuse_quantized
    from reapc.quantize.starved import starved
    from reapc.verify.quantized import check_quantized

    checkpoint, progress = Checkpoint(folder), make_progress()
    refuse_quantized(checkpoint.config, folder)
    if reason := weights.misfit(fmt, checkpoint.spec):
        raise ReapcError(f"{folder}: {fmt.name}: {reason}", hint=weights.dividing_groups(fmt, checkpoint.spec))
    writer = quantizer.writer_for(fmt, method, checkpoint.spec)
    if iters is not None and writer.tool != "auto-round":
        raise ReapcError(f"--iters is AutoRound's, and {writer.tool} writes {fmt.name}")
    quantizer.versions(writer)
    quantizer.require_memory(checkpoint.spec, writer, available_ram(Host(), []))
    tokens = load_data(folder, data, Path("."), LENGTH, sequences, 0, checkpoint.spec.vocab_size)
    threads = os.cpu_count() or 1
    facts = quantizer.quantize(folder, out, fmt, tokens, progress, method=method, iters=iters, threads=threads)
    report = check_quantized(out, fmt, checkpoint.spec, original=checkpoint)
    summary = {
        "output": str(out), "format": fmt.name, "bytes": Checkpoint(out).bytes,
        "predicted_bytes": weights.checkpoint_bytes(fmt, checkpoint.spec),
        "expert_bits": weights.expert_bits(fmt, checkpoint.spec),
        "quantizer": facts, "reload": report.to_json(),
    }  # fmt: skip
    if writer.tool != "reapc":
        with tempfile.TemporaryDirectory(prefix="reapc-quantize-") as work:
            summary["starved"] = starved(observe(checkpoint, tokens, Path(work) / "observe", progress, moments=False))
    return summary
