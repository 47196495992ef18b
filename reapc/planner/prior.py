"""What is expected before anything was measured: the loss (KL in nats per token) of quantizing and of pruning.

A prior, not a promise: it ranks configurations, and for a given model it is off by a factor of several. All numbers
and their sources are in ``prior.toml`` beside this file; ``load`` reads another file on top of it (docs/prior.md).
The functions of this module ask the packaged file; a search that got a file of the user's asks that ``Prior``.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

from reapc.errors import ReapcError
from reapc.schema import nearest

FILE = Path(__file__).with_name("prior.toml")
UNQUANTIZED_BITS = 16.0
PLAIN = "plain"
_SOURCE_KEYS = {"what", "where", "figure"}
_RATIO_PAIRS = "[ratio, KL] pairs, both rising, ratios up to 1"
_BIT_PAIRS = "[bits, KL] pairs, bits rising and below 16, KL falling"


@dataclass(frozen=True, slots=True)
class Curve:
    """KL over bits of one method. ln(KL) is linear between anchors and goes on with the end's slope outside.

    What the last line gives at 16 bits is taken off everywhere, so that the loss falls strictly to 0 at 16 bits.
    """

    anchors: tuple[tuple[float, float], ...]  # (bits, KL), bits rising
    what: str
    sources: tuple[str, ...]
    knots: tuple[float, ...]  # bits at which the next line begins
    lines: tuple[tuple[float, float], ...]  # ln(KL) = intercept + slope * bits
    tail: float

    def __call__(self, bits: float) -> float:
        if bits >= UNQUANTIZED_BITS:
            return 0.0
        if not bits > 0:
            raise ReapcError(f"{bits} bits per weight; expected more than 0")
        intercept, slope = self.lines[bisect_right(self.knots, bits)]
        return exp(intercept + slope * bits) - self.tail


@dataclass(frozen=True, slots=True)
class Pruning:
    """KL over the fraction of experts dropped: linear up to the first anchor, then a power of the ratio per piece."""

    anchors: tuple[tuple[float, float], ...]  # (ratio, KL), both rising
    sources: tuple[str, ...]
    knots: tuple[float, ...]
    powers: tuple[tuple[float, float], ...]  # KL = scale * ratio ** exponent

    def __call__(self, ratio: float) -> float:
        if not 0 <= ratio <= 1:
            raise ReapcError(f"prune ratio {ratio}; expected 0 to 1")
        scale, exponent = self.powers[bisect_right(self.knots, ratio)]
        return float(scale * ratio**exponent)


@dataclass(frozen=True, slots=True)
class Prior:
    """The losses of one prior file."""

    file: Path
    curves: Mapping[str, Curve]  # aliases included
    pruning: Pruning
    other_share: float
    kv: Mapping[str, float]
    kv_sources: tuple[str, ...]
    unfused: float
    fused: frozenset[int]
    sources: Mapping[str, Mapping[str, str]]

    def quantization_loss(self, method: str, bits: float, other_bits: float | None = None) -> float:
        """Expected KL of storing the experts at ``bits`` mean bits per weight, scales included, by ``method``.

        ``other_bits``: mean bits of the linears outside the experts where they differ (attention in bf16: 16). They
        cause ``other_share`` of the damage. 0 at 16 bits; falls strictly in both. ``plain`` is the checkpoint as
        published, whatever its dtype, and costs nothing.
        """
        if method == PLAIN:
            return 0.0
        curve = self.curves.get(method) or self._unknown(method)
        if other_bits is None:
            return curve(bits)
        return (1 - self.other_share) * curve(bits) + self.other_share * curve(other_bits)

    def pruning_loss(self, ratio: float) -> float:
        """Expected KL of dropping this fraction of every layer's experts with REAP; convex, 0 at 0."""
        return self.pruning(ratio)

    def measured_pruning_loss(self, ratio: float, dropped_share: float) -> float:
        """Expected KL of dropping experts that carried ``dropped_share`` of the routed saliency (sum of gate weight x
        norm). The prior's cost of that ratio, scaled by how much less than its even share (``ratio``) the dropped
        experts carried; benchmarks/prune_damage.py compares it with the KL found on the demo model."""
        return self.pruning(ratio) * dropped_share / ratio if ratio else 0.0

    def kv_loss(self, kind: str) -> float:
        """Expected KL of keeping the KV cache in this type; 0 for 16 bits and ``auto``, the engine's native type."""
        loss = self.kv.get(kind)
        if loss is None:
            raise ReapcError(f"{self.file}: no KV cache type {kind!r}; expected one of {', '.join(self.kv)}")
        return loss

    def router_cost(self, kept: int, engine: str, kind: str) -> float:
        """What an expert count costs that loses llama.cpp's fused CUDA top-k (ggml-cuda/topk-moe.cu); else 0.

        It is speed, not quality, so it only decides near-ties: it is less than dropping one expert of 256. It jumps
        up and down with ``kept``, so it keeps "more memory never makes the loss larger" on one condition: add it to
        the loss before comparing, and compare over all counts that fit, never take the largest alone. Then a larger
        budget only adds candidates, and the minimum over more candidates is not larger. The largest count that fits
        and the largest fused one are enough: every other is beaten by the largest.
        """
        return self.unfused if engine == "llama.cpp" and kind == "cuda" and kept not in self.fused else 0.0

    def source_of(self, method: str) -> str:
        """The figures that the numbers of a method, of ``pruning`` or of ``kv`` rest on: one line per source."""
        if method == PLAIN:
            return "plain: the checkpoint as published, no loss"
        if method == "pruning":
            names, anchors = self.pruning.sources, self.pruning.anchors
            head = "pruning: " + ", ".join(f"{kl:g} at {100 * ratio:g} %" for ratio, kl in anchors)
        elif method == "kv":
            names = self.kv_sources
            head = "kv: " + ", ".join(f"{kind} {kl:g}" for kind, kl in self.kv.items())
        else:
            curve = self.curves.get(method) or self._unknown(method)
            names, anchors = curve.sources, curve.anchors
            head = f"{method} ({curve.what}): " + ", ".join(f"{kl:g} at {bits:g} bits" for bits, kl in anchors)
        if self.file != FILE:
            head += f" [{self.file}]"
        rows = [self.sources[name] for name in names]
        return "\n".join([head, *(f"  {row['what']}: {row['figure']} [{row['where']}]" for row in rows)])

    def _unknown(self, method: str) -> Curve:
        raise ReapcError(
            f"{self.file}: no quantization method {method!r}; expected one of {', '.join((PLAIN, *self.curves))}",
            hint=nearest(method, tuple(self.curves)),
        )


