"""Writes a checkpoint of random numbers from a ModelSpec alone: every tensor by its name, shape and dtype on disk."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reapc.arch.spec import ModelSpec, TensorGroup
from reapc.checkpoint.streamed_writer import Slot, write_index, write_streamed
from reapc.formats import weights
from reapc.formats.layout import SAFETENSORS, tensors_of
from reapc.progress import Progress
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


def write_checkpoint(shrunk: Shrunk, folder: Path, progress: Progress, towers: bool = True) -> Written:
    """Writes weights, their index, config.json and generation_config.json of the tiny model to ``folder``, which has
    its tokenizer already. ``towers``: the vision tower too, where transformers' class has the numbers that the config
    says. An FP8 source becomes FP8."""
    tensors = list(tensors_of(shrunk.spec, mtp=True))
    tower = vision_shapes(shrunk.config, shrunk.spec) if towers and shrunk.spec.vision_parameters else {}
    plain = folder if shrunk.fp8 is None else folder / ".bf16"
    plain.mkdir(exist_ok=True)
    if plain != folder:
        for path in folder.iterdir():
            if path.is_file():
                shutil.copyfile(path, plain / path.name)
    config = shrunk.config
    (plain / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = text_config(config)
    ids = {key: value for key in ("bos_token_id", "eos_token_id", "pad_token_id") if (value := text.get(key))}
    (plain / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    dtype = SAFETENSORS.get(shrunk.spec.dtype, "BF16")
    slots = [(Slot(t.name, SAFETENSORS[group.dtype] if group.dtype else dtype, t.shape), group) for t, group in tensors]
    total = sum(slot.bytes for slot, _ in slots)
    shards: dict[str, list[tuple[Slot, TensorGroup | None]]] = {}
    done = 0
    for slot, group in slots:
        number = min(done * SHARDS // max(total, 1), SHARDS - 1) + 1
        shards.setdefault(f"model-{number:05}-of-{SHARDS:05}.safetensors", []).append((slot, group))
        done += slot.bytes
    last = f"model-{SHARDS:05}-of-{SHARDS:05}.safetensors"
    shards.setdefault(last, []).extend((Slot(name, dtype, shape), None) for name, shape in tower.items())
    for name, entries in shards.items():
        values = (random_tensor(slot, group, shrunk.spec) for slot, group in entries)
        write_streamed(plain / name, [slot for slot, _ in entries], values, {"format": "pt"})
    write_index(plain, {name: [slot for slot, _ in entries] for name, entries in shards.items()})
    if shrunk.fp8 is not None:
        _to_fp8(plain, folder, shrunk.fp8, progress)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Written(size, len(slots) + len(tower), len(tower))


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
        "U8": torch.uint8,
    }  # fmt: skip
    return found[name]


def _to_fp8(plain: Path, folder: Path, published: dict[str, Any], progress: Progress) -> None:
    """The bf16 checkpoint ``plain`` cast to FP8 in ``folder``, under the source's own quantization_config; ``plain``
    goes."""
    from reapc.quantize import fp8

    fmt = weights.parse("fp8-block")
    assert fmt is not None
    out = folder / ".fp8"
    fp8.quantize(plain, out, fmt, progress)
    config = json.loads((out / "config.json").read_text())
    ours = config["quantization_config"]
    # the modules that stay are named layer by layer in some configs: ours are those of the tiny model
    config["quantization_config"] = {**published, "modules_to_not_convert": ours["modules_to_not_convert"]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in out.iterdir():
        path.replace(folder / path.name)
    out.rmdir()
    shutil.rmtree(plain)


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
