"""A mix of calibration data: sources with weights and domains, from a recipe's list of tables or a TOML file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reapc.errors import ReapcError
from reapc.schema import explain_validation

HUB = "hub:"
# Columns that a format reads, with the names that they have unless ``fields`` says otherwise; the main one first.
COLUMNS: dict[str, dict[str, str]] = {
    "chat": {"messages": "messages", "tools": "tools"},
    "prompt": {"prompt": "prompt", "completion": "completion"},
    "calls": {"prompt": "query", "tools": "tools", "calls": "answers"},
    "text": {"text": "text"},
    "plain": {"messages": "messages", "prompt": "prompt", "completion": "completion"},
    "log": {},
    "auto": {},
}


class MixSource(BaseModel):
    """One corpus of a mix; docs/calibration.md has the table of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # a file, a folder, or a hub data set: "hub:org/name", or "org/name" where no such path exists
    source: str = Field(min_length=1)
    # share of the tokens, relative to the other sources' weights
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    domain: str = Field(default="all", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    format: Literal["auto", "chat", "prompt", "calls", "text", "plain", "log"] = "auto"
    # the name of the main column: messages, text or prompt
    field: str | None = Field(default=None, min_length=1)
    fields: dict[str, str] = Field(default_factory=dict)
    # chat: the tools of every sample, as JSON, where no column has them
    tools: str | None = None
    # hub data sets
    config: str | None = None
    split: str = Field(default="train", min_length=1)
    revision: str | None = None
    # samples at most
    limit: int | None = Field(default=None, ge=1)
    # start again where the source has fewer tokens than its share asks for
    repeat: bool = False
    # for people
    licence: str = ""
    why: str = ""

    @property
    def name(self) -> str:
        """How messages call it: the source, with config and split where they are not the plain ones."""
        parts = [self.source]
        if self.config:
            parts.append(f"[{self.config}]")
        if self.split != "train":
            parts.append(f"({self.split})")
        return "".join(parts)

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns by what they mean, for a format that is not "auto"."""
        found = COLUMNS[self.format] | self.fields
        if self.field is not None and found:
            found[next(iter(found))] = self.field
        return found

    @property
    def constant_tools(self) -> list[dict[str, Any]] | None:
        """``tools``, parsed."""
        return None if self.tools is None else json.loads(self.tools)

    def problem(self) -> str:
        """What keys contradict each other, in words; empty where none do."""
        known = COLUMNS[self.format]
        if self.fields and self.format == "auto":
            return "fields need a format: chat, prompt, calls, text or plain"
        if self.field is not None and (self.fields or self.format == "log"):
            return "field and fields are both given" if self.fields else "a request log has no field to choose"
        if unknown := [key for key in self.fields if key not in known]:
            return f"fields has {unknown[0]!r}; format {self.format!r} has {', '.join(known) or 'none'}"
        if self.tools is not None:
            if self.format != "chat":
                return 'tools are for format = "chat"'
            try:
                parsed = json.loads(self.tools)
            except ValueError as error:
                return f"tools is not JSON: {error}"
            if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
                return "tools is JSON, but not a list of objects"
        return ""


@dataclass(frozen=True)
class Mix:
    """Sources, and the folder that their relative paths start from. ``at_most``: a single source that a recipe names
    by its path alone; it may have fewer tokens than asked for, which is then said."""

    name: str
    sources: tuple[MixSource, ...]
    base: Path = Path(".")
    description: str = ""
    at_most: bool = False

    @property
    def domains(self) -> tuple[str, ...]:
        """In the order in which they are first named."""
        return tuple(dict.fromkeys(source.domain for source in self.sources))

    def shares(self) -> dict[str, float]:
        """Each domain's share of the tokens."""
        whole = sum(source.weight for source in self.sources)
        return {
            domain: sum(source.weight for source in self.sources if source.domain == domain) / whole
            for domain in self.domains
        }


def parse_sources(value: Any, where: str) -> tuple[MixSource, ...]:
    """The sources of a list of tables; ReapcError names the entry, the key and the mend."""
    if not isinstance(value, list | tuple) or not value:
        raise ReapcError(f"{where} = {value!r}: a list of tables is expected, each with source, weight and domain")
    found = []
    for number, item in enumerate(value, start=1):
        here = f"{where}[{number}]"
        if isinstance(item, MixSource):
            found.append(item)
            continue
        if not isinstance(item, Mapping):
            raise ReapcError(f"{here} = {item!r}: a table with source, weight and domain is expected")
        try:
            source = MixSource(**item)
        except ValidationError as error:
            raise ReapcError(explain_validation(error, MixSource, here)) from error
        if problem := source.problem():
            raise ReapcError(f"{here} ({source.name}): {problem}")
        found.append(source)
    return tuple(found)


def read_mix(path: Path, name: str | None = None) -> Mix:
    """The mix in a TOML file: ``description`` and a ``[[data]]`` table for each source."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReapcError(f"{path}: cannot read the mix: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ReapcError(f"{path}: not valid TOML: {error}") from error
    if unknown := sorted(set(data) - {"description", "data"}):
        raise ReapcError(f"{path}: unknown key {unknown[0]!r}; known here: description, data")
    if "data" not in data:
        raise ReapcError(f"{path}: no [[data]] table", hint="one for each source, with source, weight and domain")
    sources = parse_sources(data["data"], f"{path}: data")
    return Mix(name or path.name, sources, path.parent, str(data.get("description", "")))
