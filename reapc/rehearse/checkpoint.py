"""Writes a checkpoint of random numbers from a ModelSpec alone: every tensor by its name, shape and dtype on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reapc.arch.spec import ModelSpec, TensorGroup, TensorSpec
from reapc.checkpoint.packed import PackedLinear, find_packed
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.formats.layout import SAFETENSORS, tensors_of
from reapc.formats.quantization import Quantization, quantization_of
from reapc.rehearse import packed
from reapc.rehearse.shrink import Shrunk
from reapc.stream.families import text_config

if TYPE_CHECKING:
    import torch

SEED = 0
SHARDS = 2  # so that the code that reads an index has one to read
# A published model's 0.02 belongs to widths of thousands. At a width of 256 it would make every answer the same, and
# the comparison at the end blind to exchanged tensors.
STD, EMBEDDING_STD, BIAS_STD = 0.05, 0.1, 0.01
_ONES = ("scale", "layer_scalar", ".D")


class Written(NamedTuple):
    """What a checkpoint holds: bytes of all tensors, their number, and how many belong to the vision tower."""

    bytes: int
    tensors: int
    vision: int


class _Piece(NamedTuple):
    """A tensor of the plain model, and the tensors on disk that it becomes: itself, or the parts of its packing."""

    plain: Slot
    group: TensorGroup | None
    slots: tuple[Slot, ...]
    packed: PackedLinear | None = None


def write_checkpoint(shrunk: Shrunk, folder: Path, towers: bool = True) -> Written:
    """Writes weights, their index, config.json and generation_config.json of the tiny model to ``folder``, which has
    its tokenizer already, in the packing that the source is published in. ``towers``: the vision tower too, where
    transformers' class has the numbers that the config says."""
    tower = vision_shapes(shrunk.config, shrunk.spec) if towers and shrunk.spec.vision_parameters else {}
    config = shrunk.config
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = text_config(config)
    ids = {key: value for key in ("bos_token_id", "eos_token_id", "pad_token_id") if (value := text.get(key))}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    dtype = SAFETENSORS.get(shrunk.spec.dtype, "BF16")
    quantization = quantization_of(config, str(folder / "config.json"))
    pieces = [_piece(tensor, group, dtype, quantization) for tensor, group in tensors_of(shrunk.spec, mtp=True)]
    total = sum(slot.bytes for piece in pieces for slot in piece.slots)
    shards: dict[str, list[_Piece]] = {}
    done = 0
    for piece in pieces:
        number = min(done * SHARDS // max(total, 1), SHARDS - 1) + 1
        shards.setdefault(f"model-{number:05}-of-{SHARDS:05}.safetensors", []).append(piece)
        done += sum(slot.bytes for slot in piece.slots)
    outside = [Slot(name, dtype, shape) for name, shape in tower.items()]
    last = shards.setdefault(f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors", [])
    last += [_Piece(slot, None, (slot,)) for slot in outside]
    for name, own in shards.items():
        values = (tensor for piece in own for tensor in _tensors(piece, shrunk.spec))
        write_streamed(folder / name, [slot for piece in own for slot in piece.slots], values, {"format": "pt"})
    write_index(folder, {name: [slot for piece in own for slot in piece.slots] for name, own in shards.items()})
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Written(size, len(pieces) + len(tower), len(tower))


def _piece(tensor: TensorSpec, group: TensorGroup, dtype: str, rules: Quantization | None) -> _Piece:
    plain = Slot(tensor.name, SAFETENSORS[group.dtype] if group.dtype else dtype, tensor.shape)
    found = find_packed(tensor, group, rules, {}, "the tiny model") if rules is not None else None
    if found is None:
        return _Piece(plain, group, (plain,))
    dtypes = {name: packed.part_dtype(found.linear.packing, part) for name, part in found.parts.items()}
    slots = tuple(Slot(name, dtypes[name], part.shape) for name, part in found.parts.items())
    return _Piece(plain, group, slots, found.linear)


def _tensors(piece: _Piece, spec: ModelSpec) -> Iterator[torch.Tensor]:
    """The numbers of every slot, in their order."""
    weight = random_tensor(piece.plain, piece.group, spec)
    if piece.packed is None:
        yield weight
        return
    values = packed.encode_all(weight, piece.packed)
    for key, slot in zip(piece.packed.parts, piece.slots, strict=True):
        yield values[key].reshape(slot.shape).to(_torch_dtype(slot.dtype))


def random_tensor(slot: Slot, group: TensorGroup | None, spec: ModelSpec) -> torch.Tensor:
    """The numbers of one tensor, the same each time: norms are ones, matrices normal, tables of experts valid."""
    import hashlib

    import torch

    number = int.from_bytes(hashlib.sha256(f"{SEED} {slot.name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    kind = _torch_dtype(slot.dtype)
    if not kind.is_floating_point:  # DeepSeek-V4's table from tokens to experts: (tokens, top-k), all different
        *outer, chosen = slot.shape
        scores = torch.rand((*outer, spec.num_experts), generator=generator)
        return scores.topk(min(chosen, spec.num_experts)).indices.to(kind)
    role = group.role if group is not None else "other"
    name = slot.name.removesuffix(".weight")
    if name.endswith(_ONES) or ((role == "norm" or "norm" in name.rpartition(".")[2]) and not name.endswith("bias")):
        return torch.ones(slot.shape, dtype=kind)
    std = EMBEDDING_STD if role in ("embedding", "lm_head") else STD
    if len(slot.shape) < 2:
        std = BIAS_STD
    elif "conv" in name:
        std = 1 / sqrt(slot.shape[-1])
    return (torch.randn(slot.shape, generator=generator) * std).to(kind)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
        "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip
    return found[name]


def vision_shapes(config: dict[str, Any], spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower as transformers' class saves them; empty where it does not know the model,
    or where its tower has not the number of parameters that the config was read to have."""
    import logging

    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(known)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    except Exception:  # whatever a class makes of a config that it was not made for: the tower is optional
        return {}
    finally:
        theirs.set_verbosity(before)
    ours = _outside_text(shapes)
    found = sum(prod(shape) for shape in ours.values())
    return ours if found == spec.vision_parameters else {}


def _outside_text(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The parameters that are not the language model's."""
    return {
        name: shape for name, shape in shapes.items() if "language_model" not in name and not name.startswith("lm_head")
    }
