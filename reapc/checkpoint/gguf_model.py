"""A GGUF file as a ModelSpec, from its header alone: parameters by role, experts, cache and state of every layer.

What a tensor is comes from its name, so that any architecture can be counted. What a layer caches is llama.cpp's
business: it is read for the architectures in ``_CACHED`` and left open for others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapc.arch.spec import CacheStream, LayerKind, LayerSpec, ModelSpec, Role, TensorGroup
from reapc.checkpoint.gguf_header import GgufHeader, GgufTensorInfo, read_header
from reapc.errors import CannotBeDone, ReapcError

# llama.h: LLAMA_FTYPE_*. 1024 is added where the type was guessed from the tensors.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
_GUESSED = 1024
_MOST_LAYERS = 4096  # more is damage
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Architectures whose cache is that of their tensors and metadata; compared with the checkpoint's in tests.
_CACHED = frozenset(
    {
        "deepseek2", "deepseek32", "ernie4_5-moe", "gemma4", "glm-dsa", "glm4moe", "gpt-oss", "granitemoe",
        "kimi-k3", "kimi-linear", "llama", "llama4", "mimo2", "minimax-m2", "minimax-m3", "nemotron_h_moe", "olmoe",
        "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "step35",
    }
)  # fmt: skip
# src/models/llama4.cpp, openai-moe.cpp: window where the metadata have none, and full attention on every n-th layer.
_WINDOWS = {"llama4": 8192}
_PATTERNS = {"llama4": 4, "gpt-oss": 2}
_LEARNED_SCALES = "gemma4"  # elsewhere ``.scale`` belongs to a quantized tensor


@dataclass(frozen=True)
class GgufModel:
    """``spec`` describes the tensors as they are in the file (``header``); ``file_type`` is general.file_type's name.
    ``cache_reason``: why the layers' caches are not known, or empty."""

    spec: ModelSpec
    header: GgufHeader
    file_type: str
    tensor_bytes: int
    parts: int
    cache_reason: str = ""


def read_model(path: Path) -> GgufModel:
    """ReapcError (exit 2) for a file that is damaged or no model, CannotBeDone for one without experts."""
    header = read_header(path)
    meta = _Metadata(header)
    layers: dict[int, list[GgufTensorInfo]] = {}
    outer: list[TensorGroup] = []
    for tensor in header.tensors:
        if match := _LAYER.fullmatch(tensor.name):
            layers.setdefault(int(match[1]), []).append(tensor._replace(name=match[2]))
        elif group := _group(tensor, meta, _outer_role(tensor.name)):
            outer.append(group)
    blocks = meta.number("block_count")
    main = blocks - meta.number("nextn_predict_layers", 0)
    if not layers or not max(layers) < blocks <= _MOST_LAYERS:
        raise ReapcError(f"{path}: block_count = {blocks}, and it has {len(layers)} layers", hint="download it again")
    reason = meta.cache_reason()
    built = [
        LayerSpec(i, f"blk.{i}", _layer(layers.get(i, []), i, meta, cached=not reason and i < main))
        for i in range(blocks)
    ]
    size = sum(tensor.data_bytes for tensor in header.tensors)
    spec = _spec(meta, tuple(built[:main]), tuple(built[main:]), tuple(outer))
    return GgufModel(spec, header, meta.file_type, size, len(header.parts), reason)


