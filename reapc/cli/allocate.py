"""``reapc allocate MODEL --scores SCORES --budget 3.0bpw``, or ``--target rtx3090``: how many experts, and which type
for which tensor."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from reapc.cli.choices import CRITERIA
from reapc.errors import ReapcError


@click.command("allocate")
@click.argument("model")
@click.option("--revision", help="Revision of a hub model.")
@click.option(
    "--scores", "scores_file", type=click.Path(path_type=Path), help="From `reapc observe`; without: a prior."
)
@click.option("--target", "target_name", help="A target in the place of --budget: `reapc targets` lists them.")
@click.option("--engine", type=click.Choice(["auto", "llama.cpp", "vllm"]), default="auto", show_default=True,
              help="With --target: who serves.")  # fmt: skip
@click.option("--context", type=click.IntRange(16), default=4096, show_default=True, help="With --target.")
@click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="With --target.")
@click.option("--kv-cache", type=click.Choice(["native", "auto", "f16", "bf16", "q8_0", "q4_0", "fp8"]),
              default="auto", show_default=True, help="With --target; auto: chosen along.")  # fmt: skip
@click.option("--method", type=click.Choice(["auto", "auto_round", "gptq", "fp8"]), default="auto", show_default=True,
              help="For vLLM: who writes the checkpoint.")  # fmt: skip
@click.option(
    "--budget",
    help="Bytes of the file's tensors, as 12GB; or 3.0bpw: that for each of MODEL's expert weights, the rest at Q8_0.",
)  # fmt: skip
@click.option("--tokens", type=click.Path(path_type=Path), help="safetensors with input_ids to measure KL on.")
@click.option("--sequences", type=click.IntRange(1), default=32, show_default=True, help="Of --tokens, at most.")
@click.option("--max-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True,
              help="Share of experts that may be dropped.")  # fmt: skip
@click.option("--criterion", type=click.Choice(CRITERIA), default="reap", show_default=True)
@click.option("--dissolve-groups", is_flag=True, help="As in `reapc prune`.")
@click.option("--types", help="GGUF types that may be chosen, as Q8_0,Q6_K,Q4_K,Q3_K,Q2_K. Default: 13 of them.")
@click.option("--segments", type=click.IntRange(1), default=1, show_default=True,
              help="With --tokens: probe the experts in so many runs of layers.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(0, 3), default=3, show_default=True,
              help="With --tokens: chosen mixes that are built and measured.")  # fmt: skip
@click.option("--pre-tokenizer", help="llama.cpp's pre-tokenizer, when it does not know the model's.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the probes; kept: the next budget reuses it.")
@click.option("--out", type=click.Path(path_type=Path), help="The allocation file to write, for `reapc quantize`.")
@click.option("--json", "as_json", is_flag=True, help="Print the allocation as JSON.")
def command(
    model: str,
    revision: str | None,
    scores_file: Path | None,
    target_name: str | None,
    engine: str,
    context: int,
    concurrency: int,
    kv_cache: str,
    method: str,
    budget: str | None,
    tokens: Path | None,
    sequences: int,
    max_ratio: float,
    criterion: str,
    dissolve_groups: bool,
    types: str | None,
    segments: int,
    rounds: int,
    pre_tokenizer: str | None,
    work: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the number of experts and every tensor's GGUF type together, with the least predicted KL under a budget;
    with --target also the KV cache, and for vLLM the width of every part of every layer.

    With --scores (observed with second moments) the rounding errors are measured (with ggml's own quantizer for GGUF);
    with --tokens as well, what they cost is measured (in llama.cpp on real files; for vLLM in a streamed pass), and so
    is the choice. MODEL alone is decided by the planner's prior, from its config.json.
    """
    if (budget is None) == (target_name is None):
        raise ReapcError("give one of --budget and --target", hint="--budget 3.0bpw, or --target rtx3090")
    if tokens is not None and scores_file is None:
        raise ReapcError("--tokens without --scores", hint="`reapc observe MODEL --out scores.safetensors` writes them")
    if out is not None and out.exists():
        raise ReapcError(f"{out}: exists already", hint="remove it or choose another name")
    asked = _Asked(
        model, revision, scores_file, tokens, sequences, max_ratio, criterion, dissolve_groups,
        tuple(part.strip().upper() for part in types.split(",")) if types else None, segments, rounds, pre_tokenizer,
        work or Path(f"{out or 'allocation'}.work"),
    )  # fmt: skip
    if target_name is None:
        if (engine, method) != ("auto", "auto") and engine != "llama.cpp":
            raise ReapcError("--engine and --method need --target: vLLM's budget is a card's", hint="--target rtx3090")
        assert budget is not None
        summary = _under_budget(asked, budget)
    else:
        serve = {"engine": engine, "context": context, "concurrency": concurrency, "kv_cache": kv_cache}
        summary = _on_target(asked, target_name, serve, method)
    from reapc.checkpoint.atomic import write_text

    if out is not None:
        write_text(out, json.dumps(summary, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _show(summary)


@dataclass(frozen=True)
class _Asked:
    """The options of both kinds of question."""

    model: str
    revision: str | None
    scores_file: Path | None
    tokens: Path | None
    sequences: int
    max_ratio: float
    criterion: str
    dissolve: bool
    types: tuple[str, ...] | None
    segments: int
    rounds: int
    pre_tokenizer: str | None
    work: Path

    @property
    def facts(self) -> dict[str, Any]:
        return {"model": self.model, "criterion": self.criterion, "dissolve_groups": self.dissolve}

    def opened(self) -> tuple[Any, Any, Any]:
        """Spec, and checkpoint and scores where there are scores."""
        from reapc.arch import known, load_config, model_spec

        if self.scores_file is None:
            name = None if Path(self.model).is_dir() else known.find(self.model)
            return (known.spec(name) if name else model_spec(load_config(Path(self.model)))), None, None
        from reapc.checkpoint.reader import Checkpoint
        from reapc.checkpoint.source import fetch
        from reapc.observe.scores import load_scores
        from reapc.prune.rewrite import check_scores

        checkpoint = Checkpoint(fetch(self.model, self.revision, Path(".")))
        scores = load_scores(self.scores_file)
        check_scores(scores, checkpoint, self.scores_file)
        return checkpoint.spec, checkpoint, scores


def _under_budget(asked: _Asked, budget: str) -> dict[str, Any]:
    """A GGUF file of so many bytes."""
    from reapc.allocate.allocation import budget_bytes, decide
    from reapc.allocate.record import allocation_json
    from reapc.planner.question import kept_counts
    from reapc.planner.tensor_groups import LADDER, file_parts

    spec, checkpoint, scores = asked.opened()
    size = budget_bytes(budget, spec, file_parts(spec, asked.types or LADDER))
    counts = kept_counts(spec, max_ratio=asked.max_ratio, dissolve_groups=asked.dissolve)
    damages, prober = _of_gguf(asked, spec, checkpoint, scores, counts)
    facts = asked.facts | ({"digest": checkpoint.digest} if checkpoint else {})
    return allocation_json(damages, spec, size, decide(damages, size, prober, asked.rounds), facts)


def _on_target(asked: _Asked, name: str, serve: dict[str, Any], method: str) -> dict[str, Any]:
    """For the devices of a target, with the engine that the planner chooses there."""
    from reapc.allocate.on_target import Observed, OnTarget
    from reapc.cli.progress import make_progress
    from reapc.recipe import ServeSection
    from reapc.target import load_target

    spec, checkpoint, scores = asked.opened()
    section = ServeSection.model_validate(serve)
    made = OnTarget(asked.model, spec, load_target(name), section, asked.max_ratio, asked.dissolve)
    facts = asked.facts | ({"digest": checkpoint.digest} if checkpoint else {})
    if made.engine == "vllm":
        if asked.types is not None:
            raise ReapcError(
                "--types names GGUF types, and vLLM serves here", hint="--engine llama.cpp, or leave it out"
            )
        observed = None
        if checkpoint is not None:
            checkpoint.refuse_quantized("an allocation")
            observed = Observed(checkpoint, scores, asked.tokens, asked.sequences, asked.work, make_progress())
        return made.for_vllm(facts, observed, method, asked.criterion, asked.segments, asked.rounds)
    if method != "auto":
        raise ReapcError(f"--method {method} is for vLLM, and llama.cpp serves here", hint="--engine vllm")
    damages, prober = _of_gguf(asked, spec, checkpoint, scores, made.question.counts)
    return made.for_llamacpp(facts, damages, prober, asked.rounds)


def _of_gguf(asked: _Asked, spec: Any, checkpoint: Any, scores: Any, counts: tuple[int, ...]) -> tuple[Any, Any]:
    """Damages of a GGUF file's types, and what measures mixes where there are tokens. ``work`` keeps the unquantized
    GGUF and the probes."""
    from reapc.allocate.allocation import measured, prior_only, prober_of
    from reapc.checkpoint.atomic import make_folder, require_room
    from reapc.cli.progress import make_progress
    from reapc.planner.tensor_groups import LADDER
    from reapc.quantize import gguf
    from reapc.stages import digest_of

    types = asked.types or LADDER
    if checkpoint is None:
        return prior_only(spec, counts, types), None
    progress = make_progress()
    identity = digest_of([checkpoint.digest, scores.header.get("observed")])
    folder = asked.work / identity[:16]
    make_folder(folder)
    base = folder / "base.gguf"
    if not base.is_file():
        require_room(folder, 5 * spec.parameters, "the unquantized GGUF and the probes")
        gguf.convert(checkpoint.folder, base, "bf16", asked.pre_tokenizer, log=progress.log)
    prober = None
    if asked.tokens is not None:
        threads = os.cpu_count() or 1
        prober = prober_of(base, asked.tokens, asked.sequences, scores, spec, folder, progress, threads)
    damages = measured(
        spec, base, scores, counts, asked.criterion, progress, prober=prober, dissolve=asked.dissolve, types=types,
        segments=asked.segments,
    )  # fmt: skip
    return damages, prober


def _show(found: dict[str, Any]) -> None:
    from reapc.planner.devices import cache_name
    from reapc.units import format_bytes

    proof, source = found["certificate"], found["predicted"]["source"]
    said = {"measured": "measured", "errors": "rounding errors measured, their cost from the prior", "prior": "prior"}
    budget = f" of {format_bytes(found['budget_bytes'])}" if found["budget_bytes"] else ""
    if "uniform" in found:
        uniform = found["uniform"]
        click.echo(
            f"{found['engine']} on {found['target']}; chosen uniformly: {uniform['format']} with {uniform['experts']} "
            f"experts and {cache_name(uniform['kv_dtype'])}, predicted KL {uniform['predicted_kl']:.4f}"
        )
    click.echo(
        f"{found['experts']} of {found['num_experts']} experts ({found['criterion']}), "
        f"{format_bytes(found['data_bytes'])}{budget}; the experts' weights at "
        f"{found['bits_per_kept_expert_weight']:.2f} bits, "
        f"{found['bits_per_original_expert_weight']:.2f} per original weight"
    )
    click.echo(
        f"predicted KL {found['predicted_kl']:.4f} ({said[source]}): rounding {found['predicted']['rounding']:.4f}, "
        f"pruning {found['predicted']['pruning']:.4f}"
        + (f", {cache_name(found['kv_dtype'])} {found['predicted']['kv_cache']:.4f}" if found["kv_dtype"] else "")
    )
    for row in found["measured"]:
        click.echo(
            f"built with {row['experts']} experts: KL {row['measured_kl']:.4f}, {row['predicted_kl']:.4f} predicted"
        )
    cases = "expert counts and KV types" if found["kv_dtype"] else "expert counts"
    click.echo(
        f"certificate: of {proof['counts_compared']} {cases} none can be predicted below "
        f"{proof['lower_bound']:.6f}; the best found is {proof['best_predicted_kl']:.6f} "
        f"({proof['relative_gap']:.2%} above, {proof['proved_by']})"
    )
    for row in found["runners_up"]:
        cache = f", {cache_name(row['kv_dtype'])}" if row["kv_dtype"] else ""
        size = format_bytes(row["data_bytes"])
        click.echo(f"next: {row['experts']} experts, {size}{cache}, KL {row['predicted_kl']:.4f}")
    for part, counts in _by_part(found).items():
        click.echo(f"{part}: " + ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()))
    if "methods" in found:
        others = ", ".join(f"{method} {loss:.4f}" for method, loss in found["methods"].items())
        click.echo(f"predicted KL by method: {others}; reapc quantize --allocation writes it")


def _by_part(found: dict[str, Any]) -> dict[str, Counter[str]]:
    """How many tensors (or, for vLLM, layers) of each class have which type."""
    from reapc.planner.tensor_groups import part_of

    result: dict[str, Counter[str]] = {}
    if found["engine"] == "vllm":
        for unit, kind in found["groups"].items():
            result.setdefault(unit.rpartition(".")[2], Counter())[kind] += 1
    else:
        for tensor, kind in found["types"].items():
            result.setdefault(part_of(tensor), Counter())[kind] += 1
    return result
