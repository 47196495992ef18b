"""Writes the launch script and a small client beside the result."""

from __future__ import annotations

import sys
from pathlib import Path

from reapc.engines.artifact import read_artifact
from reapc.plan import Plan
from reapc.recipe import Recipe


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
