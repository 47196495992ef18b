"""Writes the report of a build into its folder, and its size into the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reapc.checkpoint.atomic import write_text
from reapc.report.data import REPORT, BuildData
from reapc.report.page import build_page


def write_report(folder: Path, siblings: Path | None = None, strict: bool = False) -> dict[str, Any]:
    """Writes report.html from what lies in ``folder``, and returns the manifest, which then lists it. The page does not
    depend on an earlier one. ``siblings``: the folder that ``folder`` will lie in, where that is not its parent.

    OSError or ValueError where there is no manifest; parts that lack are left out of the page with a sentence."""
    data = BuildData.read(folder, siblings)
    manifest = data.manifest
    files = {name: size for name, size in (manifest.get("files") or {}).items() if name != REPORT}
    manifest["files"] = files
    page = build_page(data, strict).encode()
    write_text(folder / REPORT, page.decode())
    written = {**manifest, "files": {**files, REPORT: len(page)}}
    write_text(folder / "manifest.json", json.dumps(written, indent=2) + "\n")
    return written
