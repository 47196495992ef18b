"""``reapc verify OUT [--server URL]``: the files of a build, or a running server against the build's reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click


@click.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--server", metavar="URL", help="Check the server at this address; without it, the files of OUT.")
@click.option("--api-key-env", metavar="NAME", help="The variable with the server's API key; default: serve.sh's.")
@click.option("--model", metavar="NAME", help="Which of the server's models; default: its first.")
@click.option("--sequences", type=click.IntRange(1), default=16, show_default=True, help="Held-out sequences to use.")
@click.option(
    "--positions", type=click.IntRange(0), help="Positions of each, 0 for all; default: 32 of llama-server, else all."
)
@click.option("--top", type=click.IntRange(1), help="Log-probabilities per position; default: the whole of a small "
              "vocabulary, else 512 or the server's most.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Requests at a time.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts, a line each (or .jsonl with \"prompt\"); "
              "default: the beginnings of the held-out sequences.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens per prompt.")
@click.option("--max-kl", type=click.FloatRange(0), help="Exit 1 when the KL is above this, in nats.")
@click.option("--min-top1", type=click.FloatRange(0, 1), help="Exit 1 when top-1 agreement is below this (0 to 1).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    out: Path,
    server: str | None,
    api_key_env: str | None,
    model: str | None,
    sequences: int,
    positions: int | None,
    top: int | None,
    concurrency: int,
    prompts: Path | None,
    max_tokens: int,
    max_kl: float | None,
    min_top1: float | None,
    as_json: bool,
) -> None:
    """Check the build in OUT: the server at URL against the stored reference of the original, or the files alone."""
    from reapc.serving.built import check_files, read_built

    built = read_built(out)
    for warning in built.warnings:
        click.echo(f"warning: {warning}", err=True)
    if server is None:
        from reapc.verify.fit import check_fit

        count = check_files(built)
        rows = check_fit(built.artifact, built.plan)
        if as_json:
            click.echo(json.dumps({"files": count, "fit": [row.__dict__ for row in rows]}))
            return
        click.echo(f"{out}: {count} files have the sizes of the manifest")
        for row in rows:
            real = "not measured here" if row.actual_bytes is None else f"{row.actual_bytes:,}"
            click.echo(f"{row.name}: {row.predicted_bytes:,} bytes predicted, {real} ({row.source})")
        return

    from reapc.cli.progress import make_progress
    from reapc.serving.check import check_server

    report = check_server(
        built, server, api_key_env or built.key_variable, model, make_progress(),
        sequences=sequences, positions=positions, top=top, concurrency=concurrency, prompts=prompts,
        max_tokens=max_tokens,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    _limits(report["fidelity"], max_kl, min_top1)


def _limits(figures: dict[str, Any], max_kl: float | None, min_top1: float | None) -> None:
    from reapc.errors import CannotBeDone

    wrong = []
    if max_kl is not None and not figures["kl"] <= max_kl:
        wrong.append(f"KL {figures['kl']:.5f} is above --max-kl {max_kl}")
    if min_top1 is not None and figures["top1"] < min_top1:
        wrong.append(f"top-1 {figures['top1']:.4f} is below --min-top1 {min_top1}")
    if wrong:
        raise CannotBeDone("the server is worse than allowed: " + "; ".join(wrong))


def _show(report: dict[str, Any]) -> None:
    server, figures, load = report["server"], report["fidelity"], report["load"]
    click.echo(f"server: {server['url']}, {server['engine']}, model {server['model']!r}")
    for remark in report["remarks"]:
        click.echo(f"note: {remark}")
    for name, row in {"all": figures, **figures["domains"]}.items():
        bound = "" if row["kl_is"] == "exact" else ">= "
        unknown = ">= " if row["next_token_unknown"] else ""
        spread = row.get("kl_standard_error")
        error = "" if spread is None else f" +- {spread:.5f}"
        click.echo(
            f"{name}: KL(original || server) {bound}{row['kl']:.5f}{error} nats, top-1 {100 * row['top1']:.2f} %, "
            f"perplexity {row['perplexity_reference']:.3f} -> {unknown}{row['perplexity_server']:.3f}, "
            f"{row['positions']} positions"
        )
    if figures["kl_is"] != "exact":
        click.echo(
            f"KL over the {figures['top_k']} tokens per position that the server gives and one bucket for the rest, "
            f"which holds {100 * figures['rest_mass_reference']:.2f} % of the original's probability and "
            f"{100 * figures['rest_mass_server']:.2f} % of the server's: a lower bound"
        )
    if (stored := report["stored"]) is not None:
        click.echo(
            f"the build measured KL {stored['kl']:.5f}, top-1 {100 * stored['top1']:.2f} % over all held-out text"
        )
    repeated = load["repeated_4grams"]
    click.echo(
        f"{load['prompts']} prompts, at most {load['max_tokens']} tokens each: {100 * load['loop_rate']:.1f} % end "
        f"in a loop, {100 * load['not_ended_rate']:.1f} % did not end by themselves, repeated 4-grams "
        f"{'-' if repeated is None else f'{100 * repeated:.1f} %'}"
    )
    first, each = load["first_token_seconds"], load["per_token_seconds"]
    rate = load["tokens_per_second"] or math.nan
    click.echo(
        f"at concurrency {load['concurrency']}: {rate:.1f} tokens/s"
        + (f", first token {1e3 * first['median']:.0f} ms (p95 {1e3 * first['p95']:.0f})" if first else "")
        + (f", then {1e3 * each['median']:.1f} ms a token (p95 {1e3 * each['p95']:.1f})" if each else "")
    )
