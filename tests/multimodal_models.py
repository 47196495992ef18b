"""Tiny gpt-oss, Qwen3-VL-MoE and Llama-4: their configs, saved by transformers and read by llama.cpp's converter."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 4, "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **COMMON, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "intermediate_size": 96,
    "num_local_experts": 6, "attention_bias": True, "sliding_window": 8, "tie_word_embeddings": False,
    "pad_token_id": 0, "eos_token_id": 2, "hidden_act": "silu",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip
QWEN3_VL: dict[str, Any] = {
    "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": {
        **COMMON, "model_type": "qwen3_vl_moe_text", "intermediate_size": 96, "moe_intermediate_size": 40,
        "num_experts": 6, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "hidden_act": "silu",
    },
    "vision_config": {
        "model_type": "qwen3_vl_moe", "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "in_channels": 3, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
MAVERICK: dict[str, Any] = {
    "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "tie_word_embeddings": False,
    "text_config": {
        **COMMON, "model_type": "llama4_text", "intermediate_size": 40, "intermediate_size_mlp": 96,
        "num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
        "hidden_act": "silu", "pad_token_id": 0, "rope_scaling": None,
    },
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 40, "projector_input_dim": 40,
        "projector_output_dim": 40, "num_channels": 3, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip
SCOUT: dict[str, Any] = deepcopy(MAVERICK)
SCOUT["text_config"] |= {
    "interleave_moe_layer_step": 1,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
# name -> (config, its name in llama.cpp)
TINY: dict[str, tuple[dict[str, Any], str]] = {
    "gpt-oss": (GPT_OSS, "gpt-oss"),
    "qwen3-vl": (QWEN3_VL, "qwen3vlmoe"),
    "maverick": (MAVERICK, "llama4"),
    "scout": (SCOUT, "llama4"),
}


def is_vision(name: str) -> bool:
    return any(part in name for part in ("visual.", "vision_model.", "multi_modal_projector."))


def save(config: dict[str, Any], folder: Path) -> None:
    """The checkpoint as published ones look.

    transformers 5.23 saves Qwen3-VL's experts as it computes; the published ones are transposed: its own
    conversion_mapping transposes them on reading, and the dump of Qwen3-VL-30B says gate_up_proj [128, 2048, 1536].
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config)))
    model.to(torch.bfloat16).save_pretrained(folder)
    if config["model_type"] == "qwen3_vl_moe":
        file = folder / "model.safetensors"
        tensors = {
            name: (tensor.transpose(1, 2) if ".experts." in name else tensor).contiguous()
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def run_converter(tree: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """What llama.cpp's converter makes of each folder (one process for all: it loads torch once)."""
    script = Path(__file__).with_name("gguf_converter.py")
    command = [sys.executable, "-P", str(script), str(tree), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr[-2000:]
    return [json.loads(line) for line in lines]
