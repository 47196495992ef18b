"""Train the demonstration model: a small, real Qwen3-MoE, from text that a Python installation carries.

Run it as ``.venv/bin/python tools/train_demo_model.py --minutes 75 --out demo``. ``--family glm4`` trains another
architecture on the same text, for comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from demo_card import write_card
from demo_data import END_OF_TEXT, TURN_END, TokenData, prepare
from demo_engine import Muon, keep_freed_memory
from demo_families import FAMILIES, recorded_choices
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

SEQUENCE_LENGTH = 256
MUON_LR, ADAM_LR = 0.02, 4e-3
WARM_UP, DECAY_FROM = 0.03, 0.3
MUON_MOMENTUM = 0.95
SNAPSHOT_FIRST_MINUTES, SNAPSHOT_EVERY_MINUTES = 8, 15


def learning_rate_factor(progress: float) -> float:
    """Share of the peak rate at a share of the run: warm up, hold, then fall in a line to zero."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    return min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


class Batches:
    """Equal numbers of rows per domain; each domain is read in a seeded order of its rows, again if it ends."""

    def __init__(self, data: TokenData, rows: int, seed: int) -> None:
        self._streams = list(data.streams.values())
        self._rows, self._seed = rows, seed
        self._orders = [self._order(index, 0) for index in range(len(self._streams))]

    def _order(self, domain: int, epoch: int) -> np.ndarray:
        rows = len(self._streams[domain]) // SEQUENCE_LENGTH
        return np.random.default_rng((self._seed, domain, epoch)).permutation(rows)

    def batch(self, step: int) -> torch.Tensor:
        """The rows of one step: a function of the step alone, so that a resumed run goes on unchanged."""
        rows = []
        for domain, stream in enumerate(self._streams):
            for position in range(step * self._rows, (step + 1) * self._rows):
                epoch, place = divmod(position, len(self._orders[domain]))
                order = self._orders[domain] if epoch == 0 else self._order(domain, epoch)
                start = order[place] * SEQUENCE_LENGTH
                rows.append(stream[start : start + SEQUENCE_LENGTH])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for embeddings, routers and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or "embed" in name or name.endswith("mlp.gate.weight")
        (others if plain else matrices).append(parameter)
    return [
        Muon(matrices, lr=MUON_LR, momentum=MUON_MOMENTUM),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights in bf16 under the standard per-expert names, with the generation settings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    written = type(model)(model.config)
    written.load_state_dict(model.state_dict())
    written = written.to(torch.bfloat16)
    written.config.bos_token_id, written.config.pad_token_id = end, end
    written.config.eos_token_id = turn_end
    written.generation_config = GenerationConfig(
        bos_token_id=end, pad_token_id=end, eos_token_id=[turn_end, end], do_sample=True, temperature=0.7, top_p=0.9
    )
    written.save_pretrained(folder)


def machine() -> str:
    """The processor this runs on, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def train(args: argparse.Namespace, data: TokenData, say: Callable[[str], None]) -> dict:
    """Train for the minutes asked, resuming a stopped run; returns the figures of the run."""
    family = FAMILIES[args.family]
    model = family.build(args.seed)
    steppers = optimizers(model)
    batches = Batches(data, args.rows, args.seed)
    checkpoint = args.work / "checkpoint.pt"
    step, before = 0, 0.0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(stored["model"])
        for stepper, state in zip(steppers, stored["steppers"], strict=True):
            stepper.load_state_dict(state)
        step, before = stored["step"], stored["seconds"]
        say(f"resumed at step {step}, {before / 60:.1f} min")
    began, budget = time.monotonic() - before, args.minutes * 60
    next_snapshot = SNAPSHOT_FIRST_MINUTES * 60 if before == 0 else before + SNAPSHOT_EVERY_MINUTES * 60
    rows, tokens_per_step = len(data.streams) * args.rows, len(data.streams) * args.rows * SEQUENCE_LENGTH
    while (seconds := time.monotonic() - began) < budget:
        factor = learning_rate_factor(seconds / budget)
        for stepper, peak in zip(steppers, (MUON_LR, ADAM_LR), strict=True):
            stepper.param_groups[0]["lr"] = peak * factor
        batch = batches.batch(step)
        loss = 0.0
        with recorded_choices(model) as chosen:
            for part in batch.split(args.micro_rows):
                minimized, language = family.loss(model, part)
                (minimized * len(part) / rows).backward()
                loss += language * len(part) / rows
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
        if family.after_step:
            family.after_step(model, chosen)
        step += 1
        if step % 10 == 0 or step < 4:
            spent = time.monotonic() - began
            rate = step * tokens_per_step / spent
            say(f"step {step}  {spent / 60:.1f} min  loss {loss:.3f}  lr x{factor:.2f}  {rate:.0f} tok/s")
        if time.monotonic() - began > next_snapshot:
            next_snapshot += SNAPSHOT_EVERY_MINUTES * 60
            state = {"model": model.state_dict(), "steppers": [stepper.state_dict() for stepper in steppers]}
            torch.save(state | {"step": step, "seconds": time.monotonic() - began}, checkpoint)
            if args.snapshot:
                shutil.copytree(args.out, args.snapshot, dirs_exist_ok=True)
                save_model(model, args.snapshot / "model")
                say(f"snapshot written to {args.snapshot}")
    save_model(model, args.out / "model")
    seconds = time.monotonic() - began
    return {
        "minutes": round(seconds / 60, 1),
        "steps": step,
        "tokens": step * tokens_per_step,
        "tokens_per_second": round(step * tokens_per_step / seconds),
        "tokens_per_step": tokens_per_step,
        "parameters": model.num_parameters(),
        "machine": machine(),
        "seed": args.seed,
        "family": FAMILIES[args.family].describe,
        "sources": data.sources,
    }


def main() -> int:
    """Read the command line, train, and write the model, its token files and its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3", help="architecture (default: qwen3)")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="token streams and checkpoint")
    parser.add_argument("--snapshot", type=Path, help="also write the model here while training goes on")
    parser.add_argument("--minutes", type=float, default=75, help="training time (default: 75)")
    parser.add_argument("--rows", type=int, default=16, help="sequences per domain and step (default: 16)")
    parser.add_argument("--micro-rows", type=int, default=32, help="sequences computed at once (default: 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card-only", action="store_true", help="evaluate a finished run again, without training")
    args = parser.parse_args()
    if min(args.minutes, args.rows, args.micro_rows, args.threads) <= 0:
        parser.error("--minutes, --rows, --micro-rows and --threads must be above zero")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    figures = args.work / "training.json"
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        data = prepare(args.out, args.work, args.seed, _say, FAMILIES[args.family].special_tokens)
        if not args.card_only:
            figures.write_text(json.dumps(train(args, data, _say)), encoding="utf-8")
            (args.work / "checkpoint.pt").unlink(missing_ok=True)
        family = "" if args.family == "qwen3" else f" --family {args.family}"
        command = f".venv/bin/python tools/train_demo_model.py{family} --minutes {args.minutes:g} --out {args.out}"
        card = write_card(args.out, json.loads(figures.read_text(encoding="utf-8")), data, command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, row in card["held_out"].items():
        _say(f"{name}: perplexity {row['perplexity']} (unigram {row['unigram_perplexity']})")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
