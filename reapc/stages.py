"""The stage cache: a pass whose key is there is not run again. That is all of resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapc.checkpoint.atomic import atomic_path, locked, make_folder


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/reapc`` or ``~/.cache/reapc``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reapc"


def digest_of(value: Any) -> str:
    """Hex digest of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class StageCache:
    """Stages by name and key under ``root``; remembers how long each took (0 when reused)."""

    root: Path
    log: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def path(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key[:20]}"

    def run(self, name: str, depends_on: dict[str, Any], work: Callable[[Path, Path], None]) -> tuple[Path, str]:
        """The folder of stage ``name`` and its key; ``work(folder, scratch)`` fills it when it is not there yet.

        ``scratch`` survives an interruption, for a pass that resumes inside itself; ``folder`` does not."""
        key = digest_of({"stage": name, **depends_on})
        folder = self.path(name, key)
        make_folder(self.root)
        with locked(self.root / f"{folder.name}.lock"):
            if folder.is_dir():
                self.log(f"{name}: reused from {folder}")
                self.reused.append(name)
                self.seconds[name] = 0.0
                return folder, key
            start = time.monotonic()
            with atomic_path(folder) as partial:
                partial.mkdir()
                work(partial, self.root / f"{folder.name}.work")
                (partial / "stage.json").write_text(json.dumps(depends_on, indent=2, sort_keys=True) + "\n")
            self.seconds[name] = time.monotonic() - start
        return folder, key
