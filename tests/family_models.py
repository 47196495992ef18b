"""Tiny random models of every family, written as published ones look, and transformers' own model of each to hold
against. The configs are those of the architecture tests: the real class, the real flags, small widths."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import gqa_models
import hybrid_models
import mla_models
import sliding_models
import torch
from mla_models import mtp_tensors

from reapc.arch import model_spec

CONFIGS: dict[str, dict[str, Any]] = {
    **gqa_models.TINY,
    **mla_models.TINY,
    **{name: config for name, (config, _) in hybrid_models.TINY.items()},
    **sliding_models.TINY,
}  # fmt: skip
# transformers 5.23 has no class of it
UNKNOWN = ("kimi-k3",)
NAMES = [name for name in CONFIGS if name not in UNKNOWN]


def transformers_model(name: str, config: dict[str, Any] | None = None) -> Any:
    """transformers' model of the config (of that name), random, fp32, attention as it chooses by itself."""
    config = deepcopy(config or CONFIGS[name])
    if name in mla_models.TINY:
        return mla_models.transformers_model(config)
    return sliding_models.transformers_model({**config, **sliding_models.OWN.get(name, {})})


def randomize(model: Any, seed: int) -> None:
    """Values that show every path: routers that differ, biases and scales that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in model.state_dict())]
    with torch.no_grad():
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() >= 2 and "e_score_correction_bias" not in name:
                fan = tensor.shape[-1] if tensor.dim() == 2 else max(tensor.shape[1:])
                tensor.copy_(noise * fan**-0.5)
            elif "norm" in name or name.endswith(("scale", "_scalar")):
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(0.1 * noise)
            tensor.copy_(tensor.to(torch.bfloat16).float())  # what a 16 bit checkpoint can hold
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                table = torch.argsort(torch.rand(buffer.shape[0], 6, generator=generator), dim=1)
                buffer.copy_(table[:, : buffer.shape[1]])


def make(name: str, folder: Path, seed: int = 0) -> Any:
    """Writes the checkpoint to ``folder``; returns transformers' model of the same weights, fp32, in eval mode."""
    from safetensors.torch import load_file, save_file

    config = CONFIGS[name]
    model = transformers_model(name).float()
    randomize(model, seed)
    deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if name == "kimi_k25":
        mla_models.mend_names(path)
        tensors = load_file(path)
    if config["model_type"] == "qwen3_vl_moe":
        tensors = {k: v.transpose(1, 2) if ".experts." in k else v for k, v in tensors.items()}
    if name == "qwen35moe":
        tensors = hybrid_models.fuse_experts(tensors, config["text_config"]["num_experts"])
    if name == "kimi-linear":  # transformers renames the dense layer's MLP too when it saves; the real one has mlp
        tensors = {key.replace("layers.0.block_sparse_moe", "layers.0.mlp"): value for key, value in tensors.items()}
    if name == "deepseek_v4":
        tensors = sliding_models.mended(tensors)
    spec = model_spec(config)
    wide = {
        t.name: g.dtype
        for layer in spec.layers
        for g in layer.kind.tensors
        if g.dtype
        for t in g.expand(f"{layer.prefix}.", spec.num_experts, 0)
    }
    for key, dtype in wide.items():
        tensors[key] = tensors[key].to(getattr(torch, dtype))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    if mtp := mtp_tensors(spec):
        noise = {t.name: torch.randn(t.shape).mul_(0.02).to(torch.bfloat16) for t in mtp}
        save_file(noise, folder / "model-mtp.safetensors", metadata={"format": "pt"})
        both = {key: "model.safetensors" for key in tensors} | {key: "model-mtp.safetensors" for key in noise}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": both}))
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()
