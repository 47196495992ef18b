"""One contender of ``llm_compressor.py`` or ``baselines/`` in a process of its own: ``python contenders.py JOB.json``.

Runs in reapc's environment or in llm-compressor's, so nothing of either is imported before it is known which.
Imports stand before the baseline of memory; loading counts for memory, and for time where it is part of the pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peak import peak_of, status_bytes

Job = dict[str, Any]
Found = dict[str, Any]


def read_ids(job: Job) -> Any:
    """Token ids (sequences, length) int64; only the first ones where the job says so."""
    from safetensors.torch import load_file

    return load_file(job["tokens"])["input_ids"].long()[: job.get("sequences")]


def clocked(found: Found, name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` gives; its seconds go to ``found[name]``, and those of all threads to ``found["cpu_" + name]``."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    found[name] = time.perf_counter() - start
    found[f"cpu_{name}"] = time.process_time() - cpu
    return result


def plain(job: Job, found: Found) -> Callable[[], None]:
    """transformers' decoder over the tokens, without cache and logits."""
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from transformers import AutoModelForCausalLM

    ids = read_ids(job)

    def work() -> None:
        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()

        model = clocked(found, "load_seconds", load)
        model.set_experts_implementation(job["experts"])

        def forward() -> None:
            with torch.inference_mode():
                for batch in ids.split(job["batch"]):
                    model.model(batch, use_cache=False)

        clocked(found, "seconds", forward)

    return work


def reapc(job: Job, found: Found) -> Callable[[], None]:
    """``observe``: reads the weights from disk while it runs. "Loading" is opening the checkpoint and hashing it."""
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from reapc.checkpoint.reader import Checkpoint
    from reapc.observe.observe import observe
    from reapc.progress import Silent
    from reapc.stream.tokens import read_tokens

    def opened() -> Checkpoint:
        checkpoint = Checkpoint(Path(job["folder"]))
        checkpoint.digest  # noqa: B018 - computed once
        return checkpoint

    def work() -> None:
        checkpoint = clocked(found, "load_seconds", opened)
        tokens = read_tokens(Path(job["tokens"]), checkpoint.spec.vocab_size)
        folder = Path(job["work"])
        run = lambda: observe(checkpoint, tokens, folder, Silent(), moments=job["moments"])  # noqa: E731
        scores = clocked(found, "seconds", run)
        layers = [scores.layer(index) for index in scores.layers]
        found["reap"] = [layer["reap"].tolist() for layer in layers]

    return work


def a_processor() -> Any:
    """llm-compressor wants one, and asks it nothing: the tokens are given."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, "?")), unk_token="?")


def llmcompressor(job: Job, found: Found) -> Callable[[], None]:
    """``oneshot`` with REAPPruningModifier as its example (examples/reap_expert_pruning/reap_qwen3_30b.py) calls it:
    routed tokens only. The experts are taken apart before and not within the pass, which would do it otherwise (its
    ``load_context`` does it while loading, and fails without torchvision). Nothing is saved. With ``propagate`` false
    it does not run a layer again after pruning it, which is not what it does by default."""
    import torch
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from llmcompressor.modifiers.pruning.reap import utils
    from transformers import AutoModelForCausalLM

    ids = read_ids(job)
    # Scores are thrown away once a layer is decided: they are noted on the way, layer after layer.
    reap: list[list[float]] = []
    kept: list[list[int]] = []
    decide = utils.REAPSaliencyTracker.compute_retained_experts

    def noted(tracker: Any, *args: Any) -> Any:
        decided = decide(tracker, *args)
        reap.append(tracker.mean_saliency.tolist())
        kept.append([int(expert) for expert in decided])
        return decided

    utils.REAPSaliencyTracker.compute_retained_experts = noted

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
        linearize_moe(model)
        return model

    def work() -> None:
        model = clocked(found, "load_seconds", load)
        dataset = Dataset.from_dict({"input_ids": ids.tolist()})

        def run() -> None:
            oneshot(
                model=model, processor=a_processor(), dataset=dataset, max_seq_length=ids.shape[1],
                num_calibration_samples=len(ids), batch_size=job["batch"], shuffle_calibration_samples=False,
                moe_calibrate_all_experts=False, propagate_error=job["propagate"],
                recipe=REAPPruningModifier(sparsity=job["sparsity"]),
            )  # fmt: skip

        clocked(found, "seconds", run)
        found.update(reap=reap, kept=kept)

    return work


def llmcompressor_gptq(job: Job, found: Found) -> Callable[[], None]:
    """``oneshot`` with GPTQModifier, W4A16 in groups of 128, as its examples of MoE models do it (every expert sees
    every token; router and head stay); the checkpoint is saved to the job's ``out``."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    ids = read_ids(job)

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
        linearize_moe(model)
        dataset = Dataset.from_dict({"input_ids": ids.tolist()})

        def run() -> None:
            oneshot(
                model=model, processor=a_processor(), dataset=dataset, max_seq_length=ids.shape[1],
                num_calibration_samples=len(ids), batch_size=job["batch"], shuffle_calibration_samples=False,
                moe_calibrate_all_experts=True,
                recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", "re:.*mlp.gate$"]),
            )  # fmt: skip

        clocked(found, "seconds", run)
        model.to(torch.bfloat16).save_pretrained(job["out"], save_compressed=True)

    return work


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    found: Found = {"torch": torch.__version__, "transformers": transformers.__version__}
    Path(job["work"]).mkdir(parents=True, exist_ok=True)
    contenders = (plain, reapc, llmcompressor, llmcompressor_gptq)
    work = {contender.__name__: contender for contender in contenders}[job["contender"]](job, found)
    found["anonymous_bytes"] = peak_of(work)
    found["high_water_bytes"] = status_bytes("VmHWM")
    Path(job["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
