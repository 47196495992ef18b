"""Pruning, merging and a non-uniform search on one small model, side by side (README.md):

    .venv/bin/python benchmarks/baselines/run.py [FOLDER like demo/] [--ratios 0.25,0.5] [--json F.json] [--plot F.svg]

Everything is decided on the calibration tokens; what is printed is measured on held-out text.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from behaviour import NGRAMS, Written, cross_loss, diversity, drift, jensen_shannon, written_by
from manifold import activations, off, plane_of, spread
from masks import Counts, acceptance, search
from merging import METHODS, merged
from plot import write_plot
from torch import Tensor
from whole import kl, load, log_probs, moe_layers, pruned, seen_by

from reapc.checkpoint.atomic import write_text
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import CRITERIA, check_kept, choose, expert_values, kept_count
from reapc.stream.tokens import Tokens, read_tokens
from reapc.verify.intervals import mean_interval

ROOT = Path(__file__).resolve().parents[2]
EARLY = 25  # tokens of a continuation over which the REAP paper draws the divergence
SEARCHED = (16, 256)  # sequences and length of the calibration text that the search looks at
PLOTTED = ("reap", "m-smoe, merged", "hc-smoe, merged")
AGAINST = ("reap", "frequency")  # the latter keeps the experts that M-SMoE's others join
NOT_SERVABLE = "not servable by stock engines"
FIRST = (
    "ratio", "method", "KL (95 % interval)", "top-1", "JSD in first / last quarter", "spread in first / last MoE layer",
    "the same by use", "off the original's",
)  # fmt: skip
SECOND = (
    "ratio", "method", "n-grams 2 / 3 / 4", "cross-perplexity, alone / behind prompt", f"JSD in first {EARLY} / all",
    "sampled: 4-grams", "sampled: cross-perplexity behind prompt",
)  # fmt: skip
# what each figure by sequence is called, and whether more of it is better
COMPARED = {
    "kl": ("KL", False), "jsd": ("JSD on the text", False), "ngrams_4": ("4-grams", True),
    "cross_loss": ("log cross-perplexity, alone", False), "cross_loss_prompted": ("the same behind prompt", False),
    "drift_early": (f"JSD in first {EARLY}", False), "sampled_ngrams_4": ("4-grams, sampled", True),
    "sampled_cross_loss": ("log cross-perplexity, sampled", False),
}  # fmt: skip


def full(tokens: Tokens, path: Path) -> Tensor:
    """The ids; ReapcError where a sequence ends early."""
    if not tokens.mask.all():
        raise ReapcError(
            f"{path}: sequences of different lengths", hint="held-out sequences of one length are expected"
        )
    return torch.from_numpy(tokens.input_ids.astype(np.int64))


class Panel:
    """The original on the held-out text, and what another model is against it."""

    def __init__(self, model: Any, ids: Tensor, prompt: int, written: int) -> None:
        self.model, self.ids, self.prompts, self.written = model, ids, ids[:, :prompt], written
        layers = [index for index, _ in moe_layers(model)]
        self.layers = list(dict.fromkeys((layers[0], layers[-1])))
        self.reference = log_probs(model, ids)
        seen = seen_by(model, ids)
        self.experts = {layer: activations(model, seen, layer) for layer in self.layers}
        self.planes = {layer: plane_of(points) for layer, (points, _) in self.experts.items()}
        self.by_use = {layer: plane_of(points, used) for layer, (points, used) in self.experts.items()}
        self.text: Written = written_by(model, self.prompts, written)

    def of(self, other: Any) -> dict[str, Any]:
        """Figures of ``other``: means, and those of every sequence under "by_sequence"."""
        found = log_probs(other, self.ids)
        divergence = jensen_shannon(self.reference, found)
        text, sampled = (written_by(other, self.prompts, self.written, sampled=way) for way in (False, True))
        apart = drift(self.text, text, self.written)
        by_sequence = {
            "kl": kl(self.reference, found).mean(dim=1),
            "jsd": divergence.mean(dim=1),
            **{f"ngrams_{n}": torch.tensor([diversity(one, n) for one in text.texts]) for n in NGRAMS},
            "cross_loss": cross_loss(self.model, text.texts),
            "cross_loss_prompted": cross_loss(self.model, text.texts, self.prompts),
            "drift": apart.nanmean(dim=1),
            "drift_early": apart[:, :EARLY].nanmean(dim=1),
            **{f"sampled_ngrams_{n}": torch.tensor([diversity(one, n) for one in sampled.texts]) for n in NGRAMS},
            "sampled_cross_loss": cross_loss(self.model, sampled.texts, self.prompts),
        }
        quarter = max(1, self.ids.shape[1] // 4)
        manifold = {}
        seen = seen_by(other, self.ids)
        for layer in self.layers:
            (points, used), plane, (originals, before) = (
                activations(other, seen, layer),
                self.planes[layer],
                self.experts[layer],
            )
            manifold[layer] = {
                "spread": spread(plane.place(points)) / spread(plane.place(originals)),
                "spread_everywhere": spread(points) / spread(originals),
                "spread_by_use": spread(points, used) / spread(originals, before),
                "off": off(points, originals) / spread(originals),
                "explained": plane.explained,
                "used": used.tolist(),
                "places": plane.place(points).tolist(),
                "places_by_use": self.by_use[layer].place(points).tolist(),
            }
        return {
            "top1": float((self.reference.argmax(-1) == found.argmax(-1)).float().mean()),
            "jsd_by_quarter": [float(divergence[:, :quarter].mean()), float(divergence[:, -quarter:].mean())],
            "drift_by_position": apart.nanmean(dim=0).tolist(),
            "tokens_written": [len(one) for one in text.texts],
            "manifold": manifold,
            "by_sequence": {name: np.asarray(values, np.float64).tolist() for name, values in by_sequence.items()},
        }


def mean(row: dict[str, Any], name: str) -> float:
    return float(np.nanmean(row["by_sequence"][name]))


def interval(values: Any) -> str:
    """The 95 % interval of a mean over sequences; nan ones are left out."""
    values = np.asarray(values)[~np.isnan(values)]
    found = mean_interval(values, np.ones(len(values)))
    return f"{found.low:.4f} to {found.high:.4f}" if found else "too few sequences"


def line(cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def first_line(row: dict[str, Any]) -> str:
    parts = list(row["manifold"].values())
    pairs = {key: " / ".join(f"{part[key]:.2f}" for part in parts) for key in ("spread", "spread_by_use", "off")}
    return line((
        row["ratio"], row["method"], f"{mean(row, 'kl'):.4f} ({interval(row['by_sequence']['kl'])})",
        f"{row['top1']:.3f}", " / ".join(f"{value:.4f}" for value in row["jsd_by_quarter"]), *pairs.values(),
    ))  # fmt: skip


def second_line(row: dict[str, Any]) -> str:
    cross = [f"{np.exp(mean(row, name)):.2f}" for name in ("cross_loss", "cross_loss_prompted")]
    return line((
        row["ratio"], row["method"], " / ".join(f"{mean(row, f'ngrams_{n}'):.2f}" for n in NGRAMS), " / ".join(cross),
        f"{mean(row, 'drift_early'):.4f} / {mean(row, 'drift'):.4f}", f"{mean(row, 'sampled_ngrams_4'):.3f}",
        f"{np.exp(mean(row, 'sampled_cross_loss')):.2f}",
    ))  # fmt: skip


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Of each merged model minus each of ``AGAINST`` at the same ratio, sequence by sequence; "worse", "better" where
    the interval leaves 0 out."""
    found = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows if row["ratio"]):
        of = {row["method"]: row["by_sequence"] for row in rows if row["ratio"] == ratio}
        for name, base in product((name for name in of if name.endswith("merged")), AGAINST):
            cells = []
            for key, (_, more_is_better) in COMPARED.items():
                apart = np.asarray(of[name][key]) - np.asarray(of[base][key])
                apart = apart[~np.isnan(apart)]
                ends = mean_interval(apart, np.ones(len(apart)))
                word = ""
                if ends is not None and not ends.low <= 0 <= ends.high:
                    word = " better" if (ends.low > 0) == more_is_better else " worse"
                cells.append(f"{apart.mean():+.3f}{word}")
            found.append(line((ratio, f"{name} minus {base}", *cells)))
    return found


