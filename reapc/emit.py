"""Writes the output folder of a build: the result, what it was decided by, the launch script and a small client."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.checkpoint.atomic import atomic_path
from reapc.engines.artifact import read_artifact
from reapc.output import place
from reapc.plan import Plan
from reapc.recipe import Recipe
from reapc.report.data import FIDELITY, REPORT

if TYPE_CHECKING:
    from reapc.observe.scores import Scores
    from reapc.stream.tokens import Tokens


def write_result(
    out: Path, result: Path, plans: Mapping[str, Plan], recipe: Recipe, scores: Scores, reference: Path,
    held_out: Tokens, facts: Mapping[str, Any], detail: Callable[[], Mapping[str, Any]], log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Writes ``out``, atomically, from ``result`` (a GGUF file or a folder), and returns its manifest: ``facts`` with
    the artifact's name and the size of every file. The last of ``plans`` is the one that was carried out. ``detail``
    gives what fidelity.json holds; where it or the report fails, the result goes out without, and ``log`` says so."""
    from reapc.report.write import write_report
    from reapc.stream.tokens import write_tokens

    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    with atomic_path(out) as partial:
        partial.mkdir(parents=True)
        if result.is_file():
            name = "model.gguf"
            place(result, partial / name)
        else:
            name = "model"
            for path in sorted(p for p in result.iterdir() if p.is_file() and not p.name.startswith(".")):
                place(path, partial / name / path.name)
        scores.save(partial / "scores.safetensors")
        place(reference, partial / "reference.safetensors")
        write_tokens(partial / "held_out.safetensors", held_out)
        texts = {key: plan.to_json() for key, plan in plans.items()}
        (partial / "plan.json").write_text(json.dumps(texts, indent=2) + "\n")
        with _left_out(FIDELITY, log):
            (partial / FIDELITY).write_text(json.dumps(detail()) + "\n")
        write_scripts(partial, list(plans.values())[-1], name, recipe)
        files = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
        manifest = {**facts, "artifact": name, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        with _left_out(REPORT, log):
            manifest = write_report(partial, siblings=out.parent)
    return manifest


@contextmanager
def _left_out(name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Goes on where a file fails that the result can do without."""
    try:
        yield
    except Exception as error:
        log(f"{name}: left out, it could not be written ({type(error).__name__}: {error})")


def write_scripts(folder: Path, plan: Plan, model: str, recipe: Recipe) -> None:
    """``serve.sh`` for the plan's engine and ``client.py``; ``model`` is the artifact's name inside ``folder``."""
    from reapc.engines import vllm_launch

    if plan.chosen.engine == "vllm":
        text = vllm_launch.serve_script(plan, model, recipe, read_artifact(folder / model))
    else:
        from reapc.engines import llamacpp
        from reapc.toolchain import find_llamacpp

        tools = find_llamacpp()
        text = llamacpp.serve_script(
            plan,
            model,
            recipe,
            server_hint=str(tools.server) if tools.server else None,
            python_hint=sys.executable,
            bindings_hint=str(tools.bindings) if tools.bindings else None,
            lib_hint=str(tools.lib_dir) if tools.lib_dir else None,
        )
    for name, content in (("serve.sh", text), ("client.py", vllm_launch.client_script(plan, recipe))):
        script = folder / name
        script.write_text(content)
        script.chmod(0o755)
