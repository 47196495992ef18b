"""Pruning, merging and a non-uniform search on one small model, as a table (README.md):
``run.py [FOLDER of demo/'s layout] [--ratios 0.25,0.5]``. KL and the rest on held-out text, chosen on calibration text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from behaviour import cross_perplexity, divergence_by_position, diversity, spread, written_by
from masks import search
from merging import merged
from whole import kl, load, log_probs, moe_layers, pruned, seen_by

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import CRITERIA, choose, expert_values
from reapc.stream.tokens import read_tokens

ROOT = Path(__file__).resolve().parents[2]
PROMPT, WRITTEN = 32, 64


def acceptance(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over positions of sum over the vocabulary of min(p, q): what EvoESAP maximizes."""
    return float(torch.minimum(reference, found).exp().sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "demo")
    parser.add_argument("--ratios", default="0.25,0.5")
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.folder / "model")
    spec, vocab = checkpoint.spec, checkpoint.spec.vocab_size
    calibration = read_tokens(args.folder / "calibration.safetensors", vocab)
    panel = read_tokens(args.folder / "held_out.safetensors", vocab)
    panel = panel.take(np.linspace(0, panel.sequences - 1, args.sequences).astype(int))
    ids = torch.from_numpy(panel.input_ids.astype(np.int64))
    sample = torch.from_numpy(calibration.input_ids[:: max(1, calibration.sequences // 16)].astype(np.int64))
    with tempfile.TemporaryDirectory() as work:
        scores = observe(checkpoint, calibration, Path(work), Silent(), moments=False)
    model = load(args.folder / "model")
    layers = [index for index, _ in moe_layers(model)]
    seen, reference, sampled = seen_by(model, sample), log_probs(model, ids), log_probs(model, sample[:8])
    first, last = layers[0], layers[-1]
    wide = {layer: spread(model, seen, layer)[1] for layer in (first, last)}
    prompts = ids[:, :PROMPT]
    print("| ratio | method | KL | top-1 | JSD, first / last quarter | n-grams 2 / 3 / 4 | cross-perplexity | spread |")
    print("|---" * 8 + "|")

    def row(ratio: str, name: str, other: object) -> None:
        found = log_probs(other, ids)
        text = written_by(other, prompts, WRITTEN)
        drift = divergence_by_position(reference, found)
        quarter = len(drift) // 4
        kept = " / ".join(f"{spread(other, seen, layer)[1] / wide[layer]:.2f}" for layer in (first, last))
        print(
            f"| {ratio} | {name} | {float(kl(reference, found).mean()):.4f} "
            f"| {float((reference.argmax(-1) == found.argmax(-1)).float().mean()):.3f} "
            f"| {float(drift[:quarter].mean()):.4f} / {float(drift[-quarter:].mean()):.4f} "
            f"| {' / '.join(f'{diversity(text, n):.2f}' for n in (2, 3, 4))} "
            f"| {cross_perplexity(model, prompts, text):.1f} | {kept} |",
            flush=True,
        )

    row("", "original", model)
    for ratio in (float(part) for part in args.ratios.split(",")):
        count = spec.num_experts - int(spec.num_experts * ratio + 1e-9)
        for criterion in CRITERIA:
            row(f"{ratio:.0%}", criterion, pruned(model, choose(scores, criterion, count)))
        for method in ("m-smoe", "hc-smoe"):
            row(f"{ratio:.0%}", f"{method} (merged)", merged(model, sample, count, method))
        order = {layer: np.argsort(-values, kind="stable") for layer, values in expert_values(scores, "reap").items()}

        def masked(counts: tuple[int, ...], order: dict[int, np.ndarray] = order) -> object:
            return pruned(
                model, {layer: sorted(order[layer][:n].tolist()) for layer, n in zip(layers, counts, strict=True)}
            )

        best, _ = search(
            lambda counts: 1 - acceptance(sampled, log_probs(masked(counts), sample[:8])),
            len(layers), spec.num_experts, count * len(layers), spec.top_k,
        )  # fmt: skip
        row(f"{ratio:.0%}", f"reap, not uniform {best} (not servable by stock engines)", masked(best))


if __name__ == "__main__":
    main()
