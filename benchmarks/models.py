"""Checkpoints of any size for benchmarks, written a layer at a time so that making them needs little memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from reapc.arch import model_spec


def make_checkpoint(
    folder: Path,
    *,
    hidden: int,
    width: int,
    layers: int,
    experts: int,
    top_k: int,
    vocab_size: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A random Qwen3-MoE checkpoint with one shard per layer."""
    folder.mkdir(parents=True)
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=experts, num_experts_per_tok=top_k,
        vocab_size=vocab_size, norm_topk_prob=True, tie_word_embeddings=True, mlp_only_layers=[],
        max_position_embeddings=4096,
    )  # fmt: skip
    data = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(data, indent=2))
    spec = model_spec(data)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for index in [None, *range(layers)]:
        name = "outer.safetensors" if index is None else f"layer-{index}.safetensors"
        tensors = spec.outer_tensors if index is None else spec.layer_tensors(index)
        arrays = {
            t.name: torch.ones(t.shape, dtype=dtype) if t.role == "norm" else torch.randn(t.shape, dtype=dtype) * 0.03
            for t in tensors
        }
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
    index_data = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_data))
    return folder
