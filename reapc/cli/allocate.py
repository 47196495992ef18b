"""``reapc allocate MODEL --scores SCORES --budget 3.0bpw``: how many experts, and which GGUF type for which tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from reapc.cli.choices import CRITERIA
from reapc.errors import ReapcError


@click.command("allocate")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--scores", "scores_file", type=click.Path(path_type=Path), help="From `reapc observe`; without: a prior."
)
@click.option(
    "--budget", required=True,
    help="Bytes of the file's tensors, as 12GB; or 3.0bpw: that for each of MODEL's expert weights, the rest at Q8_0.",
)  # fmt: skip
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids to measure KL on.")
@click.option("--sequences", type=click.IntRange(1), default=32, show_default=True, help="Of --tokens, at most.")
@click.option("--max-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True,
              help="Share of experts that may be dropped.")  # fmt: skip
@click.option("--criterion", type=click.Choice(CRITERIA), default="reap", show_default=True)
@click.option("--dissolve-groups", is_flag=True, help="As in `reapc prune`.")
@click.option("--types", help="GGUF types that may be chosen, as Q8_0,Q6_K,Q4_K,Q3_K,Q2_K. Default: 13 of them.")
@click.option("--segments", type=click.IntRange(1), default=1, show_default=True,
              help="With --tokens: probe the experts in so many runs of layers.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(0, 3), default=3, show_default=True,
              help="With --tokens: chosen mixes that are built and measured.")  # fmt: skip
@click.option("--pre-tokenizer", help="llama.cpp's pre-tokenizer, when it does not know the model's.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the probes; kept: the next budget reuses it.")
@click.option("--out", type=click.Path(path_type=Path), help="The allocation file to write, for `reapc quantize`.")
@click.option("--json", "as_json", is_flag=True, help="Print the allocation as JSON.")
def command(
    model: str,
    revision: str | None,
    scores_file: Path | None,
    budget: str,
    tokens: Path | None,
    sequences: int,
    max_ratio: float,
    criterion: str,
    dissolve_groups: bool,
    types: str | None,
    segments: int,
    rounds: int,
    pre_tokenizer: str | None,
    work: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the number of experts and every tensor's GGUF type together, with the least predicted KL under a budget.

    With --scores (observed with second moments) the rounding errors are measured with ggml's own quantizer; with
    --tokens as well, what they cost is measured in llama.cpp on real files, and so is the choice. MODEL alone is
    decided by the planner's prior, from its config.json.
    """
    from reapc.allocate.allocation import allocation_json, budget_bytes, decide, prior_only
    from reapc.arch import known, load_config, model_spec
    from reapc.checkpoint.atomic import write_text
    from reapc.planner.question import kept_counts
    from reapc.planner.tensor_groups import LADDER, file_parts

    if tokens is not None and scores_file is None:
        raise ReapcError("--tokens without --scores", hint="`reapc observe MODEL --out scores.safetensors` writes them")
    if out is not None and out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    chosen_types = tuple(part.strip().upper() for part in types.split(",")) if types else LADDER
    facts: dict[str, Any] = {"model": model, "criterion": criterion, "dissolve_groups": dissolve_groups}
    if scores_file is None:
        name = None if Path(model).is_dir() else known.find(model)
        spec = known.spec(name) if name else model_spec(load_config(Path(model)))
        parts = file_parts(spec, chosen_types)
        counts = kept_counts(spec, max_ratio=max_ratio, dissolve_groups=dissolve_groups)
        size = budget_bytes(budget, spec, parts)
        decided = decide(damages := prior_only(spec, counts, chosen_types), size)
    else:
        from reapc.checkpoint.reader import Checkpoint
        from reapc.checkpoint.source import fetch
        from reapc.cli.progress import make_progress
        from reapc.observe.scores import load_scores
        from reapc.prune.rewrite import check_scores

        checkpoint = Checkpoint(fetch(model, revision, Path(".")))
        spec = checkpoint.spec
        parts = file_parts(spec, chosen_types)
        size = budget_bytes(budget, spec, parts)
        scores = load_scores(scores_file)
        check_scores(scores, checkpoint, scores_file)
        counts = kept_counts(spec, max_ratio=max_ratio, dissolve_groups=dissolve_groups)
        facts["digest"] = checkpoint.digest
        damages, decided = _measured(
            checkpoint, scores, counts, criterion, dissolve_groups, chosen_types, tokens, sequences, segments, rounds,
            pre_tokenizer, work or Path(f"{out or 'allocation'}.work"), size, make_progress(),
        )  # fmt: skip
    summary = allocation_json(damages, spec, size, decided, facts)
    if out is not None:
        write_text(out, json.dumps(summary, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _show(summary)


def _measured(
    checkpoint: Any, scores: Any, counts: tuple[int, ...], criterion: str, dissolve: bool, types: tuple[str, ...],
    tokens: Path | None, sequences: int, segments: int, rounds: int, pre_tokenizer: str | None, work: Path,
    budget: int, progress: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Damages from scores and weights, and the decision. ``work`` keeps the unquantized GGUF and the probes."""
    from reapc.allocate.allocation import decide, measured, prober_of
    from reapc.checkpoint.atomic import make_folder, require_room
    from reapc.quantize import gguf
    from reapc.stages import digest_of

    identity = digest_of([checkpoint.digest, scores.header.get("observed")])
    folder = work / identity[:16]
    make_folder(folder)
    base = folder / "base.gguf"
    if not base.is_file():
        require_room(folder, 5 * checkpoint.spec.parameters, "the unquantized GGUF and the probes")
        gguf.convert(checkpoint.folder, base, "bf16", pre_tokenizer, log=progress.log)
    prober = None
    if tokens is not None:
        prober = prober_of(base, tokens, sequences, scores, checkpoint.spec, folder, progress, os.cpu_count() or 1)
    damages = measured(
        checkpoint.spec, base, scores, counts, criterion, progress, prober=prober, dissolve=dissolve, types=types,
        segments=segments,
    )  # fmt: skip
    return damages, decide(damages, budget, prober, rounds)


def _show(found: dict[str, Any]) -> None:
    from collections import Counter

    from reapc.planner.tensor_groups import part_of
    from reapc.units import format_bytes

    proof, source = found["certificate"], found["predicted"]["source"]
    said = {"measured": "measured", "errors": "rounding errors measured, their cost from the prior", "prior": "prior"}
    click.echo(
        f"{found['experts']} of {found['num_experts']} experts ({found['criterion']}), "
        f"{format_bytes(found['data_bytes'])} of {format_bytes(found['budget_bytes'])}; the experts' weights at "
        f"{found['bits_per_kept_expert_weight']:.2f} bits, "
        f"{found['bits_per_original_expert_weight']:.2f} per original weight"
    )
    click.echo(
        f"predicted KL {found['predicted_kl']:.4f} ({said[source]}): rounding {found['predicted']['rounding']:.4f}, "
        f"pruning {found['predicted']['pruning']:.4f}"
    )
    for row in found["measured"]:
        click.echo(
            f"built with {row['experts']} experts: KL {row['measured_kl']:.4f}, {row['predicted_kl']:.4f} predicted"
        )
    click.echo(
        f"certificate: of {proof['counts_compared']} expert counts none can be predicted below "
        f"{proof['lower_bound']:.6f}; the best found is {proof['best_predicted_kl']:.6f} "
        f"({proof['relative_gap']:.2%} above, {proof['proved_by']})"
    )
    for row in found["runners_up"]:
        click.echo(f"next: {row['experts']} experts, {format_bytes(row['data_bytes'])}, KL {row['predicted_kl']:.4f}")
    by_part: dict[str, Counter[str]] = {}
    for tensor, kind in found["types"].items():
        by_part.setdefault(part_of(tensor), Counter())[kind] += 1
    for part, counts in by_part.items():
        click.echo(f"{part}: " + ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()))
