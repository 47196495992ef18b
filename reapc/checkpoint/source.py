"""Finds the model that a recipe names: a local folder, or a hub id that is downloaded once and resumed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.arch import known, load_config
from reapc.errors import ReapcError

WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
OTHER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*", "README.md"]
IGNORED_PATTERNS = ["*/*", "consolidated*"]  # the same weights once more, in another layout
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class FoundModel:
    """A model as named: its config, and where it lies (``folder``, or a ``gguf`` file, which has no config)."""

    name: str
    where: str
    config: dict[str, Any] | None = None
    folder: Path | None = None
    gguf: Path | None = None


def _path_of(text: str, base: Path) -> Path | None:
    """The existing path that ``text`` means, from here or from ``base``; an error where it can only be a path."""
    for path in (Path(text).expanduser(), base / text):
        if path.exists():
            return path
    if text.startswith((".", "/", "~")) or text.endswith((".json", ".gguf", ".toml", "/")):
        raise ReapcError(
            f"model {text!r}: no such folder or file (looked in {Path.cwd()} and {base})",
            hint="a folder with config.json, a config.json, a .gguf file, a name of the catalogue or a hub id",
        )
    return None


def _name_of(text: str) -> str:
    """The hub id that ``text`` means: a name of the catalogue, or itself; an error for anything else."""
    if (known_name := known.find(text)) is not None:
        return known_name
    if not _HUB_ID.match(text):
        near = known.nearest(text)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise ReapcError(
            f"no model {text!r}: no such folder here, and the catalogue has no such name",
            hint=f"{meant}a folder, a name of the catalogue (`reapc fit --vram 1TB --all` lists it) or a hub id "
            "such as Qwen/Qwen3-30B-A3B",
        )
    return text


def find_model(text: str, revision: str | None = None, base: Path = Path(".")) -> FoundModel:
    """The model that ``text`` names: an existing path first, then the catalogue (the whole id or its part after the
    slash in any case, or a unique part), then the hub (its config.json alone). ReapcError (exit 2) otherwise."""
    path = _path_of(text, base)
    if path is not None:
        if path.suffix == ".gguf":
            return FoundModel(str(path), str(path), gguf=path)
        file = path / "config.json" if path.is_dir() else path
        return FoundModel(text, str(file), load_config(file), folder=file.parent)
    name = _name_of(text)
    if name in known.names():
        return FoundModel(name, f"{name}/config.json", known.config(name))
    return FoundModel(name, f"{name}/config.json", load_config(_download_config(name, revision)))


def _hub_error(source: str, revision: str | None, error: Exception) -> ReapcError:
    return ReapcError(
        f"model.source = {source!r} (revision {revision or 'main'}): no such folder here, and the hub did not "
        f"deliver it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        hint="check the name and the network (HF_ENDPOINT, HF_TOKEN), or give a local folder",
    )


def _download_config(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(hf_hub_download(source, "config.json", revision=revision))
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error) from error


def config_of(source: str, revision: str | None, base: Path) -> dict[str, Any]:
    """The model's config.json alone; a name of the catalogue needs no network (unless a ``revision`` is asked for)."""
    if revision is not None and _path_of(source, base) is None:
        return load_config(_download_config(_name_of(source), revision))
    found = find_model(source, revision, base)
    if found.config is None:
        raise ReapcError(
            f"model.source = {source!r}: a GGUF file cannot be planned or built from in this version",
            hint="name the checkpoint that it was made of",
        )
    return found.config


def fetch(source: str, revision: str | None, base: Path) -> Path:
    """A local folder with the whole checkpoint. Downloads are pinned to ``revision`` and leave out what is not
    needed (other weight formats, images). A cut connection resumes inside a file; a killed run keeps whole files."""
    path = _path_of(source, base)
    if path is not None:
        if not path.is_dir():
            raise ReapcError(f"model.source = {source!r}: a folder is needed", hint="the folder of the checkpoint")
        return path
    source = _name_of(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        allowed = WEIGHT_PATTERNS + OTHER_PATTERNS
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=allowed, ignore_patterns=IGNORED_PATTERNS)
        )
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error) from error
