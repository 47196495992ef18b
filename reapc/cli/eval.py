"""``reapc eval OUT --server URL``: lm-eval against a running server, or the commands of other benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("eval")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--server", required=True, metavar="URL", help="The address of the running server.")
@click.option("--tasks", metavar="A,B", help="lm-eval's tasks.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many examples of each task.")
@click.option("--shots", type=click.IntRange(0), help="Examples in the prompt; default: the task's.")
@click.option("--include", type=click.Path(path_type=Path), help="A folder with task files (YAML) of your own.")
@click.option("--chat", is_flag=True, help="Ask through /v1/chat/completions, with the model's chat template.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Requests at a time.")
@click.option("--model", metavar="NAME", help="Which of the server's models; default: its first.")
@click.option("--api-key-env", metavar="NAME", help="The variable with the server's API key; default: serve.sh's.")
@click.option("--out", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write the results here, as JSON.")
@click.option("--print", "show", is_flag=True, help="Print the commands of EvalPlus, LiveCodeBench, BFCL, EvalScope "
              "and mini-SWE-agent for this server, and run nothing.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    out: Path, server: str, tasks: str | None, limit: int | None, shots: int | None, include: Path | None, chat: bool,
    concurrency: int, model: str | None, api_key_env: str | None, file: Path | None, show: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run lm-eval's TASKS against the server at URL that serves the build in OUT."""
    from reapc.errors import ReapcError
    from reapc.serving.built import read_built
    from reapc.serving.client import Client

    built = read_built(out)
    for warning in built.warnings:
        click.echo(f"warning: {warning}", err=True)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if show == bool(names):
        raise ReapcError(
            "--tasks and --print: one of the two is expected", hint="for example --tasks gsm8k,arc_easy --limit 100"
        )
    if file is not None and file.exists():
        raise ReapcError(f"{file}: is there already and is left untouched", hint="choose another name with --out")
    if not show:
        from reapc.serving.evaluate import require_lm_eval

        require_lm_eval()
    variable = api_key_env or built.key_variable
    with Client(server, variable, model) as client:
        info = client.connect()
        if show:
            _print_panel(client.url, info.model, variable, concurrency, as_json)
            return
        from reapc.cli.progress import make_progress
        from reapc.serving.evaluate import evaluate

        results = evaluate(
            built, client, names, make_progress(),
            limit=limit, shots=shots, include=include, chat=chat, concurrency=concurrency,
        )  # fmt: skip
        results["reapc"] = {
            "server": client.url, "engine": client.describe(), "model": info.model, "build": str(out),
            "build_key": built.manifest.get("key"),
        }  # fmt: skip
    text = json.dumps(results, indent=2, default=str)
    if file is not None:
        from reapc.checkpoint.atomic import write_text

        write_text(file, text + "\n")
    if as_json:
        click.echo(text)
    else:
        _print_results(results)


def _print_results(results: dict[str, Any]) -> None:
    for task, figures in results["results"].items():
        count = (results.get("n-samples") or {}).get(task, {}).get("effective")
        click.echo(f"{figures.get('alias', task)}{'' if count is None else f' ({count} examples)'}")
        for name, value in figures.items():
            if not isinstance(value, int | float) or "_stderr" in name or name in ("sample_len", "sample_count"):
                continue
            metric, _, how = name.partition(",")
            error = figures.get(f"{metric}_stderr,{how}")
            spread = f" +- {error:.4f}" if isinstance(error, float) else ""
            click.echo(f"  {metric}{'' if how in ('', 'none') else f' ({how})'}: {value:.4f}{spread}")


def _print_panel(url: str, model: str, variable: str, concurrency: int, as_json: bool) -> None:
    from reapc.serving.panel import benchmarks

    found = benchmarks(url, model, variable, concurrency)
    if as_json:
        click.echo(json.dumps([vars(item) for item in found], indent=2))
        return
    for number, item in enumerate(found):
        click.echo(f"{chr(10) if number else ''}# {item.name}: {item.install}")
        if item.note:
            click.echo(f"# {item.note}")
        for line in item.lines:
            click.echo(line)
