"""``reapc scores``: show, merge and mix observations, and how much the choice of experts depends on the data."""

from __future__ import annotations

import json
from pathlib import Path

import click

from reapc.cli.choices import CRITERIA
from reapc.errors import ReapcError

_OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="The scores file to write.")


@click.group("scores")
def command() -> None:
    """Show, merge and mix scores files."""


@command.command("show")
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def show(scores: Path, as_json: bool) -> None:
    """Print what SCORES holds."""
    from reapc.observe.combine import missing_shards
    from reapc.observe.scores import load_scores

    loaded = load_scores(scores)
    if as_json:
        click.echo(json.dumps(loaded.to_json()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "routed: least", "median", "most", "REAP: lowest", "median", "highest", "never routed")
    for index in loaded.layers:
        layer = loaded.layer(index)
        count, reap = sorted(layer["routed_tokens"]), sorted(layer["reap"])
        middle = len(count) // 2
        never = sum(value == 0 for value in count)
        values = [f"{v:.0f}" for v in (count[0], count[middle], count[-1])]
        values += [f"{v:.4g}" for v in (reap[0], reap[middle], reap[-1])]
        table.add_row(str(index), *values, str(never))
    console = Console()
    console.print(f"{loaded.header['model']}: {loaded.header['tokens']} tokens of {loaded.header['calibration']}")
    if len(loaded.domains) > 1:
        counts = zip(loaded.domains, loaded.domain_tokens, strict=True)
        console.print("domains: " + ", ".join(f"{name} {tokens:.0f}" for name, tokens in counts))
    for source, shards in missing_shards(loaded).items():
        console.print(f"not complete: shards {shards} of {source} are not in it")
    console.print(table)


@command.command("stability")
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.25, show_default=True)
@click.option("--criterion", type=click.Choice(CRITERIA), default="reap", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def stability_command(scores: Path, ratio: float, criterion: str, as_json: bool) -> None:
    """How much the experts that a prune of SCORES drops depend on the data: halves, amount, domains, dead experts."""
    from reapc.observe.scores import load_scores
    from reapc.prune.criteria import check_kept, kept_count
    from reapc.prune.stability import stability

    loaded = load_scores(scores)
    count = loaded.header["num_experts"]
    kept = kept_count(count, ratio)
    check_kept(kept, count, loaded.header["top_k"])
    if kept == count:
        raise ReapcError(f"--ratio {ratio} drops none of {count} experts", hint="a larger ratio")
    found = stability(loaded, criterion, kept)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{loaded.header['model']}: {kept} of {count} experts kept by {criterion}")
    for line in found.lines():
        console.print(f"- {line}")
    if found.curve:
        table = Table("sequences", "tokens", "same experts dropped as with all")
        for sequences, tokens, share in found.curve:
            table.add_row(str(sequences), str(tokens), f"{100 * share:.0f} %")
        console.print(table)
    if found.domains:
        table = Table("domain", "domain", "same experts dropped")
        for a, b, share in found.domains:
            table.add_row(a, b, f"{100 * share:.0f} %")
        console.print(table)
    if found.dead:
        console.print("never used, by layer: " + ", ".join(f"{layer}: {n}" for layer, n in found.dead.items()))


@command.command("merge")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@_OUT
def merge_command(parts: tuple[Path, ...], out: Path) -> None:
    """Add the observations PARTS of one model into one file."""
    from reapc.observe.combine import merge, missing_shards
    from reapc.observe.scores import load_scores

    _absent(out)
    merged = merge([load_scores(part) for part in parts], [str(part) for part in parts])
    merged.save(out)
    for source, shards in missing_shards(merged).items():
        click.echo(f"{out}: shards {', '.join(map(str, shards))} of {source} are not in it", err=True)
    click.echo(f"{out}: {len(parts)} observations, {merged.header['tokens']} tokens")


@command.command("mix")
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--weight", required=True, help="Shares of the domains: code=0.7,chat=0.3. Others are left out.")
@_OUT
def mix_command(scores: Path, weight: str, out: Path) -> None:
    """Weigh the domains of SCORES anew, without observing again."""
    from reapc.observe.combine import mix
    from reapc.observe.scores import load_scores

    _absent(out)
    loaded = load_scores(scores)
    weights = _weights(weight)
    mixed = mix(loaded, weights, str(scores))
    mixed.save(out)
    left = [name for name in loaded.domains if name not in weights]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mixed.header["mix"].items())
    click.echo(f"{out}: {shares}" + (f"; left out: {', '.join(left)}" if left else ""))


def _weights(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.rpartition("=")
        name = name.strip()
        try:
            number = float(value)
        except ValueError:
            name = ""
        if not name or name in found:
            raise ReapcError(
                f"--weight {text!r}: {item!r} is not NAME=NUMBER, once for each domain", hint="code=0.7,chat=0.3"
            )
        found[name] = number
    return found


def _absent(out: Path) -> None:
    if out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
