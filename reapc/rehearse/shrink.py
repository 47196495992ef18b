"""The config.json of a real model made small: the same family, flags and kinds of layers, other numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import gcd
from typing import Any

from reapc.arch import ModelSpec, model_spec
from reapc.arch.spec import LayerKind, TensorGroup
from reapc.checkpoint.packed import find_packed
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import tensors_of
from reapc.formats.quantization import Quantization
from reapc.rehearse import keys
from reapc.stream.families import text_config


@dataclass(frozen=True)
class Vocabulary:
    """What the tiny model's tokenizer has: ``size`` rows of the embedding, and ids of special tokens."""

    size: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Shrunk:
    """A tiny model. ``layers``: the real model's layers that it has, in order. ``experts_kept``: what the plan's count
    becomes. Its quantization_config is the source's, where that is one that is read; ``notes`` say what stands for
    what."""

    config: dict[str, Any]
    spec: ModelSpec
    layers: tuple[int, ...]
    experts_kept: int
    notes: tuple[str, ...] = ()


def shrink(config: dict[str, Any], name: str, kept: int | None, vocabulary: Vocabulary) -> Shrunk:
    """The tiny model of ``config``; ``kept`` of its experts are kept by the plan (None: all). CannotBeDone, with what
    differs, where no small config describes the same structure."""
    real = model_spec(config, name)
    kept = real.num_experts if kept is None else kept
    problem = ""
    for layers in _choices(real, config):
        moe = sum(layer.is_moe for layer in (*(real.layers[i] for i in layers), *real.mtp_layers))
        count, few, top_k = experts_of(real, kept, moe)
        tiny = _shrunk_config(config, real, layers, count, top_k, vocabulary)
        spec = model_spec(tiny, f"the tiny {name}")
        differences = compare(real, spec, layers)
        if not differences:
            published, notes = _source_format(config, real, spec)
            if published is not None:
                beside = {key: published.pop(key) for key in keys.BESIDE if key in published}
                tiny |= {**beside, "quantization_config": published}
                spec = model_spec(tiny, f"the tiny {name}")
            if real.vision_parameters and not spec.vision_parameters:
                notes.append("the vision tower is left out: this copy of config.json does not describe it")
            return Shrunk(tiny, spec, tuple(layers), few, tuple(notes))
        problem = problem or "\n  ".join(differences[:6])
    raise CannotBeDone(
        f"{name}: its small copy would have another structure, so that a rehearsal would prove nothing:\n  {problem}",
        hint="a key of this config.json needs an entry in reapc/rehearse/keys.py",
    )


