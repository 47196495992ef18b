"""Turns pydantic's validation errors into lines that name the key, what was found and the nearest right key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


def nearest(word: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` when a known word is close, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that are allowed where ``location`` points into ``model``."""
    current = model
    for part in location:
        field = current.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        current = annotation
    return list(current.model_fields)


def explain_validation(error: ValidationError, model: type[BaseModel], where: str, prefix: str = "") -> str:
    """One line per problem: file, key, what was found, what was expected."""
    lines = []
    for item in error.errors():
        location = tuple(part for part in item["loc"] if isinstance(part, str) and not part.startswith("function-"))
        if item["type"] == "extra_forbidden":
            key, keys = prefix + ".".join(location), _keys_at(model, location[:-1])
            lines.append(f"{where}: unknown key {key!r}; {nearest(location[-1], keys)}known here: {', '.join(keys)}")
        else:
            key = prefix + ".".join(location[: _depth(model, location)] or location)
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key} = {item['input']!r}: {message}")
    return "\n".join(dict.fromkeys(lines))


def _depth(model: type[BaseModel], location: tuple[Any, ...]) -> int:
    """How many parts of ``location`` are real keys (pydantic appends the names of union members)."""
    current: Any = model
    for depth, part in enumerate(location):
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return depth
        current = field.annotation
    return len(location)
