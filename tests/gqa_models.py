"""Tiny models of the plain grouped-query families, every flag of theirs set: as transformers saves them, mended to what
is published, and as llama.cpp's converter reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from mla_models import mtp_tensors

from reapc.arch import model_spec
from reapc.arch.spec import ModelSpec
from reapc.toolchain import require

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "vocab_size": 320,
    "max_position_embeddings": 512, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.0] * 8, "long_mscale": 1.2,
    "short_mscale": 1.2, "original_max_position_embeddings": 128,
}  # fmt: skip
DEEPSTACK = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 40, "projector_input_dim": 40, "projector_output_dim": 40,
    "num_channels": 3, "pixel_shuffle_ratio": 0.5,
}  # fmt: skip


def _text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "model_type": model_type, **changes}


TINY: dict[str, dict[str, Any]] = {
    "qwen2_moe": _text(
        "qwen2_moe", architectures=["Qwen2MoeForCausalLM"], num_experts=6, shared_expert_intermediate_size=48,
        qkv_bias=True,
    ),
    "qwen2_moe dense": _text(
        "qwen2_moe", architectures=["Qwen2MoeForCausalLM"], num_experts=6, shared_expert_intermediate_size=48,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": _text(
        "qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=6, attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3_moe dense": _text(
        "qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=6, mlp_only_layers=[1],
    ),
    "qwen3_moe step": _text(
        "qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=6, decoder_sparse_step=2,
    ),
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        # The class's default for the text part is tied; the whole says otherwise, and counts.
        "text_config": _text(
            # 2 x 40 differs from 64: transformers tells by the shape whether it is transposed
            "qwen3_vl_moe_text", num_experts=6, tie_word_embeddings=True, moe_intermediate_size=40,
        ),
        "vision_config": DEEPSTACK, "tie_word_embeddings": False,
    },
    "glm4_moe": _text(
        "glm4_moe", architectures=["Glm4MoeForCausalLM"], n_routed_experts=6, n_shared_experts=2,
        first_k_dense_replace=1, use_qk_norm=True, attention_bias=True, n_group=2, topk_group=1,
        num_nextn_predict_layers=1,
    ),
    "glm4_moe plain": _text(
        "glm4_moe", architectures=["Glm4MoeForCausalLM"], n_routed_experts=6, n_shared_experts=1,
        first_k_dense_replace=2, num_nextn_predict_layers=0,
    ),
    "minimax_m2": _text(
        "minimax_m2", architectures=["MiniMaxM2ForCausalLM"], num_local_experts=6, intermediate_size=32,
        use_qk_norm=True, qk_norm_type="per_layer", attn_type_list=[1, 1, 1], num_mtp_modules=3, rotary_dim=8,
    ),
    "mixtral": _text("mixtral", architectures=["MixtralForCausalLM"], num_local_experts=6, sliding_window=8),
    "phimoe": _text(
        "phimoe", architectures=["PhiMoEForCausalLM"], num_local_experts=6, attention_bias=True, lm_head_bias=True,
        original_max_position_embeddings=128, rope_scaling=LONGROPE,
    ),
    "phimoe plain": _text(
        "phimoe", architectures=["PhiMoEForCausalLM"], num_local_experts=6, original_max_position_embeddings=128,
    ),
    "olmoe": _text("olmoe", architectures=["OlmoeForCausalLM"], num_experts=6, num_key_value_heads=4),
    "ernie4_5_moe": _text(
        "ernie4_5_moe", architectures=["Ernie4_5_MoeForCausalLM"], moe_num_experts=6, moe_k=2,
        moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1,
        tie_word_embeddings=True,
    ),
    "granitemoe": _text(
        "granitemoe", architectures=["GraniteMoeForCausalLM"], num_local_experts=6, intermediate_size=32,
        head_dim=None, tie_word_embeddings=True,
    ),
    "gpt_oss": _text(
        "gpt_oss", architectures=["GptOssForCausalLM"], num_local_experts=6, sliding_window=8, intermediate_size=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "llama4": {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "vision_config": TOWER,
        "text_config": _text(
            "llama4_text", num_local_experts=6, num_hidden_layers=4, intermediate_size_mlp=80,
            interleave_moe_layer_step=2, attention_chunk_size=64, num_experts_per_tok=1, rope_scaling=LLAMA3,
        ),
        "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    name: {key: value for key, value in config.items() if value is not None} for name, config in TINY.items()
}  # fmt: skip


def transformers_model(config: dict[str, Any]) -> Any:
    """transformers' model of ``config``, on the device that is current."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    kept = {k: v for k, v in deepcopy(config).items() if not k.startswith("_") and k != "quantization_config"}
    auto = AutoModelForImageTextToText if "vision_config" in kept else AutoModelForCausalLM
    return auto.from_config(CONFIG_MAPPING[kept["model_type"]].from_dict(kept))


def save(config: dict[str, Any], folder: Path) -> None:
    """The model as transformers saves it, under the published config."""
    import torch

    transformers_model(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def publish(config: dict[str, Any], folder: Path) -> None:
    """Makes the saved checkpoint what is published: MTP layers beside it, which transformers has not, and Qwen3-VL's
    experts transposed (transformers 5.23 reads them so and saves them as it computes)."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    if config["model_type"] == "qwen3_vl_moe":
        tensors = load_file(file)
        turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
        save_file(turned, file, metadata={"format": "pt"})
    if mtp := mtp_tensors(model_spec(config)):
        zeros = {tensor.name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in mtp}
        save_file(zeros, folder / "model-mtp.safetensors", metadata={"format": "pt"})


def pack_experts(folder: Path, out: Path) -> None:
    """gpt-oss as published: each expert matrix as MXFP4 blocks (E, out, in/32, 16) and scales (E, out, in/32)."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = tensor.shape
            packed[f"{name}_blocks"] = torch.zeros((experts, rows, inner // 32, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.zeros((experts, rows, inner // 32), dtype=torch.uint8)
        else:
            packed[name] = tensor
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})


def gguf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What the spec says the converter writes, MTP layers and extras included."""
    found = {part.name: part.shape for part in spec.gguf_extra}
    groups = [("", group) for group in (*spec.outer, *spec.mtp_outer)]
    layers = (*spec.layers, *spec.mtp_layers)
    groups += [(f"blk.{layer.index}.", group) for layer in layers for group in layer.kind.tensors]
    for prefix, group in groups:
        for part in group.gguf:
            assert prefix + part.name not in found
            found[prefix + part.name] = part.with_axes(spec.num_experts)
    return found


def convert(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What llama.cpp's converter makes of each: {"tensors": {name: [shape, type]}, "arch"} (one process for all)."""
    script = Path(__file__).with_name("gguf_converter.py")
    command = [sys.executable, "-P", str(script), str(require("convert").parent), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr[-2000:]
    return {name: json.loads(line) for name, line in zip(folders, lines, strict=True)}
