"""Gemma-4, Step-3.7, MiMo-V2, DeepSeek-V4 and MiniMax-M3 (sliding or compressed attention) against transformers,
llama.cpp's converter, and the headers of published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
from gqa_models import convert, gguf_shapes
from mla_models import header, mtp_tensors
from sliding_models import CONVERTERS_OWN, NAMES, OWN, SMALL, TINY, V4, mended, published, spec_of, transformers_model

from reapc.arch.config import model_spec
from reapc.arch.spec import ModelSpec, TensorGroup

# --- sizes against transformers' model on the meta device ---------------------------------------------------------

MARKS = {
    "vision": "vision", "visual": "vision", "multi_modal_projector": "vision", "embed_tokens": "embedding",
    "lm_head": "lm_head", "_hc.": "other", "hc_head": "other", "layer_scalar": "other", "norm": "norm",
    ".mlp.gate.": "router", ".router.": "router", ".shared_experts.": "shared_expert", ".experts.": "expert",
    ".mlp.": "dense_mlp", ".self_attn.": "attention",
}  # fmt: skip


@lru_cache(maxsize=8)
def _counts(name: str) -> dict[str, int]:
    import torch

    counts: dict[str, int] = {}
    with torch.device("meta"):
        state = transformers_model(published(name)).state_dict()
    tied = "model.language_model.embed_tokens.weight" in state and name.startswith("gemma")
    for key, tensor in state.items():
        if key == "lm_head.weight" and tied:
            continue
        role = next(role for mark, role in MARKS.items() if mark in key)
        counts[role] = counts.get(role, 0) + tensor.numel()
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_transformers(name: str) -> None:
    spec, counts = spec_of(name), dict(_counts(name))
    assert spec.vision_parameters == counts.pop("vision", 0)
    assert spec.parameters_by_role() == counts
    chosen = counts["expert"] * spec.top_k // spec.num_experts
    embedding = 0 if spec.tied_embeddings else counts["embedding"]
    assert spec.active_parameters == sum(counts.values()) - counts["expert"] + chosen - embedding


# In billions, as the model cards say: total, active, and what their rounding and way of counting allow (MTP and vision
# in or out, the head in or out). The exact checks are those against transformers and the published headers.
CARDS = {
    "gemma-4-26B-A4B": (25.2, 3.8, 0.06), "Step-3.7-Flash": (196.9, 11.4, 0.1), "MiMo-V2-Flash": (309, 15, 0.3),
    "DeepSeek-V4-Flash": (284, 13, 0.4), "DeepSeek-V4-Pro": (1600, 49, 30), "MiniMax-M3": (428, 23, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    total, active, tolerance = CARDS[name]
    spec = spec_of(name)
    assert spec.parameters / 1e9 == pytest.approx(total, abs=tolerance)
    assert spec.active_parameters / 1e9 == pytest.approx(active, abs=tolerance)


def _all_groups(spec: ModelSpec) -> Iterator[tuple[TensorGroup, int]]:
    """Every group and how often it is stored, MTP included, experts counted one by one."""
    for group, layers in spec.groups(mtp=True):
        yield group, layers * (spec.num_experts if "{e}" in group.name else 1)


def test_deepseek_v4_pro_stores_what_its_headers_say() -> None:
    """145,116 tensors and 861,608,274,846 values (github gogongxt/python, scripts/models/deepseek_v4_pro.md): experts
    are two fp4 in a byte and a scale per 32, the other quantized matrices FP8 and a scale per 128 x 128."""
    tensors = values = 0
    for group, times in _all_groups(spec_of("DeepSeek-V4-Pro")):
        size = prod(group.shape) * (384 if group.expert_axis is not None else 1)
        if group.role == "expert":
            tensors, values = tensors + 2 * times, values + times * (size // 2 + size // 32)
        elif group.linears:
            scales = ceil(group.shape[0] / 128) * ceil(group.shape[1] / 128)
            tensors, values = tensors + 2 * times, values + times * (size + scales)
        else:
            tensors, values = tensors + times, values + times * size
    assert (tensors, values) == (145_116, 861_608_274_846)


def test_minimax_m3_stores_what_its_headers_say() -> None:
    """23,416 tensors and 427,040,140,160 values (scripts/models/minimax_m3.md), 523 of the tensors in the tower and the
    projector: 32 layers of 16, 3 and 8 more. No MTP."""
    spec = spec_of("MiniMax-M3")
    assert sum(times for _, times in _all_groups(spec)) == 23_416 - 523
    assert spec.parameters + spec.vision_parameters == 427_040_140_160
    assert not spec.mtp_layers


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        # eh_proj, 3 norms and 2 of the layer, q, k, v, o, sinks, MLP (vLLM's mimo_v2_mtp.py, dump of MiMo-V2.5)
        ("MiMo-V2-Flash", 3, 4096 * 8192 + 5 * 4096 + 14848 * 4096 + 4096 * 8192 + 64 + 3 * 4096 * 16384),
        # eh_proj, head, 3 norms and 2 + 2 of the layer, q and o, k and v, gates, MLP (vLLM's step3p5_mtp.py)
        ("Step-3.7-Flash", 3,
         4096 * 8192 + 128896 * 4096 + 5 * 4096 + 2 * 128 + 2 * 4096 * 12288 + 2 * 4096 * 1024 + 96 * 4096
         + 3 * 4096 * 11264),
        ("MiniMax-M3", 0, 0), ("gemma-4-26B-A4B", 0, 0),
    ],
)  # fmt: skip
def test_mtp_layers(name: str, layers: int, parameters: int) -> None:
    spec = spec_of(name)
    assert len(spec.mtp_layers) == layers
    assert spec.mtp_parameters == layers * parameters


# Types in the headers of V4-Pro, MiniMax-M3 and MiMo-V2.5; all else there is bf16, FP8 or fp4.
FLOATS = {
    "DeepSeek-V4-Pro": ({
        "ffn.gate.bias", "attn.attn_sink", "attn.compressor.ape", "attn.indexer.compressor.ape", "hc_head_fn",
        "hc_head_base", "hc_head_scale", "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base",
        "hc_ffn_scale", "mtp.0.hc_head_fn", "mtp.0.hc_head_base", "mtp.0.hc_head_scale",
    }, {"ffn.gate.tid2eid"}),
    "MiniMax-M3": ({"block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"}, set()),
    "MiMo-V2-Flash": ({"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_types_that_differ_from_the_models(name: str) -> None:
    found = {group.name: group.dtype for group, _ in spec_of(name).groups(mtp=True) if group.dtype}
    assert {name for name, dtype in found.items() if dtype == "float32"} == FLOATS[name][0]
    assert {name for name, dtype in found.items() if dtype == "int64"} == FLOATS[name][1]
    assert len(found) == sum(map(len, FLOATS[name]))


# --- names and shapes against a model that transformers saves, and GGUF against the converter -----------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as transformers saves them, under the published config."""
    import torch
    from safetensors.torch import load_file, save_file

    folders = {}
    for name, config in TINY.items():
        folders[name] = tmp_path_factory.mktemp(config["model_type"])
        model = transformers_model({**config, **OWN.get(name, {})}).to(torch.bfloat16)
        model.save_pretrained(folders[name])
    path = folders["deepseek_v4"] / "model.safetensors"
    save_file(mended(load_file(path)), path, metadata={"format": "pt"})
    return folders