def combined(*losses: float) -> float:
    """Expected KL of all of them: the sum. Small independent errors add (issue 7: 4-bit with 44 % pruned measured .102,
    the parts say .101); where both are large the truth is less (GLM-5.3, 34 % pruned: .506 at 4 bits, .511 at 3)."""
    return sum(losses)


@lru_cache(maxsize=1)
def default() -> Prior:
    """The packaged prior."""
    return _build(_read(FILE), FILE)


def load(path: str | Path) -> Prior:
    """The packaged prior with what the file at ``path`` names in its place: a method, ``pruning``, ``kv``,
    ``router``, ``other_share``, ``slope``, sources. ReapcError (exit 2) names file, key and what was expected."""
    own, base = _read(Path(path)), _read(FILE)
    for name, table in own.items():
        where = f"{path}: {name}"
        if name not in base or not isinstance(table, dict):
            raise ReapcError(f"{where}: not a table of a prior; expected {', '.join(base)}")
        if name == "sources":
            base[name] |= table
        elif name == "pruning":  # as a method: anchors of one's own do not rest on the packaged sources
            base[name] = table
        else:
            _known(table, base[name], where)
            for key, value in table.items():
                old = base[name][key]
                if isinstance(old, dict) and not isinstance(value, dict):
                    raise ReapcError(f"{where}.{key} = {value!r}; expected a table")
                base[name][key] = old | value if isinstance(old, dict) else value
    return _build(base, Path(path))


def quantization_loss(method: str, bits: float, other_bits: float | None = None) -> float:
    """``Prior.quantization_loss`` of the packaged prior."""
    return default().quantization_loss(method, bits, other_bits)


def pruning_loss(ratio: float) -> float:
    """``Prior.pruning_loss`` of the packaged prior."""
    return default().pruning_loss(ratio)


def measured_pruning_loss(ratio: float, dropped_share: float) -> float:
    """``Prior.measured_pruning_loss`` of the packaged prior."""
    return default().measured_pruning_loss(ratio, dropped_share)


def kv_loss(kind: str) -> float:
    """``Prior.kv_loss`` of the packaged prior."""
    return default().kv_loss(kind)


def router_cost(kept: int, engine: str, kind: str) -> float:
    """``Prior.router_cost`` of the packaged prior."""
    return default().router_cost(kept, engine, kind)


def source_of(method: str) -> str:
    """``Prior.source_of`` of the packaged prior."""
    return default().source_of(method)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ReapcError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ReapcError(f"{path}: not TOML: {error}") from error