class _Metadata:
    """The metadata that are asked for, checked."""

    def __init__(self, header: GgufHeader) -> None:
        self.path, self.fields = header.path, header.fields
        kind = self.fields.get("general.type", "model")
        architecture = self.fields.get("general.architecture")
        if kind != "model" or architecture == "clip":
            raise ReapcError(
                f"{self.path}: general.type = {kind!r}, architecture {architecture!r}: no language model",
                hint="name the model's own file",
            )
        if not isinstance(architecture, str):
            raise ReapcError(f"{self.path}: key 'general.architecture' is missing", hint="is it a model's file?")
        self.arch = architecture
        self.experts = self.number("expert_count", 0)
        if not self.experts:
            raise CannotBeDone(
                f"{self.path}: no experts to prune: a dense model ({architecture})",
                hint="reapc works on Mixture-of-Experts models",
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int | None = None) -> int:
        """A count; the largest one where there is one for each layer."""
        value = self.get(key, default)
        if isinstance(value, list) and value:
            value = max(value)
        if value is None:
            raise ReapcError(f"{self.path}: key '{self.arch}.{key}' is missing")
        return self.checked(key, value)

    def at(self, key: str, layer: int, default: int = 0) -> int:
        """A count of one layer, where one value or one for each layer is given."""
        value = self.get(key, default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else default
        return self.checked(key, value)

    def checked(self, key: str, value: Any, least: int = 0) -> int:
        """``value`` as a count of at least ``least``; ReapcError names the key."""
        if not isinstance(value, int) or value < least:
            raise ReapcError(f"{self.path}: {self.arch}.{key} = {value!r}: a count of at least {least} is expected")
        return int(value)

    @property
    def file_type(self) -> str:
        value = self.fields.get("general.file_type")
        return _FILE_TYPES.get(value & ~_GUESSED, "mixed") if isinstance(value, int) else "mixed"

    @property
    def latent(self) -> bool:
        return bool(self.get("attention.kv_lora_rank") and self.get("attention.key_length_mla"))

    def cache_reason(self) -> str:
        if self.arch not in _CACHED:
            return f"the cache of {self.arch} is not read from a GGUF; name the checkpoint that it was made of"
        if self.get("attention.shared_kv_layers"):
            return "its layers share caches, which is not read from a GGUF"
        return ""

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None where it attends to everything."""
        window = self.number("attention.sliding_window", _WINDOWS.get(self.arch, 0))
        pattern = self.get("attention.sliding_window_pattern", _PATTERNS.get(self.arch, 0))
        if not window or not pattern:
            return None
        if isinstance(pattern, list):
            slides = layer < len(pattern) and bool(pattern[layer])
        else:
            period = self.checked("attention.sliding_window_pattern", pattern)
            slides = layer % period < period - 1
        return window if slides else None


def _outer_role(name: str) -> Role | None:
    part = name.split(".")[0]
    if part in ("token_embd", "per_layer_token_embd"):
        return "embedding"
    if part == "output":
        return "lm_head"
    if part.startswith("rope_"):
        return None  # frequencies, computed by the converter
    return "norm" if part.endswith("_norm") else "other"


def _role(name: str) -> Role | None:
    """The role of a layer's tensor, its name without ``blk.N.``."""
    part = name.split(".")[1] if name.startswith(("nextn.", "indexer.")) else name.split(".")[0]
    if part.startswith("rope_") or name.endswith(".input_scale"):
        return None
    if part in ("ffn_gate_inp", "exp_probs_b", "ffn_gate_tid2eid") or name == "ffn_down_exps.scale":
        return "router"
    if part.endswith(("_exps", "_chexps")):
        return "expert"
    if part.endswith("_shexp"):
        return "shared_expert"
    if part in ("ffn_gate", "ffn_up", "ffn_down", "ffn_gate_up"):
        return "dense_mlp"
    if "norm" in part:
        return "norm"
    if name.startswith("nextn."):
        return {"embed_tokens": "embedding", "shared_head_head": "lm_head"}.get(part, "other")  # type: ignore[return-value]
    if name.startswith("indexer") or part.startswith(("attn_", "ssm_")):
        return "other" if part.startswith("attn_res_") else "attention"
    return "other"


def _group(tensor: GgufTensorInfo, meta: _Metadata, role: Role | None) -> TensorGroup | None:
    """The tensor as a group; None where it holds no parameters."""
    if role is None or (tensor.name.endswith(".scale") and meta.arch != _LEARNED_SCALES):
        return None
    if role != "expert":
        return TensorGroup(tensor.name, tensor.shape, role)
    if tensor.shape[0] != meta.experts:
        raise ReapcError(
            f"{meta.path}: {tensor.name} has {tensor.shape[0]} experts, and {meta.arch}.expert_count = {meta.experts}"
        )
    return TensorGroup(tensor.name, tensor.shape[1:], role, expert_axis=0)


def _layer(tensors: list[GgufTensorInfo], index: int, meta: _Metadata, *, cached: bool) -> LayerKind:
    groups = [group for tensor in tensors if (group := _group(tensor, meta, _role(tensor.name)))]
    is_moe = any(group.role == "expert" for group in groups)
    if not cached:
        return LayerKind(tuple(groups), is_moe=is_moe)
    names = {tensor.name for tensor in tensors}
    if any(name.startswith("ssm_") for name in names):
        conv, recurrent = _state(meta, index)
        return LayerKind(tuple(groups), (), is_moe, conv, recurrent)
    return LayerKind(tuple(groups), _cache(names, index, meta), is_moe)


def _cache(names: set[str], index: int, meta: _Metadata) -> tuple[CacheStream, ...]:
    streams = []
    if meta.latent and "attn_kv_a_mqa.weight" in names:
        width = meta.number("attention.kv_lora_rank") + meta.number("rope.dimension_count")
        streams.append(CacheStream(width, kind="latent"))
    elif names & {"attn_k.weight", "attn_qkv.weight", "attn_kv_b.weight"}:
        window = meta.window(index)
        queries = meta.checked("attention.head_count", meta.at("attention.head_count", index), 1)
        mean = meta.number("embedding_length") // queries
        widths = [meta.number(f"attention.{part}_length", mean) for part in ("key", "value")]
        if window is not None:
            keys = ("attention.key_length_swa", "attention.value_length_swa")
            widths = [meta.number(key, width) for key, width in zip(keys, widths, strict=True)]
        heads = meta.at("attention.head_count_kv", index, queries)
        streams.append(CacheStream(heads * widths[0], heads * widths[1], heads, window))
    chosen = meta.at("attention.indexer.types", index, 1)
    if chosen and names & {"indexer.attn_k.weight", "indexer.k_proj.weight"}:
        streams.append(CacheStream(meta.number("attention.indexer.key_length"), kind="index"))
    return tuple(streams)


def _state(meta: _Metadata, index: int) -> tuple[int, int]:
    """Elements of the convolution's and the recurrent state (llama-hparams.cpp: n_embd_r, n_embd_s)."""
    past = meta.number("ssm.conv_kernel") - 1
    if width := meta.number("kda.head_dim", 0):
        inner = meta.at("attention.head_count", index) * width
        return 3 * past * inner, inner * width
    inner, state = meta.number("ssm.inner_size"), meta.number("ssm.state_size")
    return past * (inner + 2 * meta.number("ssm.group_count", 0) * state), state * inner


def _spec(
    meta: _Metadata, layers: tuple[LayerSpec, ...], mtp: tuple[LayerSpec, ...], outer: tuple[TensorGroup, ...]
) -> ModelSpec:
    roles = {group.role for layer in layers for group in layer.kind.tensors}
    if "expert" not in roles:
        raise ReapcError(f"{meta.path}: {meta.arch}.expert_count = {meta.experts}, and no layer has experts")
    top_k = meta.number("expert_used_count")
    if not 1 <= top_k <= meta.experts:
        raise ReapcError(f"{meta.path}: {meta.arch}.expert_used_count = {top_k}: 1 to {meta.experts} expected")
    heads = meta.number("attention.head_count")
    return ModelSpec(
        family=meta.arch,
        model_type=meta.arch,
        hidden_size=meta.number("embedding_length"),
        vocab_size=meta.number("vocab_size", 0),
        num_heads=heads,
        num_kv_heads=meta.number("attention.head_count_kv", heads),
        head_dim=meta.number("attention.key_length", meta.number("embedding_length") // max(heads, 1)),
        num_experts=meta.experts,
        top_k=top_k,
        expert_intermediate_size=meta.number("expert_feed_forward_length", 0),
        dense_intermediate_size=meta.number("feed_forward_length", 0),
        max_context=meta.number("context_length"),
        tied_embeddings=all(group.role != "lm_head" for group in outer),
        dtype="",
        expert_count_keys=(f"{meta.arch}.expert_count",),
        layers=layers,
        outer=outer,
        gguf_arch=meta.arch,
        mtp_layers=mtp,
        mtp_count_keys=(f"{meta.arch}.nextn_predict_layers",) if mtp else (),
        shared_experts=meta.number("expert_shared_count", int("shared_expert" in roles)),
        n_group=meta.number("expert_group_count", 1) or 1,
        topk_group=meta.number("expert_group_used_count", 1) or 1,
        latent_attention=meta.latent,
    )
