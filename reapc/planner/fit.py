"""``reapc fit``: for each of many models the best legal configuration on one target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from reapc.arch import ModelSpec
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.formats.stored import as_published
from reapc.plan import Candidate, Refusal
from reapc.planner.question import ENGINES, Question, auto_pairs, format_pairs, kept_counts
from reapc.planner.reasons import nothing_fits
from reapc.planner.search import candidate, layouts_of, legal, nearest_fits, rank, search
from reapc.recipe import ServeSection
from reapc.target import Target


@dataclass(frozen=True)
class Wish:
    """What ``fit`` was asked: everything but the model. ``experts`` and ``format`` fix the configuration."""

    target: Target
    serve: ServeSection
    format: str | None = None
    experts: int | None = None
    max_ratio: float = 0.25

    @property
    def engine(self) -> str:
        return self.serve.engine


@dataclass(frozen=True)
class Verdict:
    """The answer for one model: ``best`` is the configuration that fits, or the nearest one that does not, or None
    where nothing is legal."""

    model: str
    spec: ModelSpec
    best: Candidate | None
    refused: tuple[Refusal, ...] = ()
    question: Question | None = field(default=None, compare=False)

    @property
    def fits(self) -> bool:
        return self.best is not None and self.best.fits

    def to_json(self) -> dict[str, Any]:
        """One entry of ``results``."""
        empty: dict[str, Any] = {
            "fits": False, "experts_kept": None, "prune_ratio": None, "format": None, "engine": None, "parallel": None,
            "context": None, "kv_dtype": None, "weights_bytes": None, "kv_bytes": None, "per_device": [],
            "predicted_loss": None, "decode_tokens_per_second_ceiling": None,
        }  # fmt: skip
        return {
            "model": self.model,
            "family": self.spec.family,
            "parameters": self.spec.parameters,
            "experts": self.spec.num_experts,
            **(self.best.summary() if self.best else empty),
            "refused": [refusal.model_dump(mode="json") for refusal in self.refused],
        }


def question_of(model: str, spec: ModelSpec, wish: Wish) -> Question:
    """The question for one model; ReapcError where an expert count or a format cannot be asked of it."""
    if wish.serve.context > spec.max_context:
        raise ReapcError(
            f"{model}: --context {wish.serve.context}: the model knows {spec.max_context} positions",
            hint=f"at most {spec.max_context}",
        )
    try:
        counts = kept_counts(spec, experts=wish.experts, max_ratio=wish.max_ratio)
    except ReapcError as error:
        message = error.message.replace("prune.experts =", "--experts")
        raise ReapcError(f"{model}: {message}", hint=error.hint) from None
    pairs = format_pairs(wish.format, wish.engine) if wish.format else auto_pairs(spec, wish.engine)
    return Question(
        model=model, spec=spec, target=wish.target, serve=wish.serve, pairs=pairs, counts=counts,
        max_ratio=wish.max_ratio, counts_fixed=wish.experts is not None, formats_fixed=wish.format is not None,
        stored=as_published(spec),
    )  # fmt: skip


def verdict(model: str, spec: ModelSpec, wish: Wish, *, nearest: bool) -> Verdict:
    """The best configuration of one model. ``nearest``: where none fits, the one that lacks least is sized."""
    question = question_of(model, spec, wish)
    found = search(question, exhaustive=False)
    refused = tuple(found.refused)
    if found.fitting:
        return Verdict(model, spec, rank(found.fitting)[0], refused, question)
    return Verdict(model, spec, nearest_of(question) if nearest else None, refused, question)


def nearest_of(question: Question) -> Candidate | None:
    """The legal configuration that lacks least: the fewest experts allowed in the format with the fewest bits."""
    found: list[Candidate] = []
    for engine in ENGINES:
        kv = "f16" if engine == "llama.cpp" else "auto"
        own = [fmt for owner, fmt in question.pairs if owner == engine and legal(question, engine, fmt, kv) is None]
        if engine == "vllm":
            own.sort(key=lambda fmt: weights.parse(fmt).bits)  # type: ignore[union-attr]
        else:
            own.reverse()
        for fmt in own:
            sizes = layouts_of(question, engine, fmt, kv)
            if getattr(sizes, "refusal", None) is None:
                found.append(candidate(question, engine, fmt, kv, sizes, min(question.counts)))
                break
    return max(found, key=lambda item: item.placement.fullest.free_bytes) if found else None


def fit(models: Iterable[tuple[str, ModelSpec]], wish: Wish, *, named: bool, everything: bool) -> list[Verdict]:
    """Verdicts, best first: least predicted loss, then the larger model. ``named``: the user named the models, so that
    a request that one of them cannot meet is an error; else such a model is left out."""
    verdicts = []
    for name, spec in models:
        try:
            verdicts.append(verdict(name, spec, wish, nearest=everything))
        except ReapcError:
            if named:
                raise
    fitting = [v for v in verdicts if v.fits]
    fitting.sort(key=lambda v: (v.best.predicted_loss if v.best else 0.0, -v.spec.parameters, v.model))
    rest = sorted((v for v in verdicts if not v.fits), key=_lack)
    return [*fitting, *(rest if everything else [])]


def _lack(verdict: Verdict) -> tuple[bool, int, str]:
    best = verdict.best
    return best is None, -best.placement.fullest.free_bytes if best else 0, verdict.model


def hopeless(verdicts: Iterable[tuple[str, ModelSpec]], wish: Wish, *, named: bool) -> CannotBeDone:
    """The error when nothing fits: for the model that lacks least, the smallest changes that would help."""
    best: tuple[int, Question, Candidate] | None = None
    refused: list[Refusal] = []
    first: Question | None = None
    for name, spec in verdicts:
        try:
            question = question_of(name, spec, wish)
        except ReapcError:
            if named:
                raise
            continue
        first = first or question
        near = nearest_of(question)
        if near is None:
            refused += search(question, exhaustive=False).refused if named else []
            continue
        lack = -near.placement.fullest.free_bytes
        if best is None or lack < best[0]:
            best = (lack, question, near)
    if best is None:
        if first is None:
            return CannotBeDone("no model of the catalogue can be asked this", hint="check --experts and --context")
        return nothing_fits(first, [], refused, lambda _: False, options=True)
    _, question, near = best
    return nothing_fits(question, [near], refused, nearest_fits(question, [near]), options=True)
