"""Finds the model that a recipe names: a local folder, or a hub id that is downloaded once and resumed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.arch import known, load_config
from reapc.checkpoint.config import checkpoint_config
from reapc.errors import ReapcError

WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
OTHER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*", "README.md"]
IGNORED_PATTERNS = ["*/*", "consolidated*"]  # the same weights once more, in another layout
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class FoundModel:
    """A model as named: its config, and where it lies (``folder``, or a ``gguf`` file, which has no config).
    ``catalogue``: the config is the catalogue's copy."""

    name: str
    where: str
    config: dict[str, Any] | None = None
    folder: Path | None = None
    gguf: Path | None = None
    catalogue: bool = False


def _path_of(text: str, base: Path) -> Path | None:
    """The existing path that ``text`` means, from here or from ``base``; an error where it can only be a path."""
    try:
        for path in (Path(text).expanduser(), base / text):
            if text.strip() and path.exists():
                return path
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        pass
    if text.startswith((".", "/", "~")) or text.endswith((".json", ".gguf", ".toml", "/")):
        looked = Path.cwd() if base.resolve() == Path.cwd() else f"{Path.cwd()} and {base}"
        raise ReapcError(
            f"model {text!r}: no such folder or file (looked in {looked})",
            hint="a folder with config.json, a config.json, a .gguf file, a name of the catalogue or a hub id",
        )
    return None


def _name_of(text: str) -> str:
    """The hub id that ``text`` means; an error where it means none. What is written as org/name is a part of a
    catalogue name only where it is the whole: deepseek-ai/DeepSeek-V2 is not DeepSeek-V2-Lite-Chat."""
    if _HUB_ID.match(text):
        return next((name for name in known.names() if name.lower() == text.lower()), text)
    if (known_name := known.find(text)) is not None:
        return known_name
    raise ReapcError(
        f"no model {text!r}: no such folder here, and the catalogue has no such name",
        hint=f"{_meant(text)}a folder, a name of the catalogue (`reapc fit --vram 1TB --all` lists it) or a hub id "
        "such as Qwen/Qwen3-30B-A3B",
    )


def _meant(text: str) -> str:
    near = known.nearest(text)
    return f"did you mean {', '.join(near)}? " if near else ""


def _at_path(text: str, path: Path) -> FoundModel:
    if path.suffix.lower() == ".gguf" and path.is_file():
        return FoundModel(str(path), str(path), gguf=path)
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (ggufs := sorted(path.glob("*.gguf"))):
        raise ReapcError(f"{path}: no config.json in this folder", hint=f"name the file that is meant: {ggufs[0]}")
    config = checkpoint_config(path) if path.is_dir() else load_config(file)
    return FoundModel(text, str(file), config, folder=file.parent)


def find_model(
    text: str, revision: str | None = None, base: Path = Path("."), key: str = "model"
) -> FoundModel:  # fmt: skip
    """The model that ``text`` names: an existing path first, then the catalogue (the whole id or its part after the
    slash in any case, or a unique part), then the hub (its config.json alone). A ``revision`` is always the hub's.
    ReapcError (exit 2) otherwise; ``key`` is what it calls the model."""
    path = _path_of(text, base)
    if path is not None:
        return _at_path(text, path)
    name = _name_of(text)
    if revision is None and name in known.names():
        return FoundModel(name, f"{name}/config.json", known.config(name), catalogue=True)
    return FoundModel(name, f"{name}/config.json", load_config(_download_config(name, revision, key)))


def _hub_error(source: str, revision: str | None, error: Exception, key: str) -> ReapcError:
    return ReapcError(
        f"{key} = {source!r} (revision {revision or 'main'}): no such folder here, and the hub did not "
        f"deliver it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        hint=f"{_meant(source)}check the name and the network (HF_ENDPOINT, HF_TOKEN), or give a local folder",
    )


def _download_config(source: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    unreachable = _unreachable(source, revision)
    try:
        return Path(hf_hub_download(source, "config.json", revision=revision, local_files_only=unreachable is not None))
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, unreachable or error, key) from error


def _unreachable(source: str, revision: str | None) -> Exception | None:
    """Why there is no connection to the hub, or None. Asked once: hf_hub_download would try for 24 seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision))
    except HfHubHTTPError:
        return None  # it answered: hf_hub_download finds the words, and tries again where that helps
    except (ConnectionError, HTTPError) as error:
        return error
    except (OSError, ValueError):
        return None
    return None


def config_of(source: str, revision: str | None, base: Path) -> dict[str, Any]:
    """The config.json of a recipe's model; a name of the catalogue needs no network (unless a ``revision`` is asked
    for)."""
    found = find_model(source, revision, base, "model.source")
    if found.config is None:
        raise ReapcError(
            f"model.source = {source!r}: a GGUF file cannot be planned or built from in this version",
            hint="name the checkpoint that it was made of",
        )
    return found.config


def fetch(source: str, revision: str | None, base: Path, weights: bool = True) -> Path:
    """A local folder with the whole checkpoint (``weights`` False: its config and tokenizer alone). Downloads are
    pinned to ``revision`` and leave out what is not needed (other weight formats, images). A cut connection resumes
    inside a file; a killed run keeps whole files."""
    path = _path_of(source, base)
    if path is not None:
        if not path.is_dir():
            hint = "the folder of the checkpoint"
            if path.suffix.lower() == ".gguf":
                hint += " that the GGUF file was made of: `reapc prune FILE.gguf` takes the scores of that"
            raise ReapcError(f"model.source = {source!r}: a folder is needed", hint=hint)
        return path
    source = _name_of(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        allowed = (WEIGHT_PATTERNS if weights else []) + OTHER_PATTERNS
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=allowed, ignore_patterns=IGNORED_PATTERNS)
        )
    except (OSError, ValueError, HTTPError) as error:
        raise _hub_error(source, revision, error, "model.source") from error
