"""``reapc compare A B --tokens FILE``: what B lost against A."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--tokens", required=True, type=click.Path(path_type=Path), help="safetensors with input_ids.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(a: Path, b: Path, tokens: Path, as_json: bool) -> None:
    """KL(A || B), top-1 agreement and perplexities on held-out tokens. A, B: checkpoint folders or GGUF files."""
    from reapc.cli.progress import make_progress
    from reapc.stream.tokens import read_tokens
    from reapc.verify.fidelity import compare, vocabulary_of

    result = compare(a, b, read_tokens(tokens, vocabulary_of(a)), make_progress())
    if as_json:
        figures = result.to_json()
        if not figures["domains"]:
            del figures["domains"]
        click.echo(json.dumps(figures))
        return
    for name, row in {"all": result.to_json(), **result.domains}.items():
        change = ""
        if row["perplexity_a"] is not None:
            change = f", perplexity {row['perplexity_a']:.3f} -> {row['perplexity_b']:.3f}"
        click.echo(
            f"{name}: KL(A || B) {row['kl']:.5f} nats, top-1 {100 * row['top1']:.2f} %{change}, {row['tokens']} tokens"
        )
