"""The mixes that come with reapc, and what ``data`` of a recipe or a command line names."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from reapc.errors import ReapcError
from reapc.mix import HUB, Mix, MixSource, read_mix
from reapc.schema import nearest

FOLDER = Path(__file__).with_name("presets")
PREFIX = "preset:"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FILES = (".safetensors", ".jsonl", ".txt", ".toml", ".md", ".json", ".parquet", ".gz")


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every preset, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def path_of(name: str) -> Path:
    """The preset's file; ReapcError lists the presets where there is none of this name."""
    if name not in names():
        raise ReapcError(f"no preset {name!r}", hint=f"{nearest(name, names())}presets: {', '.join(names())}")
    return FOLDER / f"{name}.toml"


def preset(name: str) -> Mix:
    """The mix of this name."""
    return read_mix(path_of(name), PREFIX + name)


def find_path(text: str, base: Path) -> Path | None:
    """The existing path that ``text`` means: from here, or from ``base``."""
    try:
        for path in (Path(text).expanduser(), base / text):
            if path.exists():
                return path
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        pass
    return None


def hub_id(text: str) -> str | None:
    """The hub id that ``text`` means, where it is not a path: "hub:org/name" or "org/name"."""
    if text.startswith(HUB):
        name = text.removeprefix(HUB)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ReapcError(f"source = {text!r}: not a hub data set", hint='"hub:org/name" is expected')
        return name
    return text if _HUB_ID.match(text) and not text.endswith(_FILES) else None


def no_such_data(text: str, base: Path, key: str = "data") -> ReapcError:
    """What is said of a path that is not there."""
    return ReapcError(
        f"{key} = {text!r}: no such file or folder (looked in {Path.cwd()} and {base})",
        hint=f'a .safetensors file of token ids, .txt, .jsonl, a folder of text, a .toml file of a mix, "auto", '
        f'"hub:org/name", or a preset: {", ".join(names())}',
    )


def resolve(data: str | tuple[MixSource, ...], base: Path) -> Mix | Path | None:
    """What ``data`` means: a Mix; the path of one file of text or token ids; None for "auto". Paths win over the names
    of presets and hub data sets, which "preset:" and "hub:" say outright."""
    if not isinstance(data, str):
        return Mix(_describe(data), data, base)
    if data == "auto":
        return None
    if data.startswith(PREFIX):
        return preset(data.removeprefix(PREFIX))
    path = None if data.startswith(HUB) else find_path(data, base)
    if path is None:
        if data in names():
            return preset(data)
        if hub_id(data) is not None:
            return Mix(data, (MixSource(source=data),), base)
        raise no_such_data(data, base)
    if path.suffix == ".toml":
        return read_mix(path)
    if path.is_dir() or path.suffix == ".jsonl":
        return Mix(path.name, (MixSource(source=str(path)),), base, at_most=True)
    return path


def _describe(sources: tuple[MixSource, ...]) -> str:
    whole = sum(source.weight for source in sources)
    return ", ".join(f"{source.name} {source.weight / whole:.0%}" for source in sources)
