"""The models that reapc knows by name: real config.json files, one per hub id, in ``arch/catalog/ORG__NAME.json``.

``_source`` and ``_confidence`` in a file say where its numbers come from.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any

from reapc.arch.config import load_config, model_spec
from reapc.arch.spec import ModelSpec
from reapc.errors import ReapcError

FOLDER = Path(__file__).with_name("catalog")


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every hub id in the catalogue, sorted."""
    return tuple(sorted(path.stem.replace("__", "/", 1) for path in FOLDER.glob("*.json")))


def config(name: str) -> dict[str, Any]:
    """The config.json of the model with this exact name."""
    return load_config(FOLDER / f"{name.replace('/', '__', 1)}.json")


def spec(name: str) -> ModelSpec:
    """The ModelSpec of the model with this exact name."""
    return model_spec(config(name), name)


def find(text: str) -> str | None:
    """The name that ``text`` means: the whole id or its part after the slash wins, in any case; else the only one
    that contains it. None when nothing does; ReapcError (exit 2) lists the names when several do."""
    wanted = text.lower()
    exact = [name for name in names() if wanted in (name.lower(), name.lower().split("/", 1)[1])]
    if not exact:
        exact = [name for name in names() if wanted and wanted in name.lower()]
    if len(exact) > 1:
        raise ReapcError(f"{text!r} matches several models: {', '.join(exact)}", hint="write more of the name")
    return exact[0] if exact else None


def nearest(text: str, count: int = 3) -> list[str]:
    """The names most like ``text``, best first."""
    wanted = text.lower()
    keys = {key: name for name in names() for key in (name.lower().split("/", 1)[1], name.lower())}
    close = difflib.get_close_matches(wanted, keys, n=2 * count, cutoff=0.4)
    return list(dict.fromkeys(keys[key] for key in close))[:count]
