"""`observe` against a plain transformers forward, a model of every family: same weights, batches, threads and dtype.

.venv/bin/python benchmarks/families.py [FAMILY OR MODEL ...] [--seed N]

Each model is the catalogue's own config.json made small (reapc/rehearse/shrink.py, wider here than in a rehearsal) and
filled with random numbers. Prints a Markdown table of ratios; exit status 1 where one is LIMIT or more.

Plain: what transformers' decoder takes (``get_decoder()``, without cache and logits), with the fastest of its
implementations of experts. "batched_mm" copies the matrices of an expert for every token that goes through it; where
those copies pass COPIES it is not tried. A row at the limit takes ROUNDS more, and the medians of all: other work on
the machine looks like that.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from reapc.arch import ModelSpec, known
from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.rehearse import keys
from reapc.rehearse.checkpoint import write_checkpoint
from reapc.rehearse.shrink import Vocabulary, shrink
from reapc.stream.families import SUPPORTED
from reapc.stream.run import TOKENS_PER_BATCH
from reapc.stream.skeleton import auto_class, make_config
from reapc.stream.tokens import Tokens

LIMIT = 1.5
ROUNDS, SEQUENCES, LENGTH = 3, 16, 256
VOCABULARY = Vocabulary(2048, 0, 2, 0)
# reapc.rehearse.keys, in numbers for which computing takes most of the time
SIZES = {"HIDDEN": 512, "EXPERT": 512, "WIDE": 1024, "EXPERTS": 32, "FEWER_EXPERTS": 32}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
COPIES = 4e9
SLOW = 2.0  # an implementation that takes this many times the fastest in the warm-up is not timed further
# transformers has a class of its own for several models of the family "deepseek", and GLM-5.2 shares its indexers
MODELS = (
    "moonshotai/Kimi-K2-Instruct", "deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V4-Flash", "baidu/ERNIE-4.5-21B-A3B-PT",
    "google/gemma-4-26B-A4B", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.7-Flash", "zai-org/GLM-5", "zai-org/GLM-5.2",
    "openai/gpt-oss-20b", "ibm-granite/granite-3.1-3b-a800m-instruct", "moonshotai/Kimi-K2.6",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "XiaomiMiMo/MiMo-V2-Flash", "MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M3", "mistralai/Mixtral-8x7B-v0.1",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "allenai/OLMoE-1B-7B-0924", "microsoft/Phi-3.5-MoE-instruct",
    "Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "Qwen/Qwen3-VL-30B-A3B-Instruct", "stepfun-ai/Step-3.7-Flash",
)  # fmt: skip
# The catalogue has no model of qwen2_moe.
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "dtype": "bfloat16",
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "hidden_act": "silu",
        "vocab_size": 151936, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
    },
}  # fmt: skip

# What is published around a text config that the catalogue has alone, and what transformers reads by another name in
# there (None: not at all). Step's tower is small from the start: transformers' own is of 1.8 billion parameters.
FLAT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MiniMaxAI/MiniMax-M3": ({"model_type": "minimax_m3_vl"}, {"model_type": "minimax_m3_vl_text"}),
    "stepfun-ai/Step-3.7-Flash": (
        {
            "model_type": "step3p7",
            "vision_config": {"width": 32, "layers": 2, "heads": 2, "patch_size": 4, "image_size": 16},
        },
        {
            "model_type": "step3p5",
            "num_experts": None,
            "n_routed_experts": 288,
            "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """One model: medians of seconds, and what the plain forward was fastest with."""

    spec: ModelSpec
    name: str
    fastest: str
    plain: float
    scores: float
    moments: float
    whole: float
    rounds: int

    @property
    def worst(self) -> float:
        """The larger of both ratios."""
        return max(self.scores, self.moments) / self.plain

    def __str__(self) -> str:
        sizes = f"{self.spec.num_layers} x {self.spec.hidden_size}, {self.spec.num_experts} top-{self.spec.top_k}"
        return (
            f"| {self.spec.family} | {self.name.partition('/')[2]} | {sizes} | {self.fastest} | {self.plain:.2f} s "
            f"| {self.scores / self.plain:.2f}x | {self.moments / self.plain:.2f}x "
            f"| {self.whole:.0f} s{f', {self.rounds} rounds' if self.rounds > ROUNDS else ''} |"
        )


HEADER = (
    "| family | model made small | layers x width, experts | plain's experts | plain | scores | with second moments "
    "| row |\n|---|---|---|---|---|---|---|---|"
)


def published(name: str) -> dict[str, Any]:
    """The config.json of the model, without a quantization: both sides take 16-bit weights."""
    config = deepcopy(OTHERS[name] if name in OTHERS else known.config(name))
    if name in FLAT:  # the catalogue's copy is the text model's part
        outer, inner = FLAT[name]
        text = {key: value for key, value in {**config, **inner}.items() if value is not None}
        config = {**outer, "text_config": text}
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization_config", None)
    return config


@contextmanager
def wider() -> Iterator[None]:
    """Sizes for timing in the place of those for a rehearsal."""
    with patch.dict(vars(keys), SIZES):
        yield


def write_model(name: str, folder: Path) -> Checkpoint:
    """The model made small, on disk, read once so that digest and file cache are warm."""
    with wider():
        small = shrink(published(name), name, None, VOCABULARY)
    folder.mkdir(parents=True)
    write_checkpoint(small, folder, towers=False)
    checkpoint = Checkpoint(folder)
    checkpoint.digest  # noqa: B018 - hashed once, not part of the forward
    return checkpoint


def plain_decoder(checkpoint: Checkpoint) -> Any:
    """The decoder of transformers' model of the checkpoint in fp32, with every weight of it loaded."""
    config = make_config(checkpoint)
    with torch.device("meta"):  # a key that the class does not read would have it as large as published
        size = sum(p.numel() for p in auto_class(config).from_config(config).get_decoder().parameters())
    if size > 1.1 * checkpoint.spec.parameters:
        raise RuntimeError(f"transformers makes {size:,} parameters of it, not {checkpoint.spec.parameters:,}")
    loaded = auto_class(config).from_pretrained(
        checkpoint.folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, said = loaded
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    lost = [name for name in said["missing_keys"] if name.startswith(f"{path}.") and "vision" not in name]
    if lost:
        raise RuntimeError(f"transformers did not find {', '.join(lost[:3])}")
    return decoder.eval()


def implementations(decoder: Any, spec: ModelSpec) -> list[str]:
    """transformers' implementations of experts that are tried; its own way alone where the class has no choice."""
    if not decoder._can_set_experts_implementation():
        return ["its own"]
    pairs = min(SEQUENCES * LENGTH, TOKENS_PER_BATCH) * spec.top_k
    copies = 4 * pairs * 2 * spec.hidden_size * spec.expert_intermediate_size
    return [name for name in IMPLEMENTATIONS if name != "batched_mm" or copies < COPIES]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, root: Path, seed: int) -> Row:
    """One row of the table."""
    began = time.perf_counter()
    checkpoint = write_model(name, root / "model")
    spec = checkpoint.spec
    ids = np.random.default_rng(seed).integers(3, spec.vocab_size - 64, (SEQUENCES, LENGTH)).astype(np.int32)
    tokens = Tokens(ids, np.ones(ids.shape, bool), np.zeros(SEQUENCES, np.int32))
    decoder = plain_decoder(checkpoint)
    batches = [torch.from_numpy(ids[rows].astype(np.int64)) for rows, _ in tokens.batches(TOKENS_PER_BATCH)]

    def plain(how: str) -> None:
        if how in IMPLEMENTATIONS:
            decoder.set_experts_implementation(how)
        with torch.inference_mode():
            for batch in batches:
                decoder(input_ids=batch, use_cache=False)

    def ours(moments: bool) -> None:
        observe(checkpoint, tokens, root / "work", Silent(), moments=moments)

    first = {}
    for how in implementations(decoder, spec):  # the warm-up
        try:
            first[how] = timed(partial(plain, how))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{name}: {how}: {str(error)[:200]}", file=sys.stderr)
    ways = [how for how, seconds in first.items() if seconds < SLOW * min(first.values())]
    ours(True)
    found: dict[str, list[float]] = {key: [] for key in (*ways, "scores", "moments")}
    while True:
        for _ in range(ROUNDS):
            for how in ways:
                found[how].append(timed(partial(plain, how)))
            found["scores"].append(timed(partial(ours, False)))
            found["moments"].append(timed(partial(ours, True)))
        middle = {key: statistics.median(times) for key, times in found.items()}
        fastest = min(ways, key=middle.__getitem__)
        worst = max(middle["scores"], middle["moments"]) / middle[fastest]
        if worst < LIMIT or len(found["scores"]) > ROUNDS:
            break
    whole = time.perf_counter() - began
    return Row(spec, name, fastest, middle[fastest], middle["scores"], middle["moments"], whole, len(found["scores"]))


