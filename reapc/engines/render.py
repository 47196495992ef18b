"""Renders launch scripts and clients. Values pass through shlex.quote, or repr in Python; comments lose line breaks."""

from __future__ import annotations

import re
import shlex
from typing import Any

from reapc.plan import Plan
from reapc.recipe import Recipe


def _comment(value: object) -> str:
    """``value`` on one line, printable characters only."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def server_name(plan: Plan) -> str:
    """The name that the API reports: the last part of the model's name, with only plain characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.rstrip("/").rsplit("/", 1)[-1]).strip("-") or "model"


def render(template: str, plan: Plan, model: str, recipe: Recipe, values: dict[str, Any]) -> str:
    """The script that serves ``model`` (a path from the script's folder); ``values`` are the engine's own. A value
    that the template misses is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only a build writes scripts

    common = {
        "plan": plan,
        "name": server_name(plan),
        "model": model,
        "host": recipe.serve.host,
        "port": recipe.serve.port,
    }
    environment = Environment(
        loader=PackageLoader("reapc.engines"), undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["python"] = lambda value: ascii(str(value))
    environment.filters["comment"] = _comment
    return environment.get_template(template).render(common | values)
