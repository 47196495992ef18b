"""``reapc observe MODEL``: expert scores over calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reapc.errors import ReapcError
from reapc.units import parse_bytes


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ReapcError(f"--shard {text!r}: K/N with K from 1 to N is expected, as in 2/8")
    return int(index), int(count)


def _bound(text: str) -> int:
    try:
        return parse_bytes(text, zero=False)
    except ValueError as error:
        raise ReapcError(f"--memory: {error}") from error


@click.command("observe")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--data",
    default="auto",
    help='A preset of `reapc corpora`, a .toml of a mix, .jsonl, text file, folder, .safetensors of ids, or "auto".',
)
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids (sequences, length) int32.")
@click.option("--sequences", default=128, show_default=True, help="With --data: sequences x length tokens are read.")
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence at most (with --data).")
@click.option("--seed", default=0, show_default=True, help="Shuffles the documents.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, or GPUs that take turns: cuda:0,cuda:1. auto: a GPU where there is one.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Bound on anonymous memory (of each worker), as 2GB; else half of the RAM that is free. docs/observe.md",
)
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
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Observe in shards on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT. docs/distributed.md",
)
@click.option("--shards", type=click.IntRange(1), help="With --ray: into how many; default: what runs at a time.")
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
    memory: str | None,
    dtype: str,
    out: Path,
    shard: str | None,
    ray: str | None,
    shards: int | None,
    work: Path | None,
    as_json: bool,
) -> None:
    """Record per-expert scores of MODEL (a folder or a hub id) in one streamed forward pass."""
    from reapc.checkpoint.source import fetch
    from reapc.observe.distributed import observe_on_ray, require_ray

    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    if tokens is not None and data != "auto":
        raise ReapcError("--data and --tokens are both given", hint="remove one of them")
    if shard and ray:
        raise ReapcError("--shard and --ray are both given", hint="with --ray, --shards N says how many there are")
    if shards and not ray:
        raise ReapcError("--shards is for --ray", hint="--shard K/N observes one shard here")
    part = _shard(shard) if shard else None
    bound = _bound(memory) if memory else None
    if ray is not None:
        require_ray(ray)
    folder = fetch(model, revision, Path("."))
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.observe.corpus import load_data
    from reapc.observe.observe import observe
    from reapc.stream.devices import compute_settings
    from reapc.stream.memory import Memory
    from reapc.stream.tokens import read_tokens

    checkpoint = Checkpoint(folder)
    vocab, progress = checkpoint.spec.vocab_size, make_progress()
    if tokens is not None:
        calibration = read_tokens(tokens, vocab)
    else:
        calibration = load_data(
            folder, data, Path("."), length, sequences, seed, vocab, context=checkpoint.spec.max_context,
            progress=progress,
        )  # fmt: skip
    work = work or out.with_name(out.name + ".work")
    used: Memory | None = None
    if ray is not None:
        scores = observe_on_ray(
            ray, checkpoint, calibration, work, progress, out=out, model_name=model, revision=revision, device=device,
            dtype=dtype, memory_bytes=bound, shards=shards,
        )  # fmt: skip
    else:
        device, torch_dtype = compute_settings(device, dtype, checkpoint.spec.dtype, several=True)
        with Memory(bound) as used:
            scores = observe(
                checkpoint, calibration, work, progress, device=device, dtype=torch_dtype, memory=used,
                model_name=model, revision=revision, shard=part, out=out,
            )  # fmt: skip
        if used.exceeded:
            click.echo(f"warning: more than --memory {memory} was used: {used.describe()}", err=True)
    never = scores.never_routed()
    if as_json:
        summary = {"scores": str(out), "tokens": scores.header["tokens"], "layers": scores.layers}
        if used is not None:
            summary["memory"] = used.to_json()
        click.echo(json.dumps({**summary, "never_routed": {str(i): e for i, e in never.items()}}))
    else:
        count = sum(map(len, never.values()))
        click.echo(f"{out}: {len(scores.layers)} MoE layers, {scores.header['tokens']} tokens, {count} never routed")
        if used is not None:
            click.echo(used.describe())