def experts_of(real: ModelSpec, kept: int, moe_layers: int) -> tuple[int, int, int]:
    """(experts, kept experts, top-k) of a tiny model of so many MoE layers: the numbers nearest to the plan's ratio
    that divide into the router's groups, leave two experts in each, and are not taken for Mixtral."""
    total, step = real.num_experts, max(real.n_group, 1)
    top_k = min(real.top_k, keys.LARGEST_TOP_K)
    if total <= keys.EXPERTS:
        return total, kept, top_k
    few_layers = moe_layers < keys.MANY_MOE_LAYERS
    usual, spread = (keys.EXPERTS, keys.SPREAD) if few_layers else (keys.FEWER_EXPERTS, keys.SPREAD // 2)
    usual = max(-(-usual // step) * step, 2 * step)
    if kept == total:
        return usual, usual, top_k
    # a router with groups ranks them by their two best, and the groups that it chooses must hold top-k experts
    least = max(2, -(-top_k // real.topk_group)) * step if step > 1 else top_k
    found = []
    for count in range(usual, max(usual + spread, 4 * step) + 1, step):
        for few in range(least, count, step):
            if few != keys.MIXTRAL:
                away = abs(few / count - kept / total)
                found.append((away + 0.002 * (count - usual) / step, count, few))
    _, count, few = min(found)
    return count, few, top_k


def small(value: int, base: int) -> int:
    """The smallest number of at least ``base`` with the same greatest common divisor with 256."""
    unit = gcd(value, 256)
    found = -(-base // unit) * unit
    while gcd(found, 256) != unit:
        found += unit
    return min(found, value)


def signature(kind: LayerKind) -> frozenset[tuple[Any, ...]]:
    """What makes a layer of this kind, whatever its sizes."""
    groups = {_group(group) for group in kind.tensors}
    caches = {("cache", stream.kind, stream.window is not None, stream.stride) for stream in kind.cache}
    return frozenset({*groups, *caches, ("moe", kind.is_moe), ("state", kind.recurrent_elements > 0)})


def _group(group: TensorGroup) -> tuple[Any, ...]:
    name = re.sub(r"(?<=\.)\d+(?=\.)", "#", group.name)  # an MTP layer's number is the model's number of layers
    return name, group.role, group.dtype, group.expert_axis, len(group.shape), len(group.linears), bool(group.gguf)


_FLAGS = (
    "family", "model_type", "tied_embeddings", "dtype", "gguf_arch", "shared_experts", "norm_topk", "n_group",
    "topk_group", "latent_attention", "sparse_attention", "expert_count_keys", "mtp_count_keys",
)  # fmt: skip


def compare(real: ModelSpec, tiny: ModelSpec, layers: Sequence[int]) -> list[str]:
    """What differs between a model and its small copy of these layers, in words; empty where they have one
    structure."""
    found = [
        f"{flag}: {getattr(real, flag)!r} became {getattr(tiny, flag)!r}"
        for flag in _FLAGS
        if getattr(real, flag) != getattr(tiny, flag)
    ]
    pairs = [
        (f"layer {layer}", real.layers[layer].kind, new.kind) for layer, new in zip(layers, tiny.layers, strict=False)
    ]
    if len(layers) != tiny.num_layers or len(real.mtp_layers) != len(tiny.mtp_layers):
        found.append(
            f"{len(layers)} layers and {len(real.mtp_layers)} MTP layers became {tiny.num_layers} and "
            f"{len(tiny.mtp_layers)}"
        )
    pairs += [
        (f"MTP layer {i}", old.kind, new.kind)
        for i, (old, new) in enumerate(zip(real.mtp_layers, tiny.mtp_layers, strict=False))
    ]
    outside = (("outside the layers", real.outer, tiny.outer), ("beside MTP layers", real.mtp_outer, tiny.mtp_outer))
    pairs += [(where, LayerKind(old), LayerKind(new)) for where, old, new in outside]
    for where, old, new in pairs:
        before, after = signature(old), signature(new)
        found += [f"{where}: {item[:2]} is missing" for item in sorted(before - after, key=str)]
        found += [f"{where}: {item[:2]} is new" for item in sorted(after - before, key=str)]
    kinds = {signature(layer.kind) for layer in real.layers}
    if kinds - {signature(layer.kind) for layer in tiny.layers}:
        found.append("a kind of layer is missing")
    return found


def _choices(real: ModelSpec, config: dict[str, Any]) -> list[list[int]]:
    """The layers to keep, best first: the shortest beginning that has every kind of layer and two with experts, with
    one of its leading dense layers, or with all of them."""
    kinds = [layer.kind for layer in real.layers]
    needed = min(2, len(real.moe_layers))
    end = next(
        n
        for n in range(1, len(kinds) + 1)
        if all(kind in kinds[:n] for kind in kinds) and sum(kind.is_moe for kind in kinds[:n]) >= needed
    )
    whole = list(range(end))
    leading = text_config(config).get("first_k_dense_replace")
    if isinstance(leading, int) and 1 < leading <= end and all(kind == kinds[0] for kind in kinds[:leading]):
        return [[0, *whole[leading:]], whole]
    return [whole]


def _source_format(config: dict[str, Any], real: ModelSpec, tiny: ModelSpec) -> tuple[dict[str, Any] | None, list[str]]:
    """The quantization_config to write the checkpoint with, and what is said of packings that are not read."""
    if not real.quantization:
        return None, []
    found = deepcopy(real.quantization)
    for key in keys.MODULE_LISTS:
        if any(re.search(r"layers\.\d", name) for name in found.get(key) or ()):
            found[key] = _kept_modules(tiny)
    method = found.get("quant_method")
    try:
        rules = Quantization(found, "config.json")
        for tensor, group in tensors_of(tiny):
            find_packed(tensor, group, rules, {}, "config.json")
    except ReapcError:
        return None, [f"the source is published quantized ({method}); {real.dtype} stands for it here"]
    return found, []


def _kept_modules(spec: ModelSpec) -> list[str]:
    """The modules of the matrices that no format quantizes, as FP8 checkpoints list them layer by layer."""
    kept = [
        tensor.module
        for tensor, group in tensors_of(spec, mtp=True)
        if not group.linears and len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    ]
    return list(dict.fromkeys(["lm_head", *kept]))


def _shrunk_config(
    config: dict[str, Any], real: ModelSpec, layers: Sequence[int], experts: int, top_k: int, vocabulary: Vocabulary
) -> dict[str, Any]:
    tiny = {key: deepcopy(value) for key, value in config.items() if key[0] != "_"}
    text = text_config(tiny)
    hidden = _hidden(text, real)
    _shrink_keys(text, real, layers, hidden)
    for section in keys.SECTIONS:
        if isinstance(text.get(section), dict):
            _shrink_keys(text[section], real, layers, hidden)
            if "sparse_num_index_heads" in text[section]:
                text[section]["sparse_num_index_heads"] = text["num_key_value_heads"]
            if "num_heads" in text[section]:
                text[section]["num_heads"] = keys.HEADS
            if section == "attention_other_setting":
                text[section]["num_attention_heads"] = keys.COUNTS["num_sliding_attention_heads"]
    for key in real.expert_count_keys:
        text[key.rpartition(".")[2]] = experts
    for key in keys.TOP_K:
        if isinstance(text.get(key), int):
            text[key] = top_k
    text["num_hidden_layers"] = len(layers)
    leading = text.get("first_k_dense_replace")
    if isinstance(leading, int):
        text["first_k_dense_replace"] = sum(layer < leading for layer in layers)
    text["vocab_size"] = vocabulary.size
    for part in (tiny, text):
        _shrink_vision(part, hidden)
        _tokens(part, vocabulary)
        for key in keys.DROPPED:
            part.pop(key, None)
        for key, value in keys.OUTER.items():
            if key in part:
                part[key] = value
    if real.vision_parameters and not isinstance(tiny.get("vision_config"), dict):
        _without_tower(tiny, real, hidden)
    return tiny


def _without_tower(tiny: dict[str, Any], real: ModelSpec, hidden: int) -> None:
    """A trimmed config whose family stands a published tower in: a small one where the family reads it, else none."""
    if real.family != "llama4":
        tiny["vision_config"] = None
        return
    from reapc.arch.llama4 import VISION

    tiny["vision_config"] = {**VISION, "num_attention_heads": 16, "pixel_shuffle_ratio": 0.5}
    _shrink_vision(tiny, hidden)


def _hidden(text: dict[str, Any], real: ModelSpec) -> int:
    """The hidden size; wide enough for the heads where their size is not stated."""
    base = keys.HIDDEN
    if text.get("head_dim") is None and not real.latent_attention:
        base = max(base, keys.HEADS * real.head_dim)
    return small(real.hidden_size, base)


def _shrink_keys(text: dict[str, Any], real: ModelSpec, layers: Sequence[int], hidden: int) -> None:
    """Widths, heads and per-layer lists of one table of the config, in place."""
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(value := text.get("linear_num_value_heads"), int):
        ratio = value // text["linear_num_key_heads"]
        text["linear_num_value_heads"] = keys.COUNTS["linear_num_key_heads"] * ratio
    for key in keys.KV_COUNTS:
        if isinstance(value := text.get(key), int) and value > 1:
            text[key] = min(value, keys.HEADS if value == heads else keys.KV_HEADS)
    for key, base in (("num_global_key_value_heads", 1), ("swa_num_key_value_heads", keys.HEADS)):
        if isinstance(value := text.get(key), int):
            text[key] = min(value, keys.KV_HEADS if value == kv_heads else base)
    for key, count in keys.COUNTS.items():
        if isinstance(value := text.get(key), int):
            text[key] = min(value, count)
    for key in keys.WIDTHS:
        if isinstance(value := text.get(key), int) and value > 0:
            wide = key in keys.DENSE_WIDTHS and value != real.expert_intermediate_size
            text[key] = hidden if key == "hidden_size" else small(value, keys.WIDE if wide else keys.EXPERT)
    _cut_lists(text, real.num_layers, layers)


def _cut_lists(text: dict[str, Any], count: int, layers: Sequence[int]) -> None:
    """What the config says layer by layer, for the layers that stay; entries of MTP layers behind them stay too."""
    place = {layer: index for index, layer in enumerate(layers)}
    for key, value in text.items():
        if (first := keys.LAYER_NUMBERS.get(key)) is not None and value is not None:
            numbers = [int(n) for n in (value.split(",") if isinstance(value, str) else value)]
            kept = [place[n - first] + first for n in numbers if n - first in place]
            text[key] = ",".join(map(str, kept)) if isinstance(value, str) else kept
        elif key in keys.LAYER_PATTERNS and isinstance(value, str):
            text[key] = "".join(value[layer] for layer in layers)
        elif isinstance(value, list) and count <= len(value) <= count + 8:
            text[key] = [*(value[layer] for layer in layers), *value[count:]]
        elif key in keys.LAST_LAYER and isinstance(value, int) and value >= 0:
            text[key] = max((place[n] for n in place if n <= value), default=-1)


def _shrink_vision(config: dict[str, Any], hidden: int) -> None:
    """The tower's config, in place."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return
    marks = vision.get("deepstack_visual_indexes")
    depth = max(2, len(marks) if isinstance(marks, list) else 0)
    for key, value in list(vision.items()):
        if key[0] == "_":
            del vision[key]
        elif key in keys.VISION_DEPTH:
            vision[key] = depth
        elif key in keys.VISION_TEXT:
            vision[key] = hidden
        elif key == "image_size" and isinstance(value, int):
            vision[key] = 4 * vision["patch_size"]
        elif key in keys.VISION and isinstance(value, int):
            vision[key] = keys.VISION[key]
    if isinstance(marks, list):
        vision["deepstack_visual_indexes"] = list(range(len(marks)))


def _tokens(config: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Ids of special tokens that the tiny tokenizer has, in place."""
    known = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
    others = 0
    for key, value in config.items():
        if key in known and value is not None:
            config[key] = [known[key]] if isinstance(value, list) else known[key]
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            others += 1
            config[key] = vocabulary.size - others
