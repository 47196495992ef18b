"""Figures of the trained demonstration model on text it never saw, and the model card made from them."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import VOCABULARY, TokenData
from demo_engine import EXPERTS_NAME
from demo_families import EXPERTS, TOP_K, recorded_choices, routers
from demo_overlap import OVERLAP_TOKENS, in_shared_runs, window_hashes
from safetensors import safe_open
from transformers import AutoModelForCausalLM

RARELY_USED = 0.005
MOST_USED = 3


def read_sequences(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of tokens, the domain of each row and the domain names of one sequence file."""
    with safe_open(path, framework="np") as stored:
        names = json.loads(stored.metadata()["domains"])
        return stored.get_tensor("input_ids"), stored.get_tensor("domain"), names


def _unigram_loss(rows: np.ndarray, stream: np.ndarray) -> float:
    """Mean loss on ``rows`` of the token frequencies of ``stream`` (plus one each): the baseline."""
    counts = np.bincount(stream, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[rows[:, 1:]].mean())


@torch.no_grad()
def evaluate(out: Path, data: TokenData) -> dict:
    """Held-out perplexity per domain, and which experts the router picks, of the bf16 weights on disk."""
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    model.set_experts_implementation(EXPERTS_NAME)
    rows, row_domains, names = read_sequences(out / "held_out.safetensors")
    trained_on = np.concatenate([window_hashes(stream) for stream in data.streams.values()])
    layers = list(routers(model))
    usage = np.zeros((len(names), len(layers), EXPERTS))
    held_out = {}
    for index, name in enumerate(names):
        part = rows[row_domains == index]
        batch = torch.from_numpy(part.astype(np.int64))
        with recorded_choices(model) as chosen:
            output = model(input_ids=batch, use_cache=False)
        losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").numpy()
        met = in_shared_runs(part, trained_on)[:, 1:]
        for place, layer in enumerate(layers):
            experts = torch.cat(chosen[layer]).flatten().numpy()
            usage[index, place] = np.bincount(experts, minlength=EXPERTS) / len(experts)
        held_out[name] = {
            "loss": round(float(losses.mean()), 4),
            "perplexity": _perplexity(losses.mean()),
            "perplexity_unmet": _perplexity(losses[~met].mean()),
            "unigram_perplexity": _perplexity(_unigram_loss(part, data.streams[name])),
            "tokens": losses.size,
            "tokens_met_in_training": round(float(met.mean()), 4),
        }
    rows_of = [{"layer": layer} | _layer_usage(usage[:, place], names) for place, layer in enumerate(layers)]
    return {"held_out": held_out, "experts": rows_of}


def _perplexity(loss: float) -> float:
    return round(float(np.exp(loss)), 2)


def _layer_usage(shares: np.ndarray, names: list[str]) -> dict:
    """Share of routed tokens per expert of one layer, over all domains and the leaders of each."""
    overall = shares.mean(axis=0)
    leaders = {}
    for name, row in zip(names, shares, strict=True):
        order = np.argsort(-row)[:MOST_USED]
        leaders[name] = [{"expert": int(expert), "share": round(float(row[expert]), 4)} for expert in order]
    return {
        "min": round(float(overall.min()), 4),
        "median": round(float(np.median(overall)), 4),
        "max": round(float(overall.max()), 4),
        "under_half_percent": int((overall < RARELY_USED).sum()),
        "most_used": leaders,
    }


def _licence(package: str) -> str:
    """The licence an installed package states, in a few words."""
    if package == "CPython":
        return "PSF-2.0"
    try:
        stated = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "see its metadata"
    text = (stated.get("License-Expression") or stated.get("License") or "").strip()
    if text and "\n" not in text and len(text) <= 60:
        return text
    classifiers = [line for line in stated.get_all("Classifier", []) if line.startswith("License ::")]
    return ", ".join(line.rpartition(" :: ")[2] for line in classifiers) or "see its metadata"


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _leaders(entries: list[dict]) -> str:
    return ", ".join(f"{entry['expert']}: {entry['share']:.0%}" for entry in entries)


def render(card: dict) -> str:
    """The model card, in Markdown, from the figures of ``card.json``."""
    training, held_out, layers = card["training"], card["held_out"], card["experts"]
    columns = ("perplexity", "perplexity_unmet", "unigram_perplexity", "tokens")
    quality = _table(
        ("domain", "perplexity", "on unmet tokens", "unigram perplexity", "tokens", "met in training"),
        [
            (name, *(row[column] for column in columns), f"{row['tokens_met_in_training']:.1%}")
            for name, row in held_out.items()
        ],
    )
    usage = _table(
        ("layer", "min", "median", "max", "experts under 0.5 %"),
        [
            (layer["layer"], *(f"{layer[key]:.2%}" for key in ("min", "median", "max")), layer["under_half_percent"])
            for layer in layers
        ],
    )
    leaders = _table(
        ("layer", *held_out),
        [(layer["layer"], *(_leaders(layer["most_used"][name]) for name in held_out)) for layer in layers],
    )
    sources = _table(
        ("source", "version", "licence it states"),
        [(name, version, _licence(name)) for name, version in training["sources"].items()],
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# reapc demonstration model

A small {training["family"]} with random initial weights, trained on text that a Python installation carries. It exists
so that pruning, quantising and serving can be tried end to end on a laptop. It is not a useful assistant.

{training["parameters"] / 1e6:.1f} M parameters, 4 layers, {EXPERTS} experts, {TOP_K} active per token, hidden size 256,
vocabulary {VOCABULARY}. Weights in bf16.

## Training

{training["tokens"] / 1e6:.2f} M tokens in {training["steps"]} steps of {training["tokens_per_step"]} tokens,
{training["minutes"]:.0f} minutes on {training["machine"]} ({training["tokens_per_second"]} tokens a second),
seed {training["seed"]}. Every domain has the same share of each step. Muon for the projections, AdamW for
embeddings, routers and norms. To train it again, from the pinned installation:

    {card["command"]}

The schedule follows the clock and the installed packages are the corpus, so weights differ between machines.

## Held-out perplexity

Documents are held out by a hash of their name. Long lines (100 characters) and runs of four lines that they share
with training text are removed from training. Shorter copies remain: the last column is the share of held-out
tokens inside a run of {OVERLAP_TOKENS} tokens that training text holds too, and "on unmet tokens" leaves those out.
The baseline is the token frequencies of the same domain's training text, on all the held-out tokens.

{quality}

## Expert usage on held-out text

Share of routed tokens per expert (an even share is {1 / EXPERTS:.2%}), all domains weighing the same:

{usage}

Most used experts per domain (expert: share of that domain's routed tokens):

{leaders}

## Sources

{sources}

The text belongs to the projects above, under their licences (CPython under the PSF licence). `held_out.safetensors`
and `calibration.safetensors` hold excerpts of it as tokens.
"""


def write_card(out: Path, training: dict, data: TokenData, command: str) -> dict:
    """Evaluate the model in ``out``, write ``card.json`` and the README beside the weights."""
    card = {"command": command, "training": training} | evaluate(out, data)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (out / "model" / "README.md").write_text(render(card), encoding="utf-8")
    return card