def table(head: Any, lines: list[str]) -> str:
    return "\n".join([line(head), "|---" * len(head) + "|", *lines]) + "\n"


def rows_of(args: argparse.Namespace, say: Any) -> list[dict[str, Any]]:
    """A row for the original, and for every ratio and method."""
    folder = args.folder
    checkpoint = Checkpoint(folder / "model")
    spec = checkpoint.spec
    calibration = read_tokens(folder / "calibration.safetensors", spec.vocab_size)
    held_out = read_tokens(folder / "held_out.safetensors", spec.vocab_size)
    chosen = np.linspace(0, held_out.sequences - 1, min(args.sequences, held_out.sequences)).astype(int)
    ids = full(held_out.take(chosen), folder / "held_out.safetensors")
    counts = {}
    for part in args.ratios.split(","):
        ratio = float(part)
        counts[ratio] = kept_count(spec.num_experts, ratio)
        check_kept(counts[ratio], spec.num_experts, spec.top_k)
    if spec.n_group > 1:
        raise ReapcError(f"{folder}: its router chooses by groups", hint="the baselines know routers without groups")
    with tempfile.TemporaryDirectory() as work:
        scores = observe(checkpoint, calibration, Path(work), Silent(), moments=False)
    model = load(folder / "model")
    seen = seen_by(model, torch.from_numpy(calibration.input_ids.astype(np.int64)), torch.from_numpy(calibration.mask))
    layers = list(seen)
    panel = Panel(model, ids, min(args.prompt, ids.shape[1]), args.written)
    places = np.linspace(0, calibration.sequences - 1, min(SEARCHED[0], calibration.sequences)).astype(int)
    sample = torch.from_numpy(calibration.take(places, SEARCHED[1]).input_ids.astype(np.int64))
    sampled = log_probs(model, sample)
    rows: list[dict[str, Any]] = []

    def add(ratio: str, method: str, other: Any, **more: Any) -> None:
        start = time.perf_counter()
        rows.append({"ratio": ratio, "method": method, **more, **panel.of(other)})
        say(f"{first_line(rows[-1])}  ({time.perf_counter() - start:.0f} s)")

    add("", "original", model)
    for ratio, count in counts.items():
        name = f"{ratio:.0%}"
        for criterion in CRITERIA:
            add(name, criterion, pruned(model, choose(scores, criterion, count)))
        for method in METHODS:
            add(name, f"{method}, merged", merged(model, seen, count, method))
        order = {layer: np.argsort(-values, kind="stable") for layer, values in expert_values(scores, "reap").items()}

        def masked(numbers: Counts, order: dict[int, Any] = order) -> Any:
            kept = {layer: sorted(order[layer][:n].tolist()) for layer, n in zip(layers, numbers, strict=True)}
            return pruned(model, kept)

        best, esap = search(
            lambda numbers: acceptance(sampled, log_probs(masked(numbers), sample)), len(layers), spec.num_experts,
            count * len(layers), spec.top_k, generations=args.generations, population=args.population,
        )  # fmt: skip
        text = f"reap, searched {' '.join(map(str, best))} ({NOT_SERVABLE})"
        add(name, text, masked(best), counts=best, esap_on_calibration=esap)
    return rows


