"""What a launch script must know of the artifact itself: its model_type and how it writes a chat."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reapc.errors import ReapcError


@dataclass(frozen=True)
class Artifact:
    """``model_type`` of config.json, and the text of every chat template ("" where there is none)."""

    model_type: str = ""
    template: str = ""


@dataclass(frozen=True)
class Parsers:
    """What vLLM is told of a model's answers: names of its parsers ("" for none) and further arguments."""

    tool: str = ""
    reasoning: str = ""
    arguments: tuple[str, ...] = ()


def read_artifact(folder: Path) -> Artifact:
    """The facts of a checkpoint's folder; ReapcError where a file is not JSON."""
    config = _json(folder / "config.json")
    settings = _json(folder / "tokenizer_config.json")
    files = sorted([*folder.glob("chat_template*.jinja"), *folder.glob("additional_chat_templates/*.jinja")])
    texts = [path.read_text(errors="replace") for path in files]
    for template in (settings.get("chat_template"), _json(folder / "chat_template.json").get("chat_template")):
        named = template if isinstance(template, list) else [{"template": template}]
        texts += [str(one["template"]) for one in named if isinstance(one, dict) and one.get("template")]
    return Artifact(str(config.get("model_type", "")), "\n".join(texts))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReapcError(f"{path}: not valid JSON: {error}") from error
    return data if isinstance(data, dict) else {}


@lru_cache(maxsize=1)
def entries() -> list[dict[str, Any]]:
    """The entries of parsers.toml, in its order."""
    found: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "parsers.toml").read_text())["entry"]
    return found


def choose_parsers(artifact: Artifact, name: str, tool: str = "auto", reasoning: str = "auto") -> Parsers:
    """The parsers for a model (``parsers.toml``): by model_type, and by ``name`` where that is not enough. A parser
    whose marks the chat template lacks is left out; "none" leaves one out, another name takes its place."""
    for entry in entries():
        if artifact.model_type in entry["models"] and re.search(entry.get("name", ""), name, re.IGNORECASE):
            break
    else:
        entry = {}
    chosen = {}
    for kind, asked in (("tool", tool), ("reasoning", reasoning)):
        known = entry.get(kind, "") if entry.get(f"{kind}_mark", "") in artifact.template else ""
        chosen[kind] = known if asked == "auto" else "" if asked == "none" else asked
    return Parsers(chosen["tool"], chosen["reasoning"], tuple(entry.get("arguments", ())))
