"""Held-out passages with what the original and the result would put next."""

from __future__ import annotations

import re
from typing import Any

from reapc.report import tables
from reapc.report.data import BuildData, Missing
from reapc.report.tables import Table

_SHADES = (0.05, 0.2, 0.5, 1.0)  # KL in nats from which a token's ground is darker
_ROWS, _BEFORE = 10, 28
_PART = "\ufffd"
_SIGNS = re.compile(r" +|[\n\t\r]")


def passages(data: BuildData) -> dict[str, Any]:
    """Every stored passage: its tokens, both models' choices, and where they differ most."""
    found = data.detail["passages"]
    if not found:
        raise Missing("No held-out sequence is long enough for a passage.")
    return {"passages": [_passage(item) for item in found], "shades": _SHADES}


def _passage(item: dict[str, Any]) -> dict[str, Any]:
    tokens = item["tokens"]
    differs = [token["best_a"]["id"] != token["best_b"]["id"] for token in tokens]
    worst = "Where most was lost" if item["why"] == "worst" else "Typical"
    return {
        "title": f"{worst}: {item['domain']}",
        "where": f"sequence {item['sequence']}, from token {item['position']} on",
        "kl": tables.kl(item["kl"]),
        "differ": f"{sum(differs)} of {len(tokens)}",
        "before": item["before"].replace(_PART, ""),
        "tokens": [_token(token, other) for token, other in zip(tokens, differs, strict=True)],
        "columns": [
            (name, [(_visible(token[key]), other) for token, other in zip(tokens, differs, strict=True)])
            for name, key in (("Original", "best_a"), ("Result", "best_b"))
        ],
        "table": _most_different(item),
    }


def _token(token: dict[str, Any], differs: bool) -> dict[str, Any]:
    a, b = token["best_a"], token["best_b"]
    return {
        "text": _running(token),
        "shade": sum(token["kl"] >= shade for shade in _SHADES),
        "differs": differs,
        "said": f"KL {token['kl']:.3f}; original: {_choice(a)}; result: {_choice(b)}",
    }


def _most_different(item: dict[str, Any]) -> Table | None:
    tokens = item["tokens"]
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i]["kl"])
    chosen = sorted(i for i in order[:_ROWS] if tokens[i]["kl"] > 0)
    if not chosen:
        return None
    rows = []
    for i in chosen:
        before = item["before"].replace(_PART, "") + "".join(_running(token) for token in tokens[:i])
        token = tokens[i]
        rows.append(
            [
                "…" + _marks(before[-_BEFORE:]),
                f"{_visible(token)} ({_percent(token['next_a'])} → {_percent(token['next_b'])})",
                _choice(token["best_a"]), _choice(token["best_b"]), f"{token['kl']:.3f}",
            ]
        )  # fmt: skip
    head = ("after", "the text goes on with", "original's first choice", "result's first choice", "KL")
    return Table(f"The {len(rows)} positions with the largest KL", head, rows, (0, 1, 2, 3))


def _running(token: dict[str, Any]) -> str:
    """The text as it runs on: a part of a character is nothing yet, the token that ends it is the character."""
    return _plain(token).replace(_PART, "")


def _plain(token: dict[str, Any]) -> str:
    return f"⟨{token['id']}⟩" if token["text"] is None else str(token["text"])


def _visible(token: dict[str, Any]) -> str:
    """The text by itself: spaces and line ends can be seen."""
    text = _plain(token)
    return _marks(text) if text else "∅"


def _marks(text: str) -> str:
    """Spaces and line ends as signs; many spaces as their number."""
    return _SIGNS.sub(_sign, text)


def _sign(found: re.Match[str]) -> str:
    run = found.group()
    if run[0] == " ":
        return "␣" * len(run) if len(run) < 4 else f"[{len(run)} ␣]"
    return {"\n": "↵", "\t": "⇥"}.get(run, "")


def _choice(token: dict[str, Any]) -> str:
    return f"{_visible(token)} {_percent(token['probability'])}"


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f} %"
