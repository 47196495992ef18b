"""``reapc corpora``: the calibration mixes that come with reapc, and packing one into a file of token ids."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from reapc.errors import ReapcError
from reapc.mix import Mix
from reapc.observe.corpora import presets


def to_json(mix: Mix) -> dict[str, Any]:
    """A mix as JSON: shares of its domains, and its sources with the keys that are set."""
    return {
        "name": mix.name.removeprefix(presets.PREFIX),
        "description": mix.description,
        "domains": mix.shares(),
        "sources": [source.model_dump(exclude_defaults=True) | {"weight": source.weight} for source in mix.sources],
    }


def _print_list() -> None:
    from reapc.cli import tables

    made = tables.table("Calibration mixes", ("preset", "domain", "data set", "licence"))
    for name in presets.names():
        mix = presets.preset(name)
        whole = sum(source.weight for source in mix.sources)
        for i, source in enumerate(mix.sources):
            domain = f"{source.domain} {source.weight / whole:.0%}"
            made.add_row("" if i else name, domain, source.name.removeprefix("hub:"), source.licence)
        made.add_section()
    tables.console().print(made, markup=False)


@click.command("pack")
@click.argument("data")
@click.option("--model", required=True, help="Folder or hub id of the model: its tokenizer and chat template are used.")
@click.option("--revision", help="Revision of a hub model.")
@click.option("--sequences", default=128, show_default=True, help="The budget: sequences x length tokens.")
@click.option("--length", default=512, show_default=True, help="Tokens of a row at most.")
@click.option("--held-out", default=0, show_default=True, help="Sequences more, of other samples, to verify with.")
@click.option("--seed", default=0, show_default=True, help="Shuffles the samples.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--held-out-file", type=click.Path(path_type=Path), help="The file of held-out tokens to write.")
@click.option("--json", "as_json", is_flag=True, help="Print what each source gave as JSON.")
def pack_command(
    data: str,
    model: str,
    revision: str | None,
    sequences: int,
    length: int,
    held_out: int,
    seed: int,
    out: Path,
    held_out_file: Path | None,
    as_json: bool,
) -> None:
    """Write the token ids of DATA (a preset, a .toml of a mix, .jsonl, a folder, a hub data set) for one model.

    The file needs no network and is the same everywhere: for `reapc observe --tokens`, for shards on other machines,
    and for calibration.data of a recipe."""
    from reapc.arch import load_config, model_spec
    from reapc.checkpoint.atomic import atomic_path
    from reapc.checkpoint.source import fetch
    from reapc.cli.progress import make_progress
    from reapc.observe.corpora.pack import tokens_by_domain
    from reapc.observe.corpus import load_split
    from reapc.stream.tokens import write_tokens

    if bool(held_out) != (held_out_file is not None):
        raise ReapcError("--held-out and --held-out-file belong together", hint="give both, or none")
    for path in filter(None, (out, held_out_file)):
        if path.suffix != ".safetensors":
            raise ReapcError(f"{path}: a name that ends in .safetensors is expected")
        if path.exists():
            raise ReapcError(f"{path}: exists already", hint="remove it or choose another name")
    folder = fetch(model, revision, Path("."), weights=False)
    spec = model_spec(load_config(folder), model)
    reports: list[Any] = []
    tokens, rest = load_split(
        folder, data, Path("."), length, sequences, held_out, seed, spec.vocab_size, context=spec.max_context,
        progress=make_progress(), reports=reports,
    )  # fmt: skip
    parts = [(out, tokens)] + ([(held_out_file, rest)] if held_out_file and rest else [])
    for path, part in parts:
        with atomic_path(path) as partial:
            write_tokens(partial, part)
    if as_json:
        written = {
            str(path): {"tokens": part.count, "rows": part.sequences, "domains": tokens_by_domain(part)}
            for path, part in parts
        }
        click.echo(json.dumps({"files": written, "sources": [asdict(report) for report in reports]}, indent=2))
        return
    for path, part in parts:
        domains = ", ".join(f"{name} {count}" for name, count in tokens_by_domain(part).items())
        click.echo(f"{path}: {part.count} tokens in {part.sequences} rows ({domains})")


class _Corpora(click.Command):
    """``reapc corpora [NAME]``, and ``reapc corpora pack`` with options of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["pack"]:
            return pack_command.make_context(f"{info_name} pack", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("corpora", cls=_Corpora)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """Lists the calibration mixes, or shows the file of the one called NAME.

    `reapc corpora pack DATA --model M --out F.safetensors` writes token ids."""
    if as_json:
        chosen = [name] if name else presets.names()
        found = [to_json(presets.preset(item)) for item in chosen]
        click.echo(json.dumps(found[0] if name else {"presets": found}, indent=2))
    elif name is None:
        _print_list()
    else:
        click.echo(presets.path_of(name).read_text(encoding="utf-8"), nl=False)
