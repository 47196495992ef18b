"""Observations of one model combined: shards and corpora added up, domains weighed anew. Nothing is observed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reapc.errors import ReapcError
from reapc.observe.scores import LazyArrays, Scores, expanded, expanded_shape, is_maximum

_SAME = ("digest", "num_experts", "top_k", "layers", "dtype")


def observed_entry(source: str, digest: str, shard: tuple[int, int] | None) -> dict[str, Any]:
    """What a header says of one observation: the tokens, and which shards of them (from 1) of how many."""
    index, count = shard or (1, 1)
    return {"source": source, "digest": digest, "of": count, "have": [index]}


def missing_shards(scores: Scores) -> dict[str, list[int]]:
    """Shards that were never merged in, by the source of their tokens."""
    entries = scores.header.get("observed", [])
    found = {e["source"]: [i for i in range(1, e["of"] + 1) if i not in e["have"]] for e in entries}
    return {source: shards for source, shards in found.items() if shards}


def merge(parts: list[Scores], names: list[str] | None = None) -> Scores:
    """Adds observations of one model: sums and counts add, maxima are the larger; domains of one name become one.

    The shards of a run give the scores of that run, to float64 rounding. ReapcError where they are of different models,
    or hold the same tokens twice. ``names``: what messages call the parts. Arrays are computed when asked for."""
    names = names or [f"part {i}" for i in range(1, len(parts) + 1)]
    first = parts[0]
    for name, other in zip(names[1:], parts[1:], strict=True):
        for key in _SAME:
            if other.header[key] != first.header[key]:
                raise ReapcError(
                    f"these scores do not belong together: {key} is {first.header[key]!r} in {names[0]} and "
                    f"{other.header[key]!r} in {name}",
                    hint="merge only observations of the same checkpoint",
                )
        if set(other.arrays) != set(first.arrays):
            raise ReapcError(
                f"these scores do not belong together: one of {names[0]} and {name} has second moments, the other not"
            )
    observed = _observed(parts, names)
    domains = list(dict.fromkeys(domain for part in parts for domain in part.domains))
    places = [[domains.index(domain) for domain in part.domains] for part in parts]

    def read(name: str) -> np.ndarray:
        result: np.ndarray | None = None
        for part, place in zip(parts, places, strict=True):
            values = expanded(part, name)
            if result is None:
                result = np.zeros((len(domains), *values.shape[1:]))
            for domain, of_domain in zip(place, values, strict=True):
                if is_maximum(name):
                    np.maximum(result[domain], of_domain, out=result[domain])
                else:
                    result[domain] += of_domain
        assert result is not None
        return result

    def added(key: str) -> list[list[float]]:
        counts = np.zeros((len(domains), _counts_of(first, key).shape[1]))
        for part, place in zip(parts, places, strict=True):
            for domain, of_domain in zip(place, _counts_of(part, key), strict=True):
                counts[domain] += of_domain
        result: list[list[float]] = counts.tolist()
        return result

    header = {
        **first.header,
        "tokens": sum(part.header["tokens"] for part in parts),
        "calibration": list(dict.fromkeys(source for part in parts for source in part.header["calibration"])),
        "domains": domains,
        "parts": added("parts"),
        "sequences": added("sequences"),
        "observed": observed,
    }
    return Scores(header, LazyArrays(_shapes(first, len(domains)), read))


def _counts_of(scores: Scores, key: str) -> np.ndarray:
    """Tokens ("parts") or "sequences" by domain and part. A file of the first format does not say: all its tokens are
    in one part, and no sequences are counted."""
    if counted := scores.header.get(key):
        return np.asarray(counted, np.float64)
    routing = next(name for name in scores.arrays if name.startswith("layers."))
    counts = np.zeros(expanded_shape(scores, routing)[:2])
    counts[0, 0] = scores.header["tokens"] if key == "parts" else 0
    return counts


def _shapes(scores: Scores, domains: int) -> dict[str, tuple[int, ...]]:
    return {name: (domains, *expanded_shape(scores, name)[1:]) for name in scores.arrays}


def _observed(parts: list[Scores], names: list[str]) -> list[dict[str, Any]]:
    """The headers' accounts of what was observed, together; ReapcError where anything is there twice."""
    found: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, int], str] = {}
    for name, part in zip(names, parts, strict=True):
        for entry in part.header.get("observed", []):
            digest = entry["digest"]
            mine = found.setdefault(digest, {**entry, "have": []})
            if mine["of"] != entry["of"]:
                raise ReapcError(
                    f"{name}: it holds shards of {entry['of']} of the tokens {entry['source']}, another file shards of "
                    f"{mine['of']}: they overlap",
                    hint="cut the tokens into the same number of shards everywhere",
                )
            for shard in entry["have"]:
                if (digest, shard) in seen:
                    raise ReapcError(
                        f"{seen[digest, shard]} and {name} both hold shard {shard}/{entry['of']} of the tokens "
                        f"{entry['source']}: they would count twice",
                        hint="leave one of them out",
                    )
                seen[digest, shard] = name
                mine["have"] = sorted([*mine["have"], shard])
    _refuse_other_tokens(found, seen)
    # Complete is complete, however it was cut.
    return [{**e, "of": 1, "have": [1]} if len(e["have"]) == e["of"] else e for e in found.values()]


