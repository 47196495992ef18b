"""How a compressed model behaves: what it writes, how far it drifts by position, and whether its experts keep their
spread (the comparisons of the REAP paper, arXiv 2510.13999)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from whole import Seen, moe_layers, one_expert


@torch.inference_mode()
def written_by(model: Any, prompts: Tensor, length: int, seed: int = 0) -> Tensor:
    """(sequences, length) tokens sampled behind ``prompts`` at temperature 1."""
    random = torch.Generator().manual_seed(seed)
    ids, cache, step = prompts, None, prompts
    for _ in range(length):
        output = model(step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        step = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=random)
        ids = torch.cat([ids, step], dim=1)
    return ids[:, prompts.shape[1] :]


def diversity(written: Tensor, n: int) -> float:
    """Different n-grams over all n-grams."""
    grams = [tuple(row[i : i + n]) for row in written.tolist() for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


@torch.inference_mode()
def cross_perplexity(original: Any, prompts: Tensor, written: Tensor) -> float:
    """Perplexity under the original of what was written behind the prompts."""
    ids = torch.cat([prompts, written], dim=1)
    found = original(ids, use_cache=False).logits.log_softmax(-1)[:, prompts.shape[1] - 1 : -1]
    return float(found.gather(2, written[..., None]).mean().neg().exp())


def divergence_by_position(a: Tensor, b: Tensor) -> Tensor:
    """(length,) Jensen-Shannon divergence in nats of two (sequences, length, vocabulary) log-probabilities."""
    middle = torch.logaddexp(a, b) - torch.log(torch.tensor(2.0))
    both = ((a.exp() * (a - middle)).sum(-1) + (b.exp() * (b - middle)).sum(-1)) / 2
    return both.mean(dim=0)


@torch.inference_mode()
def spread(model: Any, seen: dict[int, Seen], layer: int, tokens: int = 512) -> tuple[Tensor, float]:
    """Of the experts' outputs on what the original's layer was given: their first two principal components
    (experts, 2), and the mean distance of an expert's mean output from the middle of all. Merged experts count by
    their place, as the router sees them."""
    block = dict(moe_layers(model))[layer]
    inputs = seen[layer].inputs[:: max(1, len(seen[layer].inputs) // tokens)][:tokens]
    experts = range(len(block.experts.down_proj))
    means = torch.stack([one_expert(block.experts, expert, inputs).mean(dim=0) for expert in experts])
    centred = means - means.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T, float(centred.norm(dim=1).mean())
