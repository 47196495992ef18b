"""``reapc heal ORIGINAL PRUNED``: a pruned checkpoint refitted to its original, whoever pruned it."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("heal")
@click.argument("original")
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--revision", help="Revision of a hub model.")
@click.option("--tokens", required=True, type=click.Path(path_type=Path), help="safetensors with input_ids.")
@click.option("--device", default="auto", show_default=True, help="cpu or cuda; auto: a GPU where there is one.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for hidden states; kept when interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    original: str,
    pruned: Path,
    revision: str | None,
    tokens: Path,
    device: str,
    out: Path,
    work: Path | None,
    as_json: bool,
) -> None:
    """Refit the experts of PRUNED (a folder) so that each layer gives again what ORIGINAL (a folder or hub id) gave.

    Only down projections change, in closed form. The result is a stock checkpoint.
    """
    from reapc.checkpoint.atomic import refuse_existing
    from reapc.checkpoint.source import fetch

    refuse_existing(out)
    folder = fetch(original, revision, Path("."))
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.healing import heal_and_judge
    from reapc.stream.devices import compute_settings
    from reapc.stream.tokens import read_tokens

    checkpoint = Checkpoint(folder)
    device, dtype = compute_settings(device, "float32")
    found = heal_and_judge(
        checkpoint, pruned, read_tokens(tokens, checkpoint.spec.vocab_size),
        work or out.with_name(out.name + ".work"), out, make_progress(), dtype=dtype, device=device,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"output": str(out), **found.to_json()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "lacking before", "after, fitted tokens", "after, others", "experts changed")
    for layer in found.layers:
        fit, other = (f"{100 * after / max(before, 1e-300):.0f} %" for before, after in (layer.fit, layer.choice))
        table.add_row(
            str(layer.layer), f"{layer.fit[0]:.3g}", fit, other if layer.kept else "not kept", str(layer.changed)
        )
    Console().print(table)
    before, after = found.before, found.after
    click.echo(f"KL {before.kl:.4f} -> {after.kl:.4f}, top-1 {before.top1:.3f} -> {after.top1:.3f}")
    click.echo(f"{out}: {'healed' if found.kept else 'as it was: healing made it worse'}")