def _refuse_other_tokens(found: dict[str, dict[str, Any]], seen: dict[tuple[str, int], str]) -> None:
    """ReapcError where shards of tokens of one name are of different tokens: packed anew, or by other libraries."""
    partial: dict[str, str] = {}
    for digest, entry in found.items():
        if len(entry["have"]) == entry["of"]:
            continue
        other = partial.setdefault(entry["source"], digest)
        if other != digest:
            a, b = (seen[one, found[one]["have"][0]] for one in (other, digest))
            raise ReapcError(
                f"{a} and {b} hold shards of different tokens, both called {entry['source']} (digests {other[:12]} and "
                f"{digest[:12]})",
                hint="every machine must observe the same file: `reapc corpora pack` writes one for --tokens",
            )


def mix(scores: Scores, weights: Mapping[str, float], where: str = "the scores") -> Scores:
    """The scores as if the domains' tokens had stood in the proportion of ``weights``; those not named are left out.

    Every sum of domain d is multiplied by (share of d) x (all tokens) / (tokens of d): an expectation over tokens, no
    new observation. ReapcError for a domain that is not there, and for weights that are not above 0."""
    domains, tokens = scores.domains, scores.domain_tokens
    for domain, weight in weights.items():
        if domain not in domains:
            raise ReapcError(f"{where}: no domain {domain!r}; it has {', '.join(domains)}")
        if not (np.isfinite(weight) and weight > 0):
            raise ReapcError(
                f"{domain}={weight}: a weight above 0 is expected", hint="leave a domain out by not naming it"
            )
    chosen = [i for i, domain in enumerate(domains) if domain in weights]
    if empty := [domains[i] for i in chosen if not tokens[i]]:
        raise ReapcError(f"{where}: domain {empty[0]!r} has no tokens")
    total = sum(weights.values())
    whole = float(tokens[chosen].sum())
    factors = np.array([weights[domains[i]] / total * whole / tokens[i] for i in chosen])

    def read(name: str) -> np.ndarray:
        values = expanded(scores, name)[chosen]
        if is_maximum(name):
            return values
        scaled: np.ndarray = values * factors.reshape(-1, *(1,) * (values.ndim - 1))
        return scaled

    header = {
        **scores.header,
        "tokens": round(whole),
        "domains": [domains[i] for i in chosen],
        "parts": (_counts_of(scores, "parts")[chosen] * factors[:, None]).tolist(),
        "sequences": _counts_of(scores, "sequences")[chosen].tolist(),
        "mix": {domain: weight / total for domain, weight in weights.items()},
    }
    return Scores(header, LazyArrays(_shapes(scores, len(chosen)), read))
