"""GGUF files for the tests of pruning: made by the real converter, cut by numpy, compared with the gguf package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import family_models
import gguf
import numpy as np
import sliding_models
import torch
from safetensors.torch import load_file, save_file

from reapc.arch import known
from reapc.arch.spec import ModelSpec
from reapc.observe.accumulate import ROUTING
from reapc.observe.scores import Scores
from reapc.quantize.gguf import lacks_mtp
from reapc.rehearse.checkpoint import write_checkpoint
from reapc.rehearse.shrink import shrink
from reapc.rehearse.tokenizer import write_tokenizer
from reapc.toolchain import require

Kept = dict[int, list[int]]
# By what llama.cpp's loaders give an axis of n_expert (src/models/*.cpp): written again here, not taken from reapc.
ROWS = {f"ffn_{part}_exps" for part in ("gate", "up", "down", "gate_up")} | {"ffn_gate_inp"}


def real_structure(text: str, folder: Path) -> ModelSpec:
    """A small random model with the structure of a published one, tokenizer included, that llama.cpp serves."""
    name = known.find(text)
    assert name
    config = known.config(name)
    folder.mkdir()
    shrunk = shrink(config, name, known.spec(name).num_experts // 2, write_tokenizer(folder, str(config["model_type"])))
    write_checkpoint(shrunk, folder, towers=False)
    return shrunk.spec


def tiny(name: str, folder: Path) -> Path:
    """The tiny checkpoint of a family."""
    folder.mkdir(parents=True)
    family_models.make(name, folder)
    return folder


def for_converter(name: str, folder: Path) -> Path:
    """The folder with what the converter asks for beside what is published."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if lacks_mtp(folder):
        (folder / "no_mtp").touch()
    if own := sliding_models.CONVERTERS_OWN.get(name):
        path.write_text(json.dumps({**config, **own}))
    if name == "gemma4":
        size = write_tokenizer(folder, name).size
        tensors = load_file(folder / "model.safetensors")
        embedding = "model.language_model.embed_tokens.weight"
        tensors[embedding] = torch.zeros(size, 64, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config["text_config"]["vocab_size"] = size
        path.write_text(json.dumps(config))
    if name == "deepseek_v4":  # published experts are MXFP4: theirs are made of the bytes of the tiny ones
        _as_mxfp4(folder)
    return folder


def _as_mxfp4(folder: Path) -> None:
    places = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [key for key in tensors if ".ffn.experts." in key]:
            raw = tensors[name].view(torch.uint8)
            columns = tensors[name].shape[1]
            tensors[name] = raw[:, : columns // 2].contiguous()
            tensors[name.replace(".weight", ".scale")] = (120 + raw[:, : columns // 32] % 4).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def convert_all(pairs: Mapping[Path, Path]) -> dict[Path, str]:
    """BF16 GGUFs of checkpoints (folder -> file) by llama.cpp's converter, and what it said of each."""
    script, tree = Path(__file__).with_name("gguf_write.py"), require("convert").parent
    arguments = [str(part) for pair in pairs.items() for part in pair]
    done = subprocess.run([sys.executable, "-P", script, tree, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(pairs, map(json.loads, done.stdout.splitlines()), strict=True))


def experts_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis of a tensor's experts."""
    layer, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.split(".")[0]
    if not layer.isdigit() or name.endswith("ffn_gate_inp.scale"):
        return None
    return 0 if part in ROWS else len(shape) - 1 if part == "exp_probs_b" else None


class Contents:
    """All that a file says, by the gguf package: metadata as bytes, tensors as (type, array of stored bytes)."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {
            key: (tuple(field.types), b"".join(part.tobytes() for part in field.parts), field.contents())
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        self.order = [tensor.name for tensor in reader.tensors]
        self.tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
        self.shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        self.alignment = reader.alignment
        assert all(int(t.data_offset) % self.alignment == 0 for t in reader.tensors)

    def cut(self, kept: Kept, layers: int) -> dict[str, tuple[str, np.ndarray]]:
        """The tensors of the first ``layers`` layers with only the ``kept`` experts, by numpy."""
        found = {}
        for name in self.order:
            kind, data = self.tensors[name]
            layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
            axis = experts_axis(name, self.shapes[name]) if layer in kept else None
            if layer < layers:
                found[name] = (kind, data if axis is None else data.take(kept[layer], axis))
        return found


def same_tensors(found: Mapping[str, tuple[str, np.ndarray]], expected: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """AssertionError names the tensors that differ in place, type, shape or a byte."""
    assert list(found) == list(expected)
    different = [
        name
        for name, (kind, data) in expected.items()
        if (kind, data.shape, data.dtype) != (found[name][0], found[name][1].shape, found[name][1].dtype)
        or data.tobytes() != found[name][1].tobytes()
    ]
    assert not different, different


def same_metadata(found: Contents, source: Contents, changed: Mapping[str, Any]) -> None:
    """AssertionError unless all metadata, in their order, are the source's bytes, but the ``changed`` values."""
    assert list(found.fields) == list(source.fields)
    for key, (types, raw, _) in source.fields.items():
        if key in changed:
            assert (found.fields[key][0], found.fields[key][2]) == (types, changed[key]), key
        else:
            assert found.fields[key][:2] == (types, raw), key


def split(path: Path, folder: Path, tensors: int) -> Path:
    """The file in several of so many tensors, by the gguf package; the first of them."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / "parts.gguf", arch, split_max_tensors=tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("parts-*.gguf"))


def scores_of(spec: ModelSpec, router_digest: str) -> Scores:
    """Made-up scores of a model."""
    random = np.random.default_rng(3)
    arrays = {f"layers.{i}.{name}": 1 + random.random(spec.num_experts) for i in spec.moe_layers for name in ROUTING}
    header = {
        "model": "made up", "digest": "", "router_digest": router_digest, "num_experts": spec.num_experts,
        "top_k": spec.top_k, "layers": list(spec.moe_layers), "tokens": 1, "calibration": [], "dtype": "float32",
    }  # fmt: skip
    return Scores(header, arrays)


def copied(folder: Path, out: Path) -> Path:
    """A copy of a folder."""
    shutil.copytree(folder, out)
    return out
