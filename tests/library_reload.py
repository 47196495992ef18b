"""The quantizers' own loaders and packers, in a process of their own: they patch transformers and torch.

``python library_reload.py REQUEST.json``: a list of jobs {"kind", "folder", "out"}; each leaves ``out``, a safetensors
file with "log_probs" and the linears' weights as the library sees them, by module. AutoRound and GPTQModel patch
transformers when they are imported: what is to be loaded without them comes first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", GPTQMODEL_CPU_WORKERS="2")

import torch
from safetensors.torch import load_file, save_file


def log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


def unfused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by module; fused experts (E, 2I, H) and (E, H, I) one by one."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith("experts.gate_up_proj"):
            path = name.removesuffix(".gate_up_proj")
            for e, both in enumerate(tensor):
                found[f"{path}.{e}.gate_proj"], found[f"{path}.{e}.up_proj"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('.down_proj')}.{e}.down_proj": part for e, part in enumerate(tensor)}
        elif name.endswith(".weight"):
            found[name.removesuffix(".weight")] = tensor
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def packed_linears(model: Any) -> dict[str, torch.Tensor]:
    """The weight that a packed linear multiplies with: its answer to the unit vectors, (out, in)."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            rows = module.qweight.shape[0] * 32 // module.bits
            with torch.no_grad():
                found[name] = module(torch.eye(rows, dtype=module.scales.dtype)).t().contiguous()
    return found


def transformers(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """from_pretrained, refused where its loading info names a key."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return {"log_probs": log_probs(model, ids), **unfused(dict(model.named_parameters())), **packed_linears(model)}


def plain(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """from_pretrained as people call it, whatever its loading info says: ``missing`` counts what it says."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if "experts" in name]
    result = {"log_probs": log_probs(model, ids), "missing": torch.tensor(len(missing))}
    return result | unfused(dict(model.named_parameters()))


def gptqmodel(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQModel.load; its torch kernel computes in 16 bit at most."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    weights = {
        name: module.dequantize_weight().t().contiguous()
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    return {"log_probs": log_probs(model.model, ids), **weights}


def auto_round_packs(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear packed by AutoRound's own module in every width, and the weight that the module then computes with."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    rows, columns, group, found = 96, 128, 32, {}
    for bits in range(2, 9):
        linear = torch.nn.Linear(columns, rows, bias=False)
        scales = torch.rand(rows, columns // group) * 0.01 + 0.005
        module = QuantLinear(bits, group, columns, rows, False)
        module.pack(linear, scales, 1 << (bits - 1))
        with torch.no_grad():
            found[f"{bits}.weight"] = module(torch.eye(columns, dtype=torch.float16)).t().contiguous()
        found |= {f"{bits}.{part}": getattr(module, part).contiguous() for part in ("qweight", "qzeros", "scales")}
    return found


def auto_round_saves(folder: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """AutoRound run as its manual says, without reapc: ``folder``/source to /auto_round, with the attention and the
    second layer's experts in other widths, and to /llm_compressor."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"0": 0}, unk_token="0")))
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    mixed = {"self_attn": {"bits": 8}, "layers.1.mlp.experts": {"bits": 3}}
    for export, widths in {"auto_round": mixed, "llm_compressor": None}.items():
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/source", dtype=torch.bfloat16)
        AutoRound(
            model, tokenizer, bits=4, group_size=32, sym=True, iters=0, nsamples=len(data), seqlen=ids.shape[1],
            dataset=data, enable_torch_compile=False, layer_config=widths,
        ).quantize_and_save(f"{folder}/{export}", format=export)  # fmt: skip
    return {}


KINDS = {f.__name__: f for f in (transformers, plain, gptqmodel, auto_round_packs, auto_round_saves)}


def main() -> None:
    torch.manual_seed(0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        ids = load_file(job["ids"])["input_ids"].long() if "ids" in job else torch.empty(0)
        save_file(KINDS[job["kind"]](job.get("folder", ""), ids), job["out"])


if __name__ == "__main__":
    main()
