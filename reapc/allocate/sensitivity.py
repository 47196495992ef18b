"""What rounding and pruning cost at the end: KL of probes, real GGUF files in the pinned llama.cpp.

A probe rounds one class of tensors (the experts' gate and up, attention, ...) in the whole model at one low type, or
drops experts without rounding anything. Its KL to the unquantized model, over the error that ``rounding`` found for
the same tensors, is the class's sensitivity. Between counts that were probed, pruning follows the share of saliency
that is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Protocol

from reapc.allocate.rounding import Entries
from reapc.checkpoint.atomic import remove, write_text
from reapc.observe.reference import SequenceReference
from reapc.planner.damages import ROUTED, Group, GroupError, Parts, Sensitivity
from reapc.progress import Progress
from reapc.prune.gguf import GgufSource, prune_gguf
from reapc.quantize import gguf
from reapc.quantize.imatrix import kept_entries
from reapc.stream.tokens import Tokens
from reapc.verify.fidelity import Fidelity, measure
from reapc.verify.gguf_logits import gguf_log_probs

PROBE_TYPE = "Q2_K"  # low enough to show above the noise, and legal for embeddings and output too
FLOOR = 1e-6  # nats: what a probe's KL is at least taken to be
Kept = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Probe:
    """One measured file: ``name`` says what was done, ``error`` the sum over its groups that KL is divided by."""

    name: str
    kl: float
    error: float = 0.0


class Measures(Protocol):
    """What measures a mix end to end: files in llama.cpp, or rounded layers in a streamed pass."""

    @property
    def progress(self) -> Progress: ...

    def kl(self, name: str, types: Mapping[str, str], kept: Kept | None) -> float: ...


class Probes(Measures, Protocol):
    """What probes classes of groups: ``probed`` is the type that it rounds a group to, ``mix`` the types of a model in
    which the groups of these names are rounded so and the rest is not."""

    def probed(self, group: Group) -> str: ...
    def mix(self, groups: Sequence[Group], probed: Container[str]) -> dict[str, str]: ...


class Prober:
    """Makes files from the unquantized GGUF ``base`` and measures them on ``tokens``. Finished probes lie in ``work``
    as JSON, so that an interrupted run goes on."""

    def __init__(
        self, base: Path, tokens: Tokens, entries: Entries, work: Path, progress: Progress, threads: int
    ) -> None:
        self.base, self.tokens, self.entries, self.work = base, tokens, entries, work
        self.progress, self.threads = progress, threads
        work.mkdir(parents=True, exist_ok=True)
        self._references: list[SequenceReference] | None = None

    def probed(self, group: Group) -> str:
        """The type that a probe rounds a group to."""
        return PROBE_TYPE

    def mix(self, groups: Sequence[Group], probed: Container[str]) -> dict[str, str]:
        """The types, by tensor, of a file in which the groups ``probed`` are rounded and the rest stays in 16 bit."""
        types: dict[str, str] = {}
        for group in groups:
            stored = group.stored(PROBE_TYPE)
            types |= stored if group.name in probed else dict.fromkeys(stored, "BF16")
        return types

    def build(self, out: Path, types: Mapping[str, str], kept: Kept | None) -> None:
        """The file with these types (of tensors; what is not named stays as it is), pruned to ``kept``."""
        source = self.base
        if kept is not None:
            source = self.work / f"pruned-{os.getpid()}.gguf"
            remove(source)
            layers = {layer: list(experts) for layer, experts in kept.items()}
            prune_gguf(GgufSource(self.base), layers, source, self.progress)
        if not types:
            source.replace(out)
            return
        matrix = self.work / f"imatrix-{os.getpid()}.gguf"
        gguf.write_imatrix(matrix, kept_entries(self.entries, kept), 1, self.tokens.length, [self.tokens.source])
        gguf.quantize(source, out, "Q8_0", matrix, self.threads, types=types)
        if kept is not None:
            remove(source)

    def kl(self, name: str, types: Mapping[str, str], kept: Kept | None) -> float:
        """KL in nats of such a file to the unquantized model; measured once for each ``name``."""
        record = self.work / f"{name}.json"
        if record.is_file():
            return float(json.loads(record.read_text())["kl"])
        out = self.work / f"{name}-{os.getpid()}.gguf"
        remove(out)
        self.build(out, types, kept)
        found = self.fidelity(out)
        remove(out)
        write_text(record, json.dumps(found.to_json()))
        return found.kl

    def cache(self, kind: str) -> float:
        """KL in nats of ``base`` with a KV cache of another type to itself with one in f16."""
        record = self.work / f"cache-{kind}.json"
        if record.is_file():
            return float(json.loads(record.read_text())["kl"])
        found = self.fidelity(self.base, kind)
        write_text(record, json.dumps(found.to_json()))
        return found.kl

    def fidelity(self, model: Path, kv: str = "f16") -> Fidelity:
        """How far a GGUF file with a KV cache of type ``kv`` is from ``base`` on the tokens."""
        ids, mask = self.tokens.input_ids, self.tokens.mask
        if self._references is None:
            rows = gguf_log_probs(self.base, ids, mask, self.threads)
            self._references = [SequenceReference.of(row, ids[i], True) for i, row in enumerate(rows)]
        return measure(self.tokens, self._references, gguf_log_probs(model, ids, mask, self.threads, kv=kv))


def probe_sets(groups: Sequence[Group], segments: int = 1) -> dict[str, list[Group]]:
    """Groups that are probed together, by class. ``segments``: the routed experts' classes in so many runs of layers,
    each by itself."""
    sets: dict[str, list[Group]] = {}
    routed = sorted({group.layer for group in groups if group.part in ROUTED})
    place = {layer: index * segments // len(routed) for index, layer in enumerate(routed)}
    for group in groups:
        tail = f"-{place[group.layer]}" if segments > 1 and group.part in ROUTED else ""
        sets.setdefault(group.part + tail, []).append(group)
    return sets


def measured_sensitivity(
    parts: Parts, errors: Mapping[str, GroupError], prober: Probes, segments: int = 1
) -> tuple[Sensitivity, list[Probe]]:
    """KL over error of every class that the model has (``probe_sets``); all groups that are probed together have the
    same sensitivity."""
    sets = probe_sets(parts.groups, segments)
    nats: dict[str, float] = {}
    probes: list[Probe] = []
    with prober.progress.task("probe", len(sets), "classes of tensors") as advance:
        for name, groups in sets.items():
            error = sum(errors[group.name].relative(prober.probed(group)) for group in groups)
            kind = prober.probed(groups[0])
            types = prober.mix(parts.groups, {group.name for group in groups})
            kl = max(prober.kl(f"{kind}-{name}", types, None), FLOOR) if error else 0.0
            probes.append(Probe(f"{name} in {kind}", kl, error))
            nats |= {group.name: kl / error if error else 0.0 for group in groups}
            advance(1)
    return Sensitivity(nats, dict.fromkeys(nats, "measured")), probes


def probed_counts(total: int, counts: Sequence[int]) -> list[int]:
    """The counts whose pruning is measured: the fewest, and with a half and a quarter of those dropped."""
    fewest = min(counts)
    if fewest == total:
        return []
    wanted = (total - round((total - fewest) * part) for part in (1, 1 / 2, 1 / 4))
    return sorted({min((c for c in counts if c < total), key=lambda c: abs(c - count)) for count in wanted})


def measured_caches(prober: Prober, kinds: Iterable[str]) -> dict[str, float]:
    """KL in nats of every type of KV cache; of f16, which everything else is measured with, none."""
    found: dict[str, float] = {}
    others = [kind for kind in kinds if kind != "f16"]
    with prober.progress.task("probe", len(others), "KV caches") as advance:
        for kind in kinds:
            found[kind] = 0.0
            if kind in others:
                found[kind] = max(prober.cache(kind), 0.0)
                advance(1)
    return found


def measured_pruning(
    total: int, counts: Sequence[int], kept: Callable[[int], Kept], share: Callable[[int], float], prober: Measures
) -> tuple[dict[int, float], list[Probe]]:
    """KL of pruning to each of ``counts``: probed at some (``probed_counts``);
    between them a power of the share of saliency that leaves (``share``), through the probed points."""
    asked = probed_counts(total, counts)
    if not asked:
        return {count: 0.0 for count in counts}, []
    probes: list[Probe] = []
    points: list[tuple[float, float]] = []
    with prober.progress.task("probe", len(asked), "prunes") as advance:
        for count in asked:
            kl = max(prober.kl(f"kept-{count}", {}, kept(count)), FLOOR)
            probes.append(Probe(f"{count} of {total} experts", kl, share(count)))
            points.append((max(share(count), 1e-12), kl))
            advance(1)
    return {count: 0.0 if count == total else _power(points, max(share(count), 1e-12)) for count in counts}, probes


def _power(points: list[tuple[float, float]], share: float) -> float:
    """KL at a dropped share: a power of it through the two points around it, or the two nearest ones outside; of a
    single point: proportional. Exponents outside 0.5 to 3 are noise, and are cut."""
    ordered = sorted(points)
    if len(ordered) == 1:
        return ordered[0][1] * share / ordered[0][0]
    place = min(max(sum(x <= share for x, _ in ordered), 1), len(ordered) - 1)
    (x, kl), (other_x, other_kl) = ordered[place - 1], ordered[place]
    steep = log(other_x / x)
    exponent = min(max(log(other_kl / kl) / steep, 0.5), 3.0) if steep > 1e-6 else 1.0
    return kl * exp(exponent * log(share / x))