def draw(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """The SVG of the last ratio: the paper's plane, and the plane by use with the experts that at least a tenth of an
    even share of the tokens comes to, since experts that hardly any comes to may lie far from all others."""
    ratio = rows[-1]["ratio"]
    shown = {"original": rows[0]}
    shown |= {row["method"]: row for row in rows if row["ratio"] == ratio and row["method"] in PLOTTED}
    planes: dict[str, dict[str, Any]] = {}
    for layer in rows[0]["manifold"]:
        of = {method: row["manifold"][layer] for method, row in shown.items()}
        planes[f"layer {layer}"] = {method: part["places"] for method, part in of.items()}
        planes[f"layer {layer} by use"] = {
            method: [
                place
                for place, used in zip(part["places_by_use"], part["used"], strict=True)
                if used >= 0.1 * np.mean(part["used"])
            ]
            for method, part in of.items()
        }
    drifts = {method: row["drift_by_position"] for method, row in shown.items() if method != "original"}
    write_plot(path, f"{name}, {ratio} of the experts pruned or merged", planes, drifts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "demo")
    parser.add_argument("--ratios", default="0.25,0.5")
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each that are continued")
    parser.add_argument("--written", type=int, default=192, help="most tokens of a continuation")
    parser.add_argument("--generations", type=int, default=25, help="of the search")
    parser.add_argument("--population", type=int, default=16, help="candidates of each generation")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--plot", type=Path, help="write an SVG of the experts and the drift there, at the last ratio")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if args.plot and args.plot.suffix != ".svg":
            raise ReapcError(f"--plot {args.plot}: the plot is an SVG", hint="give a name that ends in .svg")
        rows = rows_of(args, lambda text: print(text, file=sys.stderr, flush=True))
        print(table(FIRST, [first_line(row) for row in rows]))
        print(table(SECOND, [second_line(row) for row in rows]))
        print(table(("ratio", "", *(name for name, _ in COMPARED.values())), differences(rows)))
        about = {
            "model": str(args.folder), "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": platform.platform(),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - start), "sequences": len(rows[0]["by_sequence"]["kl"]),
            "prompt": args.prompt, "written": args.written,
        }  # fmt: skip
        print("; ".join(f"{name} {value}" for name, value in about.items()))
        if args.json:
            write_text(args.json, json.dumps({**about, "rows": rows}) + "\n")
        if args.plot:
            kind = Checkpoint(args.folder / "model").config.get("model_type", "")
            draw(args.plot, f"{args.folder.name} ({kind})", rows)
    except ReapcError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