def _build(data: dict[str, Any], file: Path) -> Prior:
    def number(where: str, value: Any, fits: Callable[[float], bool], expected: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            raise ReapcError(f"{file}: {where} = {value!r}; expected {expected}")
        return float(value)

    sources: dict[str, dict[str, str]] = data["sources"]
    for name, row in sources.items():
        if not isinstance(row, dict) or set(row) != _SOURCE_KEYS or not all(isinstance(v, str) for v in row.values()):
            raise ReapcError(f"{file}: sources.{name}: {row!r}; expected what, where and figure, all text")
    quantization, router = data["quantization"], data["router"]
    slope = number("quantization.slope", quantization["slope"], lambda v: 0 < v < 10, "more than 0, less than 10")
    share = number("quantization.other_share", quantization["other_share"], lambda v: 0 <= v < 1, "0 to less than 1")
    curves: dict[str, Curve] = {}
    for name, table in quantization["methods"].items():
        where = f"{file}: quantization.methods.{name}"
        anchors = _anchors(table, where, UNQUANTIZED_BITS, rising=False)
        curves[name] = _curve(anchors, slope, str(table.get("what", name)), _named(table, where, sources))
    for name, target in quantization["aliases"].items():
        if target not in curves:
            raise ReapcError(f"{file}: quantization.aliases.{name} = {target!r}; expected one of {', '.join(curves)}")
        curves[name] = curves[target]
    kv = {
        name: number(f"kv.losses.{name}", kl, lambda v: 0 <= v < 100, "0 or more")
        for name, kl in data["kv"]["losses"].items()
    }
    anchors = _anchors(data["pruning"], f"{file}: pruning", 1.0, rising=True)
    limit = int(number("router.fused_limit", router["fused_limit"], lambda v: 1 <= v <= 1 << 20, "1 to 1048576"))
    also = router["fused_also"]
    if not isinstance(also, list) or not all(type(count) is int for count in also):
        raise ReapcError(f"{file}: router.fused_also = {also!r}; expected a list of expert counts")
    return Prior(
        file=file,
        curves=curves,
        pruning=_pruning(anchors, _named(data["pruning"], f"{file}: pruning", sources)),
        other_share=share,
        kv=kv,
        kv_sources=_named({"sources": data["kv"]["sources"]}, f"{file}: kv", sources),
        unfused=number("router.unfused", router["unfused"], lambda v: 0 <= v < 1, "0 to less than 1"),
        fused=frozenset([*(1 << power for power in range(limit.bit_length())), *also]),
        sources=sources,
    )


def _anchors(table: Any, where: str, limit: float, *, rising: bool) -> tuple[tuple[float, float], ...]:
    found = table.get("anchors") if isinstance(table, dict) else None
    pairs = found if isinstance(found, list) and all(isinstance(pair, list) for pair in found) else []
    good = bool(pairs) and all(
        len(pair) == 2 and all(type(v) in (int, float) and 0 < v < 1000 for v in pair) for pair in pairs
    )
    if good:
        good = pairs[-1][0] <= limit if rising else pairs[-1][0] < limit
        for (x, kl), (next_x, next_kl) in pairwise(pairs):
            good = good and x < next_x and (kl < next_kl if rising else kl > next_kl)
    if not good:
        raise ReapcError(f"{where}.anchors = {found!r}; expected {_RATIO_PAIRS if rising else _BIT_PAIRS}")
    return tuple((float(x), float(kl)) for x, kl in pairs)


def _known(table: dict[str, Any], known: dict[str, Any], where: str) -> None:
    for key in table:
        if key not in known:
            raise ReapcError(f"{where}.{key}: unknown; expected {', '.join(known)}")


def _named(table: dict[str, Any], where: str, sources: dict[str, dict[str, str]]) -> tuple[str, ...]:
    _known(table, {"what": "", "anchors": "", "sources": ""}, where)
    names = table.get("sources", [])
    if not isinstance(names, list):
        raise ReapcError(f"{where}.sources = {names!r}; expected a list of names")
    for name in names:
        if name not in sources:
            raise ReapcError(f"{where}.sources: {name!r} has no table under [sources]")
    return tuple(names)


def _curve(anchors: tuple[tuple[float, float], ...], slope: float, what: str, sources: tuple[str, ...]) -> Curve:
    def line(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        steep = (log(b[1]) - log(a[1])) / (b[0] - a[0])
        return log(a[1]) - steep * a[0], steep

    pieces = [line(a, b) for a, b in pairwise(anchors)]
    if not pieces:
        bits, kl = anchors[0]
        pieces = [(log(kl) + slope * bits, -slope)]
    intercept, steep = pieces[-1]
    knots = tuple(bits for bits, _ in anchors[1:-1])
    return Curve(anchors, what, sources, knots, tuple(pieces), exp(intercept + steep * UNQUANTIZED_BITS))


def _pruning(anchors: tuple[tuple[float, float], ...], sources: tuple[str, ...]) -> Pruning:
    powers = [(anchors[0][1] / anchors[0][0], 1.0)]
    for (ratio, kl), (next_ratio, next_kl) in pairwise(anchors):
        exponent = log(next_kl / kl) / log(next_ratio / ratio)
        powers.append((kl / ratio**exponent, exponent))
    return Pruning(anchors, sources, tuple(ratio for ratio, _ in anchors[: len(powers) - 1]), tuple(powers))
