"""``reapc sweep MODEL``: KL against bytes, measured: pruned and quantized in every way at equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

import click


def _others(values: tuple[str, ...]) -> list[tuple[str, Path]]:
    """NAME=PATH pairs."""
    from reapc.errors import ReapcError
    from reapc.sweep.frontier import ALL_EXPERTS, OURS

    found: dict[str, Path] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not (sign and name.strip() and path) or name in (ALL_EXPERTS, OURS) or name in found:
            raise ReapcError(f"--also {value}: expected NAME=PATH with a name of its own")
        if not Path(path).exists():
            raise ReapcError(f"--also {value}: {path} does not exist")
        found[name.strip()] = Path(path)
    return list(found.items())


@click.command("sweep")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--tokens", required=True, type=click.Path(path_type=Path), help="Calibration: safetensors, input_ids.")
@click.option("--panel", required=True, type=click.Path(path_type=Path), help="Held-out text: safetensors, input_ids.")
@click.option("--budgets", help="Equal bytes: 2.0,2.5,3.0bpw of the whole model's weights, or sizes: 12GB,16GB.")
@click.option("--ratios", help="In the place of budgets, ratios of pruning: 0.25,0.5 or 0.1..0.9.")
@click.option("--formats", default="auto", show_default=True, help="GGUF types or `reapc formats`; auto: usual GGUF.")
@click.option("--mixes", default=3, show_default=True, type=click.IntRange(0), help="Pruned formats for each budget.")
@click.option("--max-ratio", default=0.5, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--criteria", default="reap,auto", show_default=True, help="Who chooses; auto: who loses least.")
@click.option("--heal", default="both", show_default=True, type=click.Choice(["both", "yes", "no"]))
@click.option("--refit", is_flag=True, help="Quantized mixes also healed after quantization (docs/healing.md).")
@click.option("--joint/--no-joint", default=True, show_default=True, help="With budgets: the allocator's mixes too.")
@click.option("--iters", type=click.IntRange(0), help="AutoRound's tuning steps.")
@click.option(
    "--also", multiple=True, metavar="NAME=PATH", help="A folder or GGUF file of somebody else's, measured too."
)
@click.option("--pre-tokenizer", help="Rule for a tokenizer that llama.cpp does not know, e.g. qwen2.")
@click.option("--dissolve-groups", is_flag=True, help="Give the router's expert groups up.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder; what was measured stays there.")
@click.option("--json", "as_json", is_flag=True, help="Print the frontier as JSON.")
def command(
    model: str, revision: str | None, tokens: Path, panel: Path, budgets: str | None, ratios: str | None, formats: str,
    mixes: int, max_ratio: float, criteria: str, heal: str, refit: bool, joint: bool, iters: int | None,
    also: tuple[str, ...], pre_tokenizer: str | None, dissolve_groups: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Build and measure MODEL (a folder or hub id, 16 bit) pruned and quantized in every way, at equal bytes.

    Writes frontier.md, frontier.html, sweep.json and every point to the folder OUT; run again, it goes on where it was.
    """
    from reapc.errors import ReapcError

    if bool(budgets) == bool(ratios):
        raise ReapcError("expected either --budgets or --ratios", hint="for example --budgets 2.0,2.5,3.0,3.5,4.5bpw")
    others = _others(also)
    from reapc.checkpoint.source import fetch

    folder = fetch(model, revision, Path("."))
    from reapc.checkpoint.reader import Checkpoint
    from reapc.cli.progress import make_progress
    from reapc.passes import Passes
    from reapc.stages import StageCache
    from reapc.stream.families import check_family, check_state
    from reapc.stream.tokens import read_tokens
    from reapc.sweep.frontier import markdown
    from reapc.sweep.grid import parse_formats, parse_ratios
    from reapc.sweep.run import Settings
    from reapc.sweep.whole import sweep_budgets, sweep_ratios

    checkpoint, progress = Checkpoint(folder), make_progress()
    check_family(checkpoint.spec, str(folder))
    check_state(checkpoint.spec, checkpoint.config, str(folder))
    vocab = checkpoint.spec.vocab_size
    calibration, held_out = read_tokens(tokens, vocab), read_tokens(panel, vocab)
    passes = Passes(
        checkpoint, calibration, StageCache(out / "stages", progress.log), progress, pre_tokenizer=pre_tokenizer
    )
    ways = {"both": (False, True), "yes": (True,), "no": (False,)}[heal]
    settings = Settings(tuple(part.strip() for part in criteria.split(",")), ways, iters, dissolve_groups, refit)
    chosen = parse_formats(formats, checkpoint.spec)
    if ratios:
        found = sweep_ratios(passes, held_out, out, settings, parse_ratios(ratios), chosen, others)
    else:
        found = sweep_budgets(passes, held_out, out, settings, budgets or "", chosen, max_ratio, mixes, others, joint)
    click.echo(json.dumps(found.to_json()) if as_json else markdown(found))
