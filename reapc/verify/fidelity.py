"""What was lost: KL(original || result), top-1 agreement and perplexity on held-out tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.recipe import VerifySection
from reapc.stream.tokens import Tokens
from reapc.verify.detail import Detail


@dataclass
class _Sums:
    positions: int = 0
    kl: float = 0.0
    agree: int = 0
    predictions: int = 0
    loss_a: float = 0.0
    loss_b: float = 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "kl": self.kl / max(self.positions, 1),
            "top1": self.agree / max(self.positions, 1),
            "perplexity_a": float(np.exp(self.loss_a / self.predictions)) if self.predictions else None,
            "perplexity_b": float(np.exp(self.loss_b / self.predictions)) if self.predictions else None,
            "tokens": self.positions,
        }


@dataclass(frozen=True)
class Fidelity:
    """``kl`` in nats and ``top1`` over all real positions; perplexities over next-token positions, if any."""

    kl: float
    top1: float
    perplexity_a: float | None
    perplexity_b: float | None
    tokens: int
    domains: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "kl": self.kl,
            "top1": self.top1,
            "perplexity_a": self.perplexity_a,
            "perplexity_b": self.perplexity_b,
            "tokens": self.tokens,
            "domains": self.domains,
        }


def measure(
    tokens: Tokens, references: Iterable[Any], results: Iterable[np.ndarray], detail: Detail | None = None
) -> Fidelity:
    """Compares per-sequence references (``SequenceReference``) with (length, vocabulary) log-probabilities; ``detail``
    takes down what each sequence shows."""
    total, by_domain = _Sums(), [_Sums() for _ in tokens.domains]
    for row, (reference, result) in enumerate(zip(references, results, strict=True)):
        mask, ids = tokens.mask[row], tokens.input_ids[row].astype(np.int64)
        following = mask[:-1] & mask[1:]
        kl = reference.kl_to(result)
        if detail is not None:
            detail.add(row, kl, reference, result)
        agree = reference.best == result.argmax(axis=1)
        loss_b = -np.take_along_axis(result[:-1], ids[1:, None], axis=1)[:, 0]
        for sums in (total, by_domain[int(tokens.domain[row])]):
            sums.positions += int(mask.sum())
            sums.kl += float(kl[mask].sum(dtype=np.float64))
            sums.agree += int(agree[mask].sum())
            sums.predictions += int(following.sum())
            sums.loss_a -= float(reference.next_log_prob[following].sum(dtype=np.float64))
            sums.loss_b += float(loss_b[following].sum(dtype=np.float64))
    figures = {name: sums.figures() for name, sums in zip(tokens.domains, by_domain, strict=True) if sums.positions}
    return Fidelity(**total.figures(), domains=figures if len(figures) > 1 else {})


def check_limits(fidelity: Fidelity, limits: VerifySection) -> None:
    """CannotBeDone where the result is worse than a recipe's [verify] allows, with what is beyond and by how much."""
    before, after = fidelity.perplexity_a, fidelity.perplexity_b
    ratio = after / before if before and after else 1.0  # none where every sequence is a single token
    failures = []
    if limits.max_kl is not None and fidelity.kl > limits.max_kl:
        failures.append(f"KL {fidelity.kl:.5f} is {fidelity.kl - limits.max_kl:.5f} above max_kl {limits.max_kl}")
    if limits.min_top1 is not None and fidelity.top1 < limits.min_top1:
        failures.append(
            f"top-1 {fidelity.top1:.4f} is {limits.min_top1 - fidelity.top1:.4f} below min_top1 {limits.min_top1}"
        )
    if limits.max_perplexity_ratio is not None and ratio > limits.max_perplexity_ratio:
        failures.append(
            f"perplexity ratio {ratio:.4f} is {ratio - limits.max_perplexity_ratio:.4f} above "
            f"max_perplexity_ratio {limits.max_perplexity_ratio}"
        )
    if failures:
        raise CannotBeDone(
            "the result is worse than [verify] allows: " + "; ".join(failures),
            hint="allow more memory, more experts or bits, or relax [verify]; nothing was written to the output",
        )


def checkpoint_log_probs(folder: Path, tokens: Tokens, work: Path, progress: Progress) -> Iterator[np.ndarray]:
    """(length, vocabulary) fp32 log-probabilities per sequence, streamed a layer at a time."""
    from reapc.checkpoint.reader import Checkpoint
    from reapc.observe.reference import final_log_probs
    from reapc.stream import StreamedModel, run_layers, states_of

    model = StreamedModel(Checkpoint(folder))
    states = states_of(model, tokens, work, "compare")
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, progress, name=f"forward {folder.name}")
    return final_log_probs(model, states)


def log_probs(model: Path, tokens: Tokens, work: Path, progress: Progress) -> Iterator[np.ndarray]:
    """Log-probabilities of a checkpoint folder or a GGUF file."""
    if model.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        return checkpoint_log_probs(model, tokens, work, progress)
    if model.suffix == ".gguf" and model.is_file():
        from reapc.verify.gguf_logits import gguf_log_probs

        return gguf_log_probs(model, tokens.input_ids, tokens.mask)
    raise ReapcError(f"{model}: neither a checkpoint folder nor a .gguf file")


def vocabulary_of(model: Path) -> int:
    """Vocabulary size of a checkpoint folder or a GGUF file."""
    if model.is_dir():
        from reapc.arch import load_config, model_spec

        return model_spec(load_config(model), str(model / "config.json")).vocab_size
    if model.suffix != ".gguf" or not model.is_file():
        raise ReapcError(f"{model}: neither a checkpoint folder nor a .gguf file")
    from gguf import GGUFReader

    try:
        field = GGUFReader(str(model)).get_field("tokenizer.ggml.tokens")
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ReapcError(f"{model}: not readable as GGUF: {error}", hint="write or download it again") from error
    if field is None:
        raise ReapcError(f"{model}: no tokenizer.ggml.tokens: the vocabulary is not in this file")
    return len(field.data)


def compare(a: Path, b: Path, tokens: Tokens, progress: Progress) -> Fidelity:
    """KL(A || B) and the rest, exactly, whatever the vocabulary; nothing larger than one sequence is held."""
    from reapc.observe.reference import SequenceReference

    sizes = {vocabulary_of(a), vocabulary_of(b)}
    if len(sizes) > 1:
        raise ReapcError(f"{a} and {b} have different vocabularies: {sorted(sizes)}; they cannot be compared")
    with tempfile.TemporaryDirectory(prefix="reapc-compare-") as work:
        first = log_probs(a, tokens, Path(work) / "a", progress)
        references = (SequenceReference.of(values, tokens.input_ids[i], True) for i, values in enumerate(first))
        return measure(tokens, references, log_probs(b, tokens, Path(work) / "b", progress))
