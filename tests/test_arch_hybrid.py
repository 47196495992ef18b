"""Hybrid families (linear attention, Mamba) against transformers, published checkpoints and the real converter."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hybrid_models import KIMI3, LINEAR, NEMOTRON, NEXT, QWEN5, TINY, Shapes, fuse_experts
from safetensors.torch import load_file, save_file
from specs import changed
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from reapc.arch import ModelSpec, known, model_spec
from reapc.arch.spec import DTYPE_BYTES, TensorGroup
from reapc.errors import CannotBeDone, ReapcError
from reapc.quantize.gguf import convert
from reapc.toolchain import find_llamacpp

DEMO = Path(__file__).parents[1] / "demo" / "model"
QWEN_NEXT, QWEN35, QWEN36 = "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.6-35B-A3B"
KIMI, K3 = "moonshotai/Kimi-Linear-48B-A3B-Instruct", "moonshotai/Kimi-K3"
NANO, SUPER, ULTRA = (
    f"nvidia/NVIDIA-Nemotron-3-{size}" for size in ("Nano-30B-A3B-BF16", "Super-120B-A12B-FP8", "Ultra-550B-A55B-BF16")
)
# What their cards say is active, in billions, and how far off rounding and the embedding put it.
ACTIVE = {
    QWEN_NEXT: (3.5, 0.5), "Qwen/Qwen3-Next-80B-A3B-Thinking": (3.5, 0.5), "Qwen/Qwen3-Coder-Next": (3.5, 0.5),
    QWEN35: (3, 0.1), "Qwen/Qwen3.5-122B-A10B": (10, 1), "Qwen/Qwen3.5-397B-A17B": (17, 1), QWEN36: (3, 0.1),
    KIMI: (3, 0.2), NANO: (3.2, 0.05), SUPER: (12, 0.3), ULTRA: (55, 0.1), K3: (104, 0.3),
}  # fmt: skip


def mtp_tensors(spec: ModelSpec) -> Shapes:
    found = {t.name: t.shape for group in spec.mtp_outer for t in group.expand("", spec.num_experts, None)}
    for layer in spec.mtp_layers:
        for group in layer.kind.tensors:
            found |= {t.name: t.shape for t in group.expand(f"{layer.prefix}.", spec.num_experts, layer.index)}
    return found


def all_groups(spec: ModelSpec) -> list[tuple[TensorGroup, int]]:
    return list(spec.groups(mtp=True))


def tensor_count(spec: ModelSpec) -> int:
    return sum(n * (spec.num_experts if "{e}" in g.name else 1) for g, n in all_groups(spec))


def text_bytes(spec: ModelSpec) -> int:
    """Bytes on disk of everything but vision, MTP included."""
    return sum(g.parameters(spec.num_experts) * n * DTYPE_BYTES[g.dtype or spec.dtype] for g, n in all_groups(spec))


def role_of(name: str) -> str:
    """The role of a transformers parameter, by its name alone."""
    rules = (
        (r"visual\.", "vision"), (r"embed", "embedding"), (r"lm_head", "lm_head"), (r"\.experts\.", "expert"),
        (r"shared_expert", "shared_expert"), (r"(mlp|mixer)\.gate\.", "router"), (r"latent_proj", "other"),
        (r"norm", "norm"), (r"\.mlp\.|mixer\.(up|down)_proj", "dense_mlp"),
    )  # fmt: skip
    return next((role for pattern, role in rules if re.search(pattern, name)), "attention")


def transformers_model(config: dict[str, Any]) -> PreTrainedModel:
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config)))
    return model


@pytest.mark.parametrize("name", sorted(ACTIVE.keys() - {K3}))
def test_roles_and_active_parameters_equal_transformers(name: str) -> None:
    with torch.device("meta"):
        model = transformers_model(known.config(name))
    counts: Counter[str] = Counter()
    for key, tensor in model.state_dict().items():
        counts[role_of(key)] += tensor.numel()
    spec = known.spec(name)
    assert spec.vision_parameters == counts.pop("vision", 0)
    assert spec.parameters_by_role() == dict(counts)
    chosen = counts["expert"] * spec.top_k // spec.num_experts
    assert spec.active_parameters == counts.total() - counts["embedding"] - counts["expert"] + chosen


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_active_parameters_are_what_the_card_says(name: str) -> None:
    billions, tolerance = ACTIVE[name]
    assert known.spec(name).active_parameters / 1e9 == pytest.approx(billions, abs=tolerance)


# Parameters and tensors of the whole checkpoint, MTP and vision included. Sources: dumps of the headers in github
# gogongxt/python (Next, 3.5-35B, 3.6, Kimi-Linear); Hugging Face's counts as quoted on github (122B, 397B).
@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        (QWEN_NEXT, 81_324_862_720, 75_944),
        (QWEN35, 35_951_822_704, 1_811),
        (QWEN36, 35_951_822_704, 1_045),
        ("Qwen/Qwen3.5-122B-A10B", 125_086_497_008, None),
        ("Qwen/Qwen3.5-397B-A17B", 403_397_928_944, 2_924),
        (KIMI, 49_122_681_728, 20_493),
    ],
)
def test_whole_checkpoint_as_published(name: str, parameters: int, tensors: int | None) -> None:
    spec = known.spec(name)
    assert spec.parameters + spec.mtp_parameters + spec.vision_parameters == parameters
    vision = 27 * 12 + 9 if spec.vision_parameters else 0  # 12 in a block; pos_embed, patch_embed 2, merger 6
    assert tensors is None or tensor_count(spec) + vision == tensors


def test_nemotron_as_published() -> None:
    # The Nano's index: 6,243 tensors, total_size 63,155,886,464. The Super's headers: 123,611,012,096 bfloat16 weights,
    # 2,942,324,736 of them MTP, beside the float32 routing biases (40 layers and the MTP's, 512 each).
    nano, large = known.spec(NANO), known.spec(SUPER)
    assert (tensor_count(nano), text_bytes(nano)) == (6_243, 63_155_886_464)
    assert large.parameters + large.mtp_parameters == 123_611_012_096 + 41 * 512
    assert large.mtp_parameters == 2_942_324_736 + 512
    assert round(known.spec(ULTRA).parameters / 1e9) == 549  # sold as 550


def test_bytes_of_qwen35_as_published() -> None:
    # The headers of all 94 shards: 806,795,875,168 bytes, float32 only in 45 A_log and 45 linear_attn.norm.
    spec = known.spec("Qwen/Qwen3.5-397B-A17B")
    assert text_bytes(spec) + 2 * spec.vision_parameters == 806_795_875_168


def test_kimi_k3_as_published() -> None:
    # The dump counts 1,503,647,073,024 elements in 497,220 tensors: experts as bytes of two weights and a scale for 32.
    spec = known.spec(K3)
    experts = spec.parameters_by_role()["expert"]
    assert spec.parameters - experts + experts // 2 + experts // 32 + spec.vision_parameters == 1_503_647_073_024
    per_expert = 92 * 896 * 3
    assert tensor_count(spec) + per_expert + 27 * 6 + 6 == 497_220
    assert spec.parameters / 1e12 == pytest.approx(2.78, abs=0.005)
    assert spec.quantization is not None
    assert spec.quantization["format"] == "mxfp4-pack-quantized"
    # Of what is neither expert nor vision, only these are float32 in the dump.
    wide = {g.name.rsplit(".", 2)[-2 if g.name.endswith("weight") else -1] for g, _ in all_groups(spec) if g.dtype}
    assert wide == {"A_log", "dt_bias", "q_conv1d", "k_conv1d", "v_conv1d", "o_norm", "e_score_correction_bias"}


@pytest.fixture(scope="module", params=[name for name in TINY])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Shapes]:
    """A tiny checkpoint as published ones look: saved by transformers, with what that does not save."""
    name: str = request.param
    config, extra = TINY[name]
    folder = tmp_path_factory.mktemp(name)
    tensors: dict[str, torch.Tensor] = {}
    if name != "kimi-k3":
        transformers_model(config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
    if name == "qwen35moe":
        tensors = fuse_experts(tensors, 8)
    if name == "kimi-linear":  # transformers renames the dense layer's MLP too when it saves; the real one has mlp
        tensors = {key.replace("layers.0.block_sparse_moe", "layers.0.mlp"): value for key, value in tensors.items()}
    main = {key: tuple(value.shape) for key, value in tensors.items() if "visual" not in key}
    tensors |= {key: torch.zeros(shape) for key, shape in extra.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for file_name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file_name, folder)
    return name, folder, main or extra


def test_tensors_on_disk(tiny: tuple[str, Path, Shapes]) -> None:
    name, _, main = tiny
    config, extra = TINY[name]
    spec = model_spec(config)
    assert {t.name: t.shape for t in spec.tensors()} == main
    assert mtp_tensors(spec) == ({} if name == "kimi-k3" else extra)


def test_first_qwen35_stores_mtp_experts_one_by_one() -> None:
    spec = model_spec({**QWEN5, "text_config": {**QWEN5["text_config"], "mlp_only_layers": []}})
    assert mtp_tensors(spec) == TINY["qwen3next"][1]


@pytest.mark.skipif(find_llamacpp().convert is None, reason="no llama.cpp: reapc doctor --install")
def test_gguf_tensors_equal_the_real_converter(tiny: tuple[str, Path, Shapes]) -> None:
    name, folder, _ = tiny
    spec = model_spec(TINY[name][0])
    convert(folder, folder / "f32.gguf", "f32", "qwen2")
    reader = gguf.GGUFReader(folder / "f32.gguf")
    real = {tensor.name: tuple(int(d) for d in reversed(tensor.shape)) for tensor in reader.tensors}
    groups = [("", group) for group in (*spec.outer, *spec.mtp_outer)]
    groups += [(f"blk.{x.index}.", group) for x in (*spec.layers, *spec.mtp_layers) for group in x.kind.tensors]
    expected = {
        prefix + part.name: ((spec.num_experts,) if part.experts else ()) + part.shape
        for prefix, group in groups
        for part in group.gguf
    }
    assert reader.fields["general.architecture"].contents() == spec.gguf_arch == name
    assert expected == real


# Layers with a cache, its elements per token in one of them; layers with a state, its convolution's and recurrent
# elements in one of them; what a tensor-parallel size has to divide. All by hand from the configs.
@pytest.mark.parametrize(
    ("name", "cache", "state", "heads", "dtype"),
    [
        (QWEN_NEXT, (12, 2 * 2 * 256), (36, 3 * (2 * 16 * 128 + 32 * 128), 32 * 128 * 128), 16, ""),
        ("Qwen/Qwen3.5-397B-A17B", (15, 2 * 2 * 256), (45, 3 * (2 * 2048 + 8192), 64 * 128 * 128), 16, "float32"),
        (KIMI, (7, 512 + 64), (20, 3 * 3 * 4096, 32 * 128 * 128), 32, "float32"),
        (K3, (24, 512 + 64), (69, 3 * 3 * 12288, 96 * 128 * 128), 96, "float32"),
        (NANO, (6, 2 * 2 * 128), (23, 3 * (64 * 64 + 2 * 8 * 128), 64 * 64 * 128), 8, "float32"),
        (SUPER, (8, 2 * 2 * 128), (40, 3 * (128 * 64 + 2 * 8 * 128), 128 * 64 * 128), 8, "float32"),
    ],
)
def test_cache_and_state(
    name: str, cache: tuple[int, int], state: tuple[int, int, int], heads: int, dtype: str
) -> None:
    kinds = [layer.kind for layer in known.spec(name).layers]
    cached = [stream.elements for kind in kinds for stream in kind.cache]
    assert (len(cached), *set(cached)) == cache
    states = [(kind.conv_elements, kind.recurrent_elements) for kind in kinds if kind.conv_elements]
    assert [(len(states), *pair) for pair in set(states)] == [state]
    assert not any(kind.cache and kind.conv_elements for kind in kinds)
    assert {(k.state_heads, k.recurrent_dtype) for k in kinds if k.conv_elements} == {(heads, dtype)}


@pytest.mark.parametrize(
    ("name", "replicated"),
    [
        (QWEN_NEXT, {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}),
        (KIMI, {"block_sparse_moe.gate.weight", "block_sparse_moe.gate.e_score_correction_bias",
                "self_attn.f_a_proj.weight", "self_attn.g_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"}),
        (SUPER, {"mixer.gate.weight", "mixer.gate.e_score_correction_bias", "mixer.fc1_latent_proj.weight",
                 "mixer.fc2_latent_proj.weight"}),
    ],
)  # fmt: skip
def test_what_vllm_keeps_whole_on_every_rank(name: str, replicated: set[str]) -> None:
    groups = {group.name: group for layer in known.spec(name).layers for group in layer.kind.tensors}
    whole = {n for n, group in groups.items() if group.parallel == "replicate" and group.role != "norm"}
    assert whole == replicated
    experts = {(n.split(".")[-2], group.parallel) for n, group in groups.items() if group.role == "expert"}
    down = {"down_proj", "w2"}
    assert all(parallel == ("expert_row" if n in down else "expert") for n, parallel in experts)
    rows = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
    row_names = {n for n, group in groups.items() if group.parallel == "row"}
    assert row_names == {n for n, g in groups.items() if n.endswith(rows) and g.role != "expert"}


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        (NEXT, "linear_num_value_heads", None, "c.json: key 'linear_num_value_heads' is missing"),
        (NEXT, "linear_num_value_heads", 3, "linear_num_value_heads = 3 is not a multiple of linear_num_key_heads = 2"),
        (NEXT, "layer_types", ["linear_attention"] * 3, "layer_types has 3 entries, and the model has 4 layers"),
        (NEXT, "layer_types", ["mamba"] * 4, "layer_types: 'mamba'"),
        (NEXT, "num_local_experts", 7, "num_experts = 8 and num_local_experts = 7 contradict"),
        (QWEN5, "text_config.num_experts", None, "text_config: key 'num_experts' is missing"),
        (QWEN5, "vision_config.depth", None, "vision_config: key 'depth' is missing"),
        (LINEAR, "linear_attn_config.kda_layers", [1, 2], r"kda_layers \(2\) and full_attn_layers \(1\) .* 4 layers"),
        (LINEAR, "linear_attn_config.full_attn_layers", [3], "kda_layers .* full_attn_layers"),
        (LINEAR, "kv_lora_rank", None, "key 'kv_lora_rank' is missing"),
        (KIMI3, "text_config.linear_attn_config.kda_layers", [0, 1, 2], "text_config: linear_attn_config: kda_layers"),
        (KIMI3, "text_config.linear_attn_config", None, "text_config: key 'linear_attn_config' is missing"),
        (NEMOTRON, "hybrid_override_pattern", "MEM*E", "hybrid_override_pattern has 5 entries, and .* = 6"),
        (NEMOTRON, "hybrid_override_pattern", "MEM*EX", "hybrid_override_pattern: 'X'"),
        (NEMOTRON, "hybrid_override_pattern", None, "key 'hybrid_override_pattern' is missing"),
        (NEMOTRON, "layers_block_type", ["moe"] * 6, "layers_block_type and hybrid_override_pattern contradict"),
        (NEMOTRON, "mtp_hybrid_override_pattern", "ME", "MTP pattern 'ME'"),
        (NEMOTRON, "ssm_state_size", None, "key 'ssm_state_size' is missing"),
    ],
)  # fmt: skip
def test_broken_configs_name_the_key(config: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ReapcError, match=message) as caught:
        model_spec(changed(config, key, value), "c.json")
    assert caught.value.exit_code == 2


def test_dense_nemotron_is_refused() -> None:
    with pytest.raises(CannotBeDone, match="no experts to prune"):
        model_spec(changed(NEMOTRON, "hybrid_override_pattern", "MMM*--"), "c.json")
