"""``reapc observe MODEL``: expert scores over calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reapc.errors import ReapcError


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ReapcError(f"--shard {text!r}: K/N with K from 1 to N is expected, as in 2/8")
    return int(index), int(count)


@click.command("observe")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--data", default="auto", help='Text file, .jsonl, folder, .safetensors of token ids, or "auto".')
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids (sequences, length) int32.")
@click.option("--sequences", default=128, show_default=True, help="Sequences at most (with --data).")
@click.option("--length", default=512, show_default=True, help="Tokens per sequence (with --data).")
@click.option("--seed", default=0, show_default=True, help="Shuffles the documents.")
@click.option("--device", default="auto", show_default=True, help="cpu or cuda; auto: a GPU where there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Of the computation; auto: float32 on a CPU, the model's own on a GPU.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The scores file to write.")
@click.option(
    "--shard", metavar="K/N", help="Only the K-th of N runs of whole batches; `reapc scores merge` adds them up."
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for hidden states; kept when interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def command(
    model: str,
    revision: str | None,
    data: str,
    tokens: Path | None,
    sequences: int,
    length: int,
    seed: int,
    device: str,
    dtype: str,
    out: Path,
    shard: str | None,
    work: Path | None,
    as_json: bool,
) -> None:
    """Record per-expert scores of MODEL (a folder or a hub id) in one streamed forward pass."""
    from reapc.checkpoint.source import fetch

    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    if tokens is not None and data != "auto":
        raise ReapcError("--data and --tokens are both given", hint="remove one of them")
    part = _shard(shard) if shard else None
    folder = fetch(model, revision, Path("."))
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.observe.corpus import load_data
    from reapc.observe.observe import observe
    from reapc.stream.model import compute_settings
    from reapc.stream.tokens import read_tokens

    checkpoint = Checkpoint(folder)
    vocab = checkpoint.spec.vocab_size
    if tokens is not None:
        calibration = read_tokens(tokens, vocab)
    else:
        calibration = load_data(folder, data, Path("."), length, sequences, seed, vocab)
    device, torch_dtype = compute_settings(device, dtype, checkpoint.spec.dtype)
    scores = observe(
        checkpoint,
        calibration,
        work or out.with_name(out.name + ".work"),
        make_progress(),
        device=device,
        dtype=torch_dtype,
        model_name=model,
        revision=revision,
        shard=part,
        out=out,
    )
    never = scores.never_routed()
    if as_json:
        summary = {"scores": str(out), "tokens": scores.header["tokens"], "layers": scores.layers}
        click.echo(json.dumps({**summary, "never_routed": {str(i): e for i, e in never.items()}}))
    else:
        count = sum(map(len, never.values()))
        click.echo(f"{out}: {len(scores.layers)} MoE layers, {scores.header['tokens']} tokens, {count} never routed")
