"""How a compressed model writes, and how far it drifts by position: the comparisons that the REAP paper (arXiv
2510.13999) makes of what merged and pruned models generate.

There the models continue the same prompts greedily, by at most 256 tokens. n-gram diversity: different n-grams over
all, of each text by itself. Cross-perplexity: exp of the original's mean loss on a text of the compressed model, the
text alone. Jensen-Shannon divergence by position: between what the two models predict, each behind its own text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from whole import BATCH

NGRAMS = (2, 3, 4)


class Written(NamedTuple):
    """What a model wrote behind prompts: ``texts``, the tokens of each up to and with the end-of-text token, and
    ``log_probs`` (tokens of the text, vocabulary) that it predicted each from."""

    texts: list[Tensor]
    log_probs: list[Tensor]


@torch.inference_mode()
def written_by(model: Any, prompts: Tensor, length: int, *, sampled: bool = False, seed: int = 0) -> Written:
    """At most ``length`` tokens behind each of ``prompts`` (sequences, prompt length): greedily, or ``sampled`` at
    temperature 1 from the whole vocabulary."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=length, eos_token_id=ends or None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **how,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    found = Written([], [])
    logits = torch.stack(made.logits, dim=1)
    for tokens, values in zip(made.sequences[:, prompts.shape[1] :], logits, strict=True):
        over = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).nonzero()
        end = int(over[0]) + 1 if len(over) else len(tokens)
        found.texts.append(tokens[:end])
        found.log_probs.append(values[:end].float().log_softmax(-1))
    return found


def diversity(text: Tensor, n: int) -> float:
    """Different n-grams over all n-grams of one text; nan where it is shorter than ``n``."""
    tokens = text.tolist()
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@torch.inference_mode()
def cross_loss(original: Any, texts: list[Tensor], prompts: Tensor | None = None) -> np.ndarray:
    """(texts,) the original's mean loss in nats on each text; its exp is the cross-perplexity. Of the text alone, from
    its second token on (nan where there is none), as the paper has it; or with ``prompts`` (texts, prompt length) of
    every token behind its prompt."""
    losses: list[float] = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        front = [] if prompts is None else list(prompts[start : start + BATCH])
        whole = [torch.cat([front[i], text]) if front else text for i, text in enumerate(part)]
        # what stands behind a text does not change what is predicted within it
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        found = original(ids, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        loss = -found.gather(2, ids[:, 1:, None])[..., 0]
        first = prompts.shape[1] - 1 if prompts is not None else 0
        ends = [len(text) - 1 for text in whole]
        for row, end in zip(loss, ends, strict=True):
            losses.append(float(row[first:end].mean()) if end > first else float("nan"))
    return np.array(losses)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """(...) Jensen-Shannon divergence in nats, from 0 to ln 2, of (..., vocabulary) log-probabilities."""
    middle = torch.logaddexp(a, b) - np.log(2.0)
    parts = [torch.where(p == -torch.inf, 0.0, p.exp() * (p - middle)).sum(-1) for p in (a, b)]
    return ((parts[0] + parts[1]) / 2).clamp_min(0.0)


def drift(a: Written, b: Written, positions: int) -> Tensor:
    """(texts, positions) Jensen-Shannon divergence of two models' predictions, each behind its own text; nan where one
    of the two has ended."""
    found = torch.full((len(a.texts), positions), torch.nan)
    for row, (own, other) in enumerate(zip(a.log_probs, b.log_probs, strict=True)):
        length = min(len(own), len(other), positions)
        found[row, :length] = jensen_shannon(own[:length], other[:length])
    return found
