"""``reapc prune MODEL --scores SCORES``: the pruned checkpoint, or the pruned GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from reapc.cli.choices import CRITERIA, MEASURED
from reapc.errors import ReapcError


def _opened(model: str, revision: str | None) -> tuple[Any, Callable[..., None], Callable[..., int]]:
    """The checkpoint or the GGUF file, and the functions that check scores of it and prune it."""
    if model.lower().endswith(".gguf") and Path(model).is_file():
        from reapc.prune.gguf import GgufSource, check_scores_of_gguf, prune_gguf

        return GgufSource(Path(model)), check_scores_of_gguf, prune_gguf
    from reapc.checkpoint.reader import Checkpoint
    from reapc.checkpoint.source import fetch
    from reapc.prune.rewrite import check_scores, prune

    return Checkpoint(fetch(model, revision, Path(".")), as_stored=True), check_scores, prune


def _calibration(source: Any, tokens: Path, heal: bool, measured: bool) -> Any:
    """The tokens of the file; ReapcError for a source that cannot be healed or measured, and for too few sequences."""
    from reapc.checkpoint.reader import Checkpoint
    from reapc.choice.samples import samples_of
    from reapc.healing import split
    from reapc.quantize.folder_form import FolderForm
    from reapc.stream.tokens import read_tokens

    if not isinstance(source, Checkpoint):
        option, what = ("--heal", "heal") if heal else ("--criterion auto", "prune")
        raise ReapcError(
            f"{option} with a GGUF file", hint=f"{what} the checkpoint that it was made of, and convert that"
        )
    if heal:
        FolderForm(Checkpoint(source.folder))  # refuses packings that refitted weights are not written in
    text = read_tokens(tokens, source.spec.vocab_size)
    if heal:
        split(text)
    if measured:
        samples_of(text)
    return text


def _measured(source: Any, scores: Any, kept: int, text: Any, work: Path, dissolve_groups: bool) -> Any:
    """The measured choice of a criterion."""
    from reapc.checkpoint.reader import Checkpoint
    from reapc.choice.measure import choose_measured
    from reapc.cli.progress import make_progress
    from reapc.stream.devices import compute_settings

    device, dtype = compute_settings("auto", "float32")
    return choose_measured(
        Checkpoint(source.folder), scores, kept, text, work, make_progress(), dissolve_groups=dissolve_groups,
        dtype=dtype, device=device,
    )  # fmt: skip


@click.command("prune")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--scores", "scores_file", required=True, type=click.Path(path_type=Path), help="From `reapc observe`.")
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), help="Share of experts to drop.")
@click.option("--experts", type=click.IntRange(min=1), help="Experts to keep.")
@click.option(
    "--criterion",
    type=click.Choice([*CRITERIA, MEASURED]),
    default="reap",
    show_default=True,
    help="auto: measured on --tokens (docs/choice.md).",
)
@click.option(
    "--mtp",
    type=click.Choice(["drop", "prune"]),
    default="drop",
    show_default=True,
    help="MTP (drafting) layers: leave them out, or let them keep as many experts as the others.",
)
@click.option(
    "--dissolve-groups",
    is_flag=True,
    help="Make one group of the router's groups, and choose experts freely: routing changes.",
)
@click.option("--heal", is_flag=True, help="Refit the kept experts to what MODEL gave on --tokens, in closed form.")
@click.option("--tokens", type=click.Path(path_type=Path), help="For --heal and auto: safetensors with input_ids.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder (or GGUF file) to write.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON summary.")
def command(
    model: str,
    revision: str | None,
    scores_file: Path,
    ratio: float | None,
    experts: int | None,
    criterion: str,
    mtp: Literal["drop", "prune"],
    dissolve_groups: bool,
    heal: bool,
    tokens: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Write MODEL with only its most valuable experts to a new folder.

    MODEL may be a GGUF file: its blocks are copied as they are, and the scores are those of the checkpoint that it was
    made of.
    """
    from reapc.checkpoint.atomic import refuse_existing, remove
    from reapc.cli.progress import make_progress
    from reapc.observe.scores import load_scores
    from reapc.prune.criteria import check_count, check_kept, choose, expert_values, groups_of, kept_count
    from reapc.units import format_bytes

    if (ratio is None) == (experts is None):
        raise ReapcError("give one of --ratio and --experts")
    if (heal or criterion == MEASURED) != (tokens is not None):
        option = "--criterion auto" if criterion == MEASURED and not heal else "--heal"
        raise ReapcError(
            f"{option} and --tokens go together", hint="what MODEL gives on the tokens of a file is what counts"
        )
    source, check_scores, prune = _opened(model, revision)
    text = _calibration(source, tokens, heal, criterion == MEASURED) if tokens else None
    spec = source.spec
    kept = experts if experts is not None else kept_count(spec.num_experts, float(ratio or 0))
    check_kept(kept, spec.num_experts, spec.top_k)
    check_count(spec, kept, dissolve_groups)
    scores = load_scores(scores_file)
    check_scores(scores, source, scores_file)
    choice, choice_work = None, out.with_name(out.name + ".choice")
    if criterion == MEASURED:
        refuse_existing(out)
        criterion = "reap"  # what experts are worth to tables of them, and which stay where all do
        if kept < spec.num_experts:
            choice = _measured(source, scores, kept, text, choice_work, dissolve_groups)
    chosen = choice.kept if choice else choose(scores, criterion, kept, groups_of(spec, dissolve_groups))
    settings = {"mtp": mtp, "dissolve_groups": dissolve_groups, "values": expert_values(scores, criterion)}
    more: dict[str, Any] = {"choice": choice.figures} if choice else {}
    if not heal or text is None:
        size = prune(source, chosen, out, make_progress(), **settings)
    else:
        from reapc.healing import prune_and_heal

        work = out.with_name(out.name + ".work")
        size, found = prune_and_heal(source, chosen, text, work, out, make_progress(), **settings)
        more["healing"] = found.to_json()
    if choice:
        remove(choice_work)
    if as_json:
        dropped = {str(i): sorted(set(range(spec.num_experts)) - set(kept_)) for i, kept_ in chosen.items()}
        click.echo(json.dumps({"output": str(out), "experts_kept": kept, "bytes": size, "dropped": dropped, **more}))
    else:
        by = f", chosen by {choice.winner}" if choice else ""
        click.echo(f"{out}: {kept} of {spec.num_experts} experts per layer{by}, {format_bytes(size)}")
