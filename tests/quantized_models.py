"""Tiny quantized checkpoints as reapc's own drivers write them, and what the libraries make of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_model, make_tokens
from safetensors.torch import load_file, save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.cli.progress import make_progress
from reapc.formats import weights
from reapc.formats.weights import WeightFormat
from reapc.observe.reference import final_log_probs
from reapc.quantize import checkpoint as quantizer
from reapc.stream import StreamedModel, run_layers, states_of
from reapc.stream.tokens import Tokens

SHAPE = dict(
    num_hidden_layers=2, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[], tie_word_embeddings=False,
    hidden_size=64, moe_intermediate_size=32,
)  # fmt: skip


def fmt(name: str) -> WeightFormat:
    found = weights.parse(name)
    assert found is not None
    return found


@lru_cache(maxsize=1)
def held_out() -> Tokens:
    return make_tokens(3, 24, seed=7)


def source(folder: Path) -> Path:
    """A bf16 model of two MoE layers with an untied head."""
    return make_model(folder, dtype=torch.bfloat16, **SHAPE)


def quantized(original: Path, out: Path, name: str, method: str = "auto", export: str | None = None) -> Path:
    """``original`` in the format, by the tool that a build would call; AutoRound without tuning steps."""
    tokens, progress = make_tokens(8, 32), make_progress()
    if export is not None:
        from reapc.quantize import auto_round

        auto_round.quantize(original, out, fmt(name), tokens, progress, export=export, iters=0)
    else:
        iters = 0 if quantizer.writer_for(fmt(name), method).tool == "auto-round" else None
        quantizer.quantize(original, out, fmt(name), tokens, progress, method=method, iters=iters)
    return out


def library(jobs: list[tuple[str, Path | None]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """What ``library_reload.py`` says of each (kind, checkpoint), in one process."""
    save_file({"input_ids": torch.from_numpy(held_out().input_ids)}, folder / "ids.safetensors")
    request = [
        {"kind": kind, "folder": str(path), "ids": str(folder / "ids.safetensors"), "out": str(folder / f"{i}.st")}
        for i, (kind, path) in enumerate(jobs)
    ]
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parent / "library_reload.py"
    done = subprocess.run([sys.executable, script, folder / "request.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [load_file(job["out"]) for job in request]


def streamed(checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
    """Log-probabilities (sequences, length, vocabulary) of the held-out tokens by reapc's own streamed forward."""
    model = StreamedModel(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    states = states_of(model, held_out(), folder, "test")
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, make_progress())
    return torch.from_numpy(np.stack(list(final_log_probs(model, states))))


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL(a || b) in nats of log-probabilities."""
    return float((a.exp() * (a - b)).sum(-1).mean())


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint after ``change(tensors, config)``."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def same_as_library(checkpoint: Checkpoint, library: dict[str, torch.Tensor]) -> int:
    """How many linears hold exactly the library's weights, or those rounded to the dtype of its scales; AssertionError
    for any that does not."""
    for name, linear in checkpoint.packed.items():
        theirs, ours = library[name.removesuffix(".weight")].float(), checkpoint.tensor(name)
        scales = next(part for suffix, part in linear.parts.items() if "scale" in suffix)
        rounded = ours.to(checkpoint.stored_tensor(scales).dtype).float()
        assert torch.equal(theirs, ours) or torch.equal(theirs, rounded), name
    return len(checkpoint.packed)


# Schemes as they are published, with groups that tiny widths hold.
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8-block": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    "fp8": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}},
    },
    "ct-w4g32:experts": {  # Kimi-K2.5's
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}},
    },
    "gptq-w4g64": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
    "auto-round-w4g32": {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
    },
    "nvfp4": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}}},
    },
    "nvfp4:experts": {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
        "ignore": ["lm_head", "model.layers.*.self_attn*", "*.gate"],
    },
    "mxfp4:experts": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}  # fmt: skip


def packed_copy(plain: Path, out: Path, scheme: dict[str, Any]) -> Path:
    """A copy of a 16 bit checkpoint, rounded to nearest into the packing that the ``scheme`` states; a scale of
    activations beside each linear of NVFP4, as published."""
    from reapc.arch import model_spec
    from reapc.checkpoint.packed import find_packed
    from reapc.formats.layout import tensors_of
    from reapc.formats.quantization import quantization_of
    from reapc.rehearse.packed import encode_all

    def pack(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] = scheme
        rules = quantization_of(config, "config.json")
        assert rules is not None
        for tensor, group in tensors_of(model_spec(config), mtp=True):
            found = find_packed(tensor, group, rules, {}, "config.json")
            if found is None or tensor.name not in tensors:
                continue
            weight = tensors.pop(tensor.name)
            for key, value in encode_all(weight, found.linear).items():
                name = found.linear.parts.get(key) or f"{tensor.module}.{key}"  # g_idx, which may be left out
                tensors[name] = value.contiguous()
                if key.endswith("weight_scale_2"):
                    tensors[name.replace("weight_scale_2", "input_scale")] = torch.tensor([0.5])

    return changed(plain, out, pack)
