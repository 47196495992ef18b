"""Header-only GGUF files for llama-quantize: real shapes, no data (the file is sparse), metadata as the loader wants.

The KV heads per layer come from config.json by what each converter does, not from reapc's own rules.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from reapc.arch.spec import ModelSpec
from reapc.formats import gguf as formats
from reapc.toolchain import require

DRY_RUN = re.compile(r"\] (\S+) +- \[([\d, ]+)\], type = +(\w+), .*?(?:\((\w+)\))?$", re.M)
# Block and bytes of types that the gguf package does not have yet (ggml-common.h: a half and 64 or 128 packed weights).
NEW_TYPES = {"Q2_0": (64, 2 + 64 // 4), "Q1_0": (128, 2 + 128 // 8)}
TOTAL = re.compile(r"quant size  = +([\d.]+) MiB")


def _layer_types(config: dict[str, Any]) -> list[str]:
    return list(config.get("layer_types") or [])


def kv_heads(arch: str, config: dict[str, Any], blocks: int) -> list[int]:
    """``head_count_kv`` of every block as the converter of ``arch`` writes it (conversion/*.py)."""
    text = config.get("text_config") or config
    plain = int(text.get("num_key_value_heads") or text["num_attention_heads"])
    match arch:
        case "deepseek2" | "deepseek32" | "glm-dsa":
            return [1] * blocks
        case "kimi-linear" | "kimi-k3":
            full = set(text["linear_attn_config"]["full_attn_layers"])
            return [1 if i + 1 in full else 0 for i in range(blocks)]
        case "nemotron_h_moe":
            pattern = text.get("hybrid_override_pattern") or [
                {"attention": "*"}.get(kind, "-") for kind in text["layers_block_type"]
            ]
            return [plain if i >= len(pattern) or pattern[i] == "*" else 0 for i in range(blocks)]
        case "gemma4":
            wide = int(text.get("num_global_key_value_heads") or plain)
            return [plain if kind == "sliding_attention" else wide for kind in _layer_types(text)]
        case "mimo2":
            swa = int(text["swa_num_key_value_heads"])
            return [swa if kind == 1 else plain for kind in text["hybrid_layer_pattern"]] + [swa] * (
                blocks - len(text["hybrid_layer_pattern"])
            )
        case "step35":
            return [int(text.get("num_attention_groups") or plain)] * blocks
    return [plain] * blocks


def _metadata(writer: gguf.GGUFWriter, spec: ModelSpec, config: dict[str, Any], mtp: bool) -> None:
    """Every key that some loader insists on; llama-quantize reads those of its architecture."""
    arch, blocks = str(spec.gguf_arch), len(formats.blocks(spec, mtp))
    keys = gguf.Keys
    numbers = {
        keys.LLM.CONTEXT_LENGTH: 4096, keys.LLM.EMBEDDING_LENGTH: spec.hidden_size, keys.LLM.BLOCK_COUNT: blocks,
        keys.LLM.VOCAB_SIZE: spec.vocab_size, keys.LLM.EXPERT_COUNT: spec.num_experts,
        keys.LLM.EXPERT_USED_COUNT: min(spec.top_k, spec.num_experts), keys.LLM.EXPERT_SHARED_COUNT: 1,
        keys.LLM.EXPERT_FEED_FORWARD_LENGTH: spec.expert_intermediate_size, keys.LLM.EXPERT_GATING_FUNC: 2,
        keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: spec.expert_intermediate_size,
        keys.LLM.LEADING_DENSE_BLOCK_COUNT: 1, keys.LLM.INTERLEAVE_MOE_LAYER_STEP: 1,
        keys.LLM.NEXTN_PREDICT_LAYERS: blocks - spec.num_layers,
        keys.Attention.KEY_LENGTH: spec.head_dim, keys.Attention.VALUE_LENGTH: spec.head_dim,
        keys.Attention.KEY_LENGTH_SWA: spec.head_dim, keys.Attention.VALUE_LENGTH_SWA: spec.head_dim,
        keys.Attention.Q_LORA_RANK: 1536, keys.Attention.KV_LORA_RANK: 512, keys.Attention.SLIDING_WINDOW: 128,
        keys.Attention.KEY_LENGTH_MLA: 192, keys.Attention.VALUE_LENGTH_MLA: 128,
        keys.SSM.CONV_KERNEL: 4, keys.SSM.INNER_SIZE: 4096, keys.SSM.STATE_SIZE: 128, keys.SSM.TIME_STEP_RANK: 32,
        keys.SSM.GROUP_COUNT: 16, keys.LLM.EMBD_LENGTH_PER_LAYER_INP: 0,
        "{arch}.attention.indexer.head_count": 64, "{arch}.attention.indexer.key_length": 128,
        "{arch}.attention.indexer.top_k": 2048, "{arch}.attention.indexer.block_size": 128,
        "{arch}.attention.indexer.local_blocks": 1, "{arch}.kda.head_dim": 128, "{arch}.full_attention_interval": 4,
        "{arch}.attn_res.block_size": 4,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(key.format(arch=arch), value)
    writer.add_array(keys.Attention.HEAD_COUNT_KV.format(arch=arch), kv_heads(arch, config, blocks))
    writer.add_array(keys.Attention.HEAD_COUNT.format(arch=arch), [spec.num_heads] * blocks)
    writer.add_array(keys.LLM.FEED_FORWARD_LENGTH.format(arch=arch), [max(spec.dense_intermediate_size, 1)] * blocks)
    writer.add_array(keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=arch), [True] * blocks)
    writer.add_array(keys.Rope.DIMENSION_SECTIONS.format(arch=arch), [16, 24, 24, 0])
    for key in (keys.Attention.LAYERNORM_RMS_EPS, keys.Attention.LAYERNORM_EPS, keys.LLM.LOGIT_SCALE,
                keys.LLM.EXPERT_WEIGHTS_SCALE, keys.Rope.FREQ_BASE_SWA, "{arch}.activation.situ_beta",
                "{arch}.activation.situ_linear_beta"):  # fmt: skip
        writer.add_float32(key.format(arch=arch), 1.0)
    writer.add_bool(keys.LLM.EXPERT_WEIGHTS_NORM.format(arch=arch), True)
    writer.add_tokenizer_model("none")


def write_sparse(path: Path, spec: ModelSpec, config: dict[str, Any], mtp: bool = False) -> None:
    """What the converter would write with ``--outtype bf16``: the header, and a hole for the data."""
    writer = gguf.GGUFWriter(path, str(spec.gguf_arch))
    _metadata(writer, spec, config, mtp)
    data_bytes = 0
    for tensor in formats.tensor_types(spec, "BF16", False, mtp):
        kind = gguf.GGMLQuantizationType[tensor.type]
        # The writer takes shapes of the stored bytes for raw types, of elements otherwise.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.data_bytes, raw_dtype=kind)
        data_bytes += -(-tensor.data_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + data_bytes)


def write_small_imatrix(path: Path) -> None:
    """An importance matrix of one row: enough for ``--dry-run``, which only asks whether there is one."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["ones"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(*arguments: object) -> str:
    """What llama-quantize prints; it must succeed."""
    command = [str(require("quantize")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


def dry_run(model: Path, ftype: str, imatrix: Path | None = None) -> tuple[dict[str, tuple[str, int]], float]:
    """Name -> (type, bytes) of every tensor, and the total in MiB (two decimals)."""
    printed = quantize("--dry-run", *(["--imatrix", imatrix] if imatrix else []), model, ftype)
    found = {}
    for name, shape, before, after in DRY_RUN.findall(printed):
        kind = (after or before).upper()
        block, size = NEW_TYPES.get(kind) or gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        elements = 1
        for count in shape.split(","):
            elements *= int(count)
        found[name] = (kind, elements // block * size)
    total = TOTAL.search(printed)
    assert total, printed[-2000:]
    return found, float(total.group(1))
