"""Finds the model that a recipe names: a local folder, or a hub id that is downloaded once and resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from reapc.arch import load_config
from reapc.errors import ReapcError

WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
OTHER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*", "README.md"]
IGNORED_PATTERNS = ["*/*", "consolidated*"]  # the same weights once more, in another layout
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def _local(source: str, base: Path) -> Path | None:
    for folder in (Path(source).expanduser(), base / source):
        if folder.is_dir():
            return folder
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise ReapcError(
            f"model.source = {source!r}: no such folder (looked in {Path.cwd()} and {base})",
            hint="a folder with config.json and safetensors, or a hub id such as Qwen/Qwen3-30B-A3B",
        )
    return None


def _hub_error(source: str, revision: str | None, error: Exception) -> ReapcError:
    return ReapcError(
        f"model.source = {source!r} (revision {revision or 'main'}): no such folder here, and the hub did not "
        f"deliver it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        hint="check the name and the network (HF_ENDPOINT, HF_TOKEN), or give a local folder",
    )


def config_of(source: str, revision: str | None, base: Path) -> dict[str, Any]:
    """The model's config.json alone, downloaded when the source is a hub id."""
    folder = _local(source, base)
    if folder is not None:
        return load_config(folder)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        file = hf_hub_download(source, "config.json", revision=revision)
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error) from error
    return load_config(Path(file))


def fetch(source: str, revision: str | None, base: Path) -> Path:
    """A local folder with the whole checkpoint. Downloads are pinned to ``revision`` and leave out what is not
    needed (other weight formats, images). A cut connection resumes inside a file; a killed run keeps whole files."""
    folder = _local(source, base)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        allowed = WEIGHT_PATTERNS + OTHER_PATTERNS
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=allowed, ignore_patterns=IGNORED_PATTERNS)
        )
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error) from error
