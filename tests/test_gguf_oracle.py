"""GGUF against llama.cpp itself: its converter for names, shapes and metadata, llama-quantize for types and bytes.

Real shapes of the catalogue. Files are sparse: only headers are written.
"""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
from gguf_files import dry_run, write_small_imatrix, write_sparse

from reapc.arch import known, model_spec
from reapc.arch.spec import ModelSpec
from reapc.errors import CannotBeDone
from reapc.formats import gguf as formats
from reapc.formats.gguf_sizes import sizes
from reapc.toolchain import require

# One model of every architecture that llama.cpp has, two where shapes differ much.
MODELS = (
    "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "Qwen/Qwen3.5-122B-A10B", "MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M3", "XiaomiMiMo/MiMo-V2-Flash",
    "allenai/OLMoE-1B-7B-0924", "baidu/ERNIE-4.5-21B-A3B-PT", "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2", "google/gemma-4-26B-A4B",
    "ibm-granite/granite-3.0-1b-a400m-instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "microsoft/Phi-3.5-MoE-instruct", "mistralai/Mixtral-8x7B-v0.1", "moonshotai/Kimi-K2.5", "moonshotai/Kimi-K3",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "openai/gpt-oss-120b",
    "stepfun-ai/Step-3.7-Flash", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.7-Flash", "zai-org/GLM-5", "zai-org/GLM-5.2",
)  # fmt: skip
FTYPES = {  # file type: with an importance matrix
    "Q8_0": False, "Q6_K": False, "Q5_K_M": False, "Q4_K_M": False, "Q4_K_S": True, "Q4_0": True, "IQ4_XS": False,
    "Q3_K_M": True, "Q2_K": False, "IQ3_XXS": True, "IQ3_XS": True, "IQ2_M": True, "IQ1_S": True, "MXFP4_MOE": False,
    "TQ1_0": False, "Q2_0": False, "Q1_0": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "ones.imatrix"
    write_small_imatrix(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_what_llama_quantize_says(name: str, imatrix: Path, tmp_path: Path) -> None:
    """Names, types and bytes of all tensors, and the total that the tool prints, for 17 file types."""
    spec = known.spec(name)
    mtp = bool(spec.mtp_layers)
    model = tmp_path / "model.gguf"
    write_sparse(model, spec, known.config(name), mtp)
    for ftype, has_imatrix in FTYPES.items():
        try:
            predicted = formats.tensor_types(spec, ftype, has_imatrix, mtp)
        except CannotBeDone:
            with pytest.raises(AssertionError, match="no tensor type fallback"):
                dry_run(model, ftype, imatrix if has_imatrix else None)
            continue
        actual, mebibytes = dry_run(model, ftype, imatrix if has_imatrix else None)
        assert {tensor.name: (tensor.type, tensor.data_bytes) for tensor in predicted} == actual, ftype
        total = sizes(spec, ftype, has_imatrix, mtp).tensors_bytes(spec.num_experts)
        assert sum(size for _, size in actual.values()) == total
        assert total / 2**20 == pytest.approx(mebibytes, abs=0.0051), ftype


def _small(name: str) -> tuple[ModelSpec, dict[str, Any]]:
    """The model with few experts (the converter is slow with many), unquantized, and its config."""
    config = {key: value for key, value in copy.deepcopy(known.config(name)).items() if not key.startswith("_")}
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    spec = known.spec(name)
    experts = max(4, spec.top_k)
    experts += -experts % max(spec.n_group, 1)
    for key in spec.expert_count_keys:
        *path, last = key.split(".")
        part = config
        for step in path:
            part = part[step]
        part[last] = experts
    spec = model_spec(config, name)
    return spec, {**config, **_published(name, spec)}


def _published(name: str, spec: ModelSpec) -> dict[str, Any]:
    """Keys that the converter asks for and that the catalogue's copies, made or trimmed by others, do not have."""
    match spec.family:
        case "minimax_m3":
            return {"architectures": ["MiniMaxM3SparseForCausalLM"]}
        case "mimo_v2_flash":
            rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334}
            return {"rope_parameters": rope}
        case "step3p7":
            types = known.config(name)["layer_types"] + ["full_attention"] * len(spec.mtp_layers)
            return {
                "model_type": "step3p5_published", "architectures": ["Step3p5ForCausalLM"],
                "num_attention_groups": spec.num_kv_heads,
                "moe_num_experts": spec.num_experts, "moe_top_k": spec.top_k,
                "partial_rotary_factors": [1.0 if kind == "sliding_attention" else 0.5 for kind in types],
            }  # fmt: skip
    return {}


def _write_checkpoint(folder: Path, spec: ModelSpec, config: dict[str, Any], mtp: bool) -> None:
    """A checkpoint of holes: config.json, and all tensors on disk in one sparse file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if spec.family == "gemma4":  # its converter counts the tokenizer's tokens
        tokens = {f"t{i}": i for i in range(spec.vocab_size)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    if not mtp:
        (folder / "no_mtp").touch()
    header, offset = {}, 0
    tensors = list(spec.tensors())
    for layer in spec.mtp_layers:
        for group in layer.kind.tensors:
            tensors += group.expand(f"{layer.prefix}.", spec.num_experts, layer.index)
    for group in spec.mtp_outer:
        tensors += group.expand("", spec.num_experts, None)
    for tensor in tensors:
        size = 2 * prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + offset)


CASES = [(name, mtp) for name in MODELS for mtp in (False, True)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[str, Any]]:
    """What the converter makes of every model: one process for all."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders, cases = [], []
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for number, (name, mtp) in enumerate(CASES):
        try:
            spec, config = _small(name)
        except Exception as error:  # one broken family must not hide the others
            found[(name, mtp)] = {"error": f"{type(error).__name__}: {error}"}
            continue
        if mtp and not spec.mtp_layers:
            continue
        _write_checkpoint(root / str(number), spec, config, mtp)
        folders.append(str(root / str(number)))
        cases.append((name, mtp))
    script = Path(__file__).with_name("gguf_converter.py")
    command = [sys.executable, "-P", str(script), str(require("convert").parent), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr[-2000:]
    return found | {case: json.loads(line) for case, line in zip(cases, lines, strict=True)}


@pytest.mark.parametrize(("name", "mtp"), CASES)
def test_the_converter_writes_these_tensors(
    name: str, mtp: bool, converted: dict[tuple[str, bool], dict[str, Any]]
) -> None:
    """Names, shapes and types of every tensor; blocks, experts and the heads that the rules look at."""
    if (name, mtp) not in converted:
        pytest.skip("no MTP layers")
    found = converted[(name, mtp)]
    assert "error" not in found, found["error"]
    spec = _small(name)[0]
    predicted = {t.name: [list(t.shape), t.type] for t in formats.tensor_types(spec, "BF16", False, mtp)}
    assert predicted == found["tensors"]
    heads, kv_heads = found["kv"]["attention.head_count"], found["kv"]["attention.head_count_kv"]
    heads = heads[0] if isinstance(heads, list) else heads
    kv_heads = kv_heads[0] if isinstance(kv_heads, list) else kv_heads or heads
    assert found["arch"] == spec.gguf_arch
    assert found["kv"]["expert_count"] == spec.num_experts
    assert found["kv"]["block_count"] == len(formats.blocks(spec, mtp))
    assert (heads // kv_heads if kv_heads else 0) == formats.heads_per_kv_head(spec)