def quiet() -> None:
    """No warnings of a small model's odd numbers."""
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()


def family_of(name: str) -> str:
    """The family of a model in the table."""
    return "qwen2_moe" if name in OTHERS else known.spec(name).family


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="families, or parts of models' names; all where none is given")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    args = parser.parse_args()
    left_out = set(SUPPORTED) - {family_of(name) for name in MODELS}
    if left_out:
        print(f"no model of {', '.join(sorted(left_out))}", file=sys.stderr)
    quiet()
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads, float32, "
        f"{SEQUENCES} x {LENGTH} tokens, medians of {ROUNDS}, {datetime.now(UTC):%Y-%m-%d}, "
        f"load average before {os.getloadavg()[0]:.1f}\n\n{HEADER}",
        flush=True,
    )
    failed = [f"no model of {family}" for family in sorted(left_out)]
    start = time.perf_counter()
    for name in MODELS:
        if args.only and not any(part == family_of(name) or part.lower() in name.lower() for part in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(name, Path(folder), args.seed)
            except Exception as error:  # the other families are still of interest
                failed.append(f"{name}: {type(error).__name__}: {error}")
                continue
        print(row, flush=True)
        if row.worst >= LIMIT:
            failed.append(f"{name}: {row.worst:.2f}x, the limit is {LIMIT}x")
        gc.collect()
    print(f"\n{time.perf_counter() - start:.0f} s, load average after {os.getloadavg()[0]:.1f}; {len(failed)} failed")
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
