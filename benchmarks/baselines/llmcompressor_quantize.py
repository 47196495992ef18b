"""A checkpoint quantized by llm-compressor's GPTQ, W4A16 in groups of 128, as its examples of MoE models do it (every
expert sees every token; router and head stay): ``llmcompressor_quantize.py MODEL TOKENS OUT [RELEASE]``.

Run by reapc's Python it calls itself in llm-compressor's environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IGNORED = ("lm_head", "re:.*mlp.gate$")
SEQUENCES_AT_ONCE = 8


def quantize(model: Path, tokens: Path, out: Path, release: str = "0.13.0") -> None:
    """Writes the quantized checkpoint to the folder ``out``, in an environment that is made where it lacks."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "llmcompressor_env.py", release],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "INSIDE_LLMCOMPRESSOR": "1"}
    environment.pop("PYTHONPATH", None)
    paths = [path.absolute() for path in (model, tokens, out)]
    subprocess.run([made.stdout.strip(), Path(__file__), *paths], check=True, env=environment)


def inside(folder: str, tokens: str, out: str) -> None:
    """The same within llm-compressor's environment."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(tokens)["input_ids"].long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linearize_moe(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oneshot(
        model=model, processor=tokenizer, dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        max_seq_length=ids.shape[1], num_calibration_samples=len(ids), batch_size=SEQUENCES_AT_ONCE,
        shuffle_calibration_samples=False, moe_calibrate_all_experts=True,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=list(IGNORED)),
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def main() -> None:
    if os.environ.get("INSIDE_LLMCOMPRESSOR"):
        inside(*sys.argv[1:])
    else:
        model, tokens, out, *release = sys.argv[1:]
        quantize(Path(model), Path(tokens), Path(out), *release)


if __name__ == "__main__":
    main()
