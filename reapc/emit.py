"""Writes the launch script beside the result."""

from __future__ import annotations

import sys
from pathlib import Path

from reapc.plan import Plan
from reapc.recipe import Recipe


def write_scripts(folder: Path, plan: Plan, model: str, recipe: Recipe) -> None:
    """``serve.sh`` for the plan's engine; ``model`` is the artifact's name inside ``folder``."""
    if plan.chosen.engine == "vllm":
        from reapc.engines import vllm

        text = vllm.serve_script(plan, model, recipe)
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
    script = folder / "serve.sh"
    script.write_text(text)
    script.chmod(0o755)
