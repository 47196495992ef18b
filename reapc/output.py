"""The folder that a build writes: whether it may be written, and how files come into it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from reapc.errors import ReapcError
from reapc.stages import cache_root


def existing_result(out: Path, key: str, recipe_name: str) -> dict[str, Any] | None:
    """The manifest in ``out`` when it is this very result; None when ``out`` may be written.

    A result of an earlier build of the same recipe may be replaced; anything else is refused, untouched."""
    if not out.exists():
        return None
    refused = ReapcError(
        f"{out}: holds something else, which is left untouched",
        hint="choose another folder with --out, or move this one away",
    )
    if not out.is_dir():
        raise refused
    if not any(out.iterdir()):
        return None
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        files = {name: int(size) for name, size in manifest["files"].items()}
        found = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
        found.pop("manifest.json")
        ours = manifest["recipe_name"] == recipe_name and set(found) <= set(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise refused from None
    if not ours:
        raise refused
    return manifest if manifest["key"] == key and found == files else None


def place(source: Path, target: Path) -> None:
    """A hard link to a file of the stage cache where the disk allows it, else a copy (the user's own files are
    always copied, so that editing the result cannot reach them)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not source.resolve().is_relative_to(cache_root().resolve()):
            raise OSError
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