def _is_vision(name: str) -> bool:
    marks = ("vision", "multi_modal_projector", "patch_merge_mlp", "vit_large_projector")
    return any(mark in name for mark in marks)


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_those_that_transformers_saves(name: str, saved: dict[str, Path]) -> None:
    stored = header(saved[name] / "model.safetensors")
    spec = model_spec(TINY[name])
    text = {key: shape for key, shape in stored.items() if not _is_vision(key)}
    assert {tensor.name: tensor.shape for tensor in spec.tensors()} == text
    assert spec.vision_parameters == sum(prod(shape) for key, shape in stored.items() if _is_vision(key))


def _publish(name: str, source: Path, folder: Path) -> None:
    """The saved checkpoint as published: MTP layers beside it, DeepSeek-V4's experts packed, and what the converter
    wants to read."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    config = TINY[name]
    tensors = {key: tensor for key, tensor in load_file(source / "model.safetensors").items() if not _is_vision(key)}
    for tensor in mtp_tensors(model_spec(config)):
        tensors[tensor.name] = torch.zeros(tensor.shape, dtype=torch.bfloat16)
    if name == "deepseek_v4":
        for key in [key for key in tensors if ".experts." in key]:
            out, inner = tensors[key].shape
            tensors[key] = torch.zeros((out, inner // 2), dtype=torch.int8)
            scale = torch.zeros((out, inner // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
            tensors[key.replace(".weight", ".scale")] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **CONVERTERS_OWN.get(name, {})}))
    vocab = {f"t{i}": i for i in range(SMALL["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))


@pytest.fixture(scope="module")
def converted(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("published")
    for number, (name, source) in enumerate(saved.items()):
        _publish(name, source, root / str(number))
    return convert({name: root / str(number) for number, name in enumerate(saved)})


ARCHES = {"gemma4": "gemma4", "gemma4 with v_proj": "gemma4", "step3p7": "step35", "mimo_v2_flash": "mimo2",
          "deepseek_v4": "deepseek4", "minimax_m3": "minimax-m3"}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_gguf_tensors_are_the_converters(name: str, converted: dict[str, dict[str, Any]]) -> None:
    found = converted[name]
    assert "error" not in found, found["error"]
    spec = model_spec(TINY[name])
    assert gguf_shapes(spec) == {key: tuple(shape) for key, (shape, _) in found["tensors"].items()}
    assert spec.gguf_arch == found["arch"] == ARCHES[name]
    assert found["kv"]["expert_count"] == spec.num_experts
    nextn = len(spec.mtp_layers) if name in ("step3p7", "mimo_v2_flash") else 0
    assert found["kv"]["block_count"] == spec.num_layers + nextn
    assert sum(".nextn.eh_proj" in key for key in found["tensors"]) == nextn


# Names of one MTP layer: V4-Pro's headers; vLLM's mimo_v2_mtp.py and the headers of MiMo-V2.5 (there q, k and v are one
# matrix); vLLM's step3p5_mtp.py.
_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
_MLP = "mlp.gate_proj mlp.up_proj mlp.down_proj"
MTP_NAMES = {
    "DeepSeek-V4-Pro": (
        "mtp.0.",
        "attn.attn_sink hc_attn_fn hc_attn_base hc_attn_scale hc_ffn_fn hc_ffn_base hc_ffn_scale hc_head_fn "
        "hc_head_base hc_head_scale ffn.gate.bias",
        "attn.kv_norm attn.q_norm attn.wkv attn.wo_a attn.wo_b attn.wq_a attn.wq_b attn_norm ffn_norm e_proj h_proj "
        "enorm hnorm norm ffn.gate ffn.experts.7.w1 ffn.experts.7.w2 ffn.experts.7.w3 ffn.shared_experts.w1 "
        "ffn.shared_experts.w2 ffn.shared_experts.w3",
    ),
    "MiMo-V2-Flash": (
        "model.mtp.layers.0.", "self_attn.attention_sink_bias",
        f"{_ATTENTION} {_MLP} eh_proj enorm hnorm final_layernorm input_layernorm pre_mlp_layernorm",
    ),
    "Step-3.7-Flash": (
        "model.layers.45.", "",
        f"{_ATTENTION} {_MLP} self_attn.g_proj self_attn.q_norm self_attn.k_norm eh_proj enorm hnorm input_layernorm "
        "post_attention_layernorm transformer.shared_head.norm transformer.shared_head.output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MTP_NAMES)
def test_names_of_an_mtp_layer(name: str) -> None:
    prefix, plain, weights = MTP_NAMES[name]
    expected = {prefix + part for part in plain.split()} | {f"{prefix}{part}.weight" for part in weights.split()}
    found = {tensor.name for tensor in mtp_tensors(spec_of(name)) if tensor.name.startswith(prefix)}
    assert {key for key in found if ".experts." not in key or ".experts.7." in key} == expected


# --- what the engines need ------------------------------------------------------------------------------------------


def _elements(spec: ModelSpec, context: int) -> int:
    streams = [stream for layer in spec.layers for stream in layer.kind.cache]
    return sum(stream.entries(context) * stream.elements for stream in streams)


@pytest.mark.parametrize(
    ("name", "context", "elements"),
    [
        # 25 layers over 1024 tokens, 8 KV heads of 256; 5 over all, 2 KV heads of 512; K and V
        ("gemma-4-26B-A4B", 32768, 25 * 1024 * 2 * 8 * 256 + 5 * 32768 * 2 * 2 * 512),
        ("gemma-4-26B-A4B", 100, 25 * 100 * 2 * 8 * 256 + 5 * 100 * 2 * 2 * 512),
        ("Step-3.7-Flash", 32768, 33 * 512 * 2 * 8 * 128 + 12 * 32768 * 2 * 8 * 128),
        ("MiMo-V2-Flash", 32768, 39 * 128 * 8 * (192 + 128) + 9 * 32768 * 4 * (192 + 128)),
        # every layer a window; 21 layers an entry and an index key per 4 tokens; 20 an entry per 128
        ("DeepSeek-V4-Flash", 32768, 43 * 128 * 512 + 21 * 8192 * (512 + 128) + 20 * 256 * 512),
        ("DeepSeek-V4-Flash", 100, 43 * 100 * 512 + 21 * 25 * (512 + 128) + 20 * 1 * 512),
        ("DeepSeek-V4-Pro", 32768, 61 * 128 * 512 + 30 * 8192 * (512 + 128) + 31 * 256 * 512),
        ("MiniMax-M3", 32768, 60 * 32768 * 2 * 4 * 128 + 57 * 32768 * 128),
    ],
)  # fmt: skip
def test_cache_elements_of_a_sequence(name: str, context: int, elements: int) -> None:
    assert _elements(spec_of(name), context) == elements


# Compressors' open windows: llama.cpp's llama_dsv4_comp_state has 8 rows of 2 x 512 and of 2 x 128 for ratio 4, 128
# rows of 512 for ratio 128; values and gates.
FOUR, HUNDRED = 2 * 8 * (2 * 512 + 2 * 128), 2 * 128 * 512


@pytest.mark.parametrize(("name", "fours", "hundreds"), [("DeepSeek-V4-Flash", 21, 20), ("DeepSeek-V4-Pro", 30, 31)])
def test_compressors_keep_a_state(name: str, fours: int, hundreds: int) -> None:
    kinds = [layer.kind for layer in spec_of(name).layers]
    assert sum(kind.recurrent_elements for kind in kinds) == fours * FOUR + hundreds * HUNDRED
    assert {kind.recurrent_dtype for kind in kinds if kind.recurrent_elements} == {"float32"}
    assert {(kind.state_heads, kind.conv_elements) for kind in kinds} == {(0, 0)}


def test_transformers_keeps_as_many_compressed_entries() -> None:
    """Run for 256 tokens; its window holds one less, the query's own being added when it attends."""
    import torch

    model = transformers_model(V4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        cache = model(torch.arange(256)[None], use_cache=True).past_key_values
    for layer, held in zip(model_spec(V4).layers, cache.layers, strict=True):
        window, *compressed = layer.kind.cache
        assert held.keys.shape[-2:] == (window.entries(256) - 1, window.elements)
        kept = [value for value in getattr(held, "compressed_kv", {}).values() if value is not None]
        assert [tuple(value.shape[-2:]) for value in kept] == [(s.entries(256), s.elements) for s in compressed]


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_the_caches(name: str) -> None:
    """KV heads that tensor parallelism splits; latents and index keys are whole on every rank."""
    streams = {stream for layer in spec_of(name).layers for stream in layer.kind.cache}
    heads = {"gemma-4-26B-A4B": {8, 2}, "Step-3.7-Flash": {8}, "MiMo-V2-Flash": {4, 8}, "MiniMax-M3": {4, 0}}
    assert {stream.heads for stream in streams} == heads.get(name, {0})
    assert any(stream.kind == "index" for stream in streams) == (name[:4] in ("Deep", "Mini"))
    assert all(stream.heads == 0 for stream in streams if stream.kind != "kv")


# vLLM's model files (gemma4.py, step3p5.py, mimo_v2_flash.py, models/deepseek_v4, models/minimax_m3).
PARALLEL = {
    "q_proj.weight": "column", "k_proj.weight": "kv", "v_proj.weight": "kv", "o_proj.weight": "row",
    "g_proj": "column", "attention_sink_bias": "column", "attn_sink": "column", "norm": "replicate",
    "wq_a": "replicate", "wkv": "replicate", "wq_b": "column", "wo_a": "column", "wo_b": "row",
    "indexer.": "replicate", "compressor.": "replicate", "index_q_proj.weight": "kv",
    "index_k_proj.weight": "replicate",
    "hc_": "replicate", "layer_scalar": "replicate", "tid2eid": "replicate", "gate.weight": "replicate",
    "router": "replicate", "gate.bias": "replicate", "e_score_correction_bias": "replicate", "embed": "vocab",
    "head.weight": "vocab", "shared_head.output": "vocab", "eh_proj": "replicate", "mtp.0.e_proj": "replicate",
    "h_proj": "replicate", "experts.gate_up_proj": "expert", "experts.down_proj": "expert_row",
    "moe.gate_proj": "expert", "moe.up_proj": "expert", "moe.down_proj": "expert_row",
    "experts.{e}.gate_proj": "expert", "experts.{e}.up_proj": "expert", "experts.{e}.down_proj": "expert_row",
    "experts.{e}.w1": "expert", "experts.{e}.w3": "expert", "experts.{e}.w2": "expert_row",
    "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row", "share_expert.gate_proj": "column",
    "share_expert.up_proj": "column", "share_expert.down_proj": "row", "shared_experts.gate_proj": "column",
    "shared_experts.up_proj": "column", "shared_experts.down_proj": "row", "shared_experts.w1": "column",
    "shared_experts.w3": "column", "shared_experts.w2": "row",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_sharding_is_vllms(name: str) -> None:
    for group, _ in model_spec(TINY[name]).groups(mtp=True):
        marks = [mark for mark in PARALLEL if mark in group.name]
        inside = [
            mark for mark in marks if mark in ("indexer.", "compressor.", "norm")
        ]  # these win over what they hold
        mark = "norm" if "norm" in inside else inside[0] if inside else max(marks, key=len)
        assert group.parallel == PARALLEL[mark], group.name


def test_numbers_of_router_and_attention() -> None:
    found = {name: spec_of(name) for name in NAMES}
    experts = {name: (s.num_experts, s.top_k, s.shared_experts, len(s.moe_layers)) for name, s in found.items()}
    assert experts == {
        "gemma-4-26B-A4B": (128, 8, 0, 30), "Step-3.7-Flash": (288, 8, 1, 42), "MiMo-V2-Flash": (256, 8, 0, 47),
        "DeepSeek-V4-Flash": (256, 6, 1, 43), "DeepSeek-V4-Pro": (384, 6, 1, 61), "MiniMax-M3": (128, 4, 1, 57),
    }  # fmt: skip
    assert {s.norm_topk for s in found.values()} == {True}
    assert {(s.n_group, s.topk_group) for s in found.values()} == {(1, 1)}
    # Only DeepSeek's latents need sparse MLA kernels; MiniMax-M3's blocks have Triton kernels in vLLM.
    assert [name for name, s in found.items() if s.sparse_attention] == ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro"]
    assert {name: s.expert_count_keys for name, s in found.items()} == {
        "gemma-4-26B-A4B": ("text_config.num_experts",), "Step-3.7-Flash": ("num_experts",),
        "MiMo-V2-Flash": ("n_routed_experts",), "DeepSeek-V4-Flash": ("n_routed_experts",),
        "DeepSeek-V4-Pro": ("n_routed_experts",), "MiniMax-M3": ("num_local_experts",),
    }  # fmt: skip
    assert [name for name, s in found.items() if s.quantization] == list(NAMES[2:5])


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("gemma-4-26B-A4B", 30 * (3 * 2816 * 704 + 2816 + 1)), ("Step-3.7-Flash", 42 * (3 * 4096 * 1280 + 4096 + 1)),
        ("MiMo-V2-Flash", 47 * (3 * 4096 * 2048 + 4096 + 1)), ("MiniMax-M3", 57 * (3 * 6144 * 3072 + 6144 + 1)),
        # no bias in the three layers that choose by table, whose table stays
        ("DeepSeek-V4-Flash", 43 * (3 * 4096 * 2048 + 4096) + 40),
    ],
)  # fmt: skip
def test_an_expert_takes_its_share_along(name: str, expert: int) -> None:
    spec = spec_of(name)
    assert spec.parameters - spec.with_experts(spec.num_experts - 8).parameters == 8 * expert
