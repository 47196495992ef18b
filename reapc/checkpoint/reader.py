"""A checkpoint folder: validated against its config, weights one at a time, quantized ones decoded."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from reapc.arch import ModelSpec, TensorGroup, TensorSpec, model_spec
from reapc.checkpoint.config import checkpoint_config
from reapc.checkpoint.packed import Found, PackedLinear, find_packed
from reapc.checkpoint.shards import INDEX, Shards
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import mtp_tensors_of, tensors_of
from reapc.formats.quantization import quantization_config, quantization_of

if TYPE_CHECKING:
    import torch

_SAMPLE = 1 << 20
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".output_scale")  # of an engine's KV cache and outputs
_NAMED = 3  # of several tensors that are wrong, how many a message names


class Checkpoint(Shards):
    """Read access to a folder with config.json and safetensors; validated on opening.

    A quantized checkpoint (``quantization`` says how, None elsewhere) is read as if it were a plain one: ``tensor`` of
    a weight decodes it. Every tensor that its config implies must be there, with its shape, and none beside them in the
    decoder layers: an expert that is not found would otherwise be a random one.

    ``as_stored``: quantized tensors are only ever copied, so a packing that cannot be decoded here is no obstacle and
    what belongs to it is not checked (``prune`` does, by its own rules)."""

    in_files = True  # what is read lies in the shards, which may be read ahead

    def __init__(self, folder: Path, *, as_stored: bool = False) -> None:
        if not folder.is_dir():
            raise ReapcError(f"{folder}: no such folder", hint="a checkpoint is a folder with config.json")
        self.config = checkpoint_config(folder)
        self.spec: ModelSpec = model_spec(self.config, str(folder / "config.json"))
        self.as_stored = as_stored and bool(quantization_config(self.config))
        self.quantization = None if self.as_stored else quantization_of(self.config, str(folder / "config.json"))
        super().__init__(folder)
        self.packed: dict[str, PackedLinear] = {}
        if self.as_stored:
            return
        if self.quantization is None:
            self._check_names()
        else:
            self._check_quantized()

    def _check_names(self) -> None:
        """Every tensor that the config implies must be there, with its shape."""
        missing: list[str] = []
        wrong: list[str] = []
        for tensor in self.spec.tensors():
            entry = self.entries.get(tensor.name)
            if entry is None:
                missing.append(f"tensor {tensor.name!r} is missing ({list(tensor.shape)} expected)")
            elif entry.shape != tensor.shape:
                wrong.append(
                    f"tensor {tensor.name!r} has shape {list(entry.shape)}, config.json implies {list(tensor.shape)}"
                )
        if problems := [*wrong, *missing]:
            raise ReapcError(
                f"{self.folder}: {several(problems)}",
                hint="config.json belongs to another checkpoint" if wrong else "the download is incomplete",
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.entries[name].shape
        if found != shape:
            raise ReapcError(
                f"{self.shard_of[name]}: tensor {name!r} has shape {list(found)}, config.json implies {list(shape)}",
                hint="config.json belongs to another checkpoint, or the weights were packed in another way",
            )

    def _check_quantized(self) -> None:
        """The same for the parts of quantized linears, whose dtypes count too; and nothing unexpected."""
        expected: set[str] = set()
        missing: list[str] = []
        for tensor, group in tensors_of(self.spec):
            found = self._packed(tensor, group)
            if found is None:
                expected.add(tensor.name)
                if tensor.name not in self.entries:
                    missing.append(tensor.name)
                else:
                    self._check_shape(tensor.name, tensor.shape)
                continue
            self.packed[tensor.name] = found.linear
            for name, part in found.parts.items():
                expected.add(name)
                if name not in self.entries:
                    missing.append(name)
                    continue
                self._check_shape(name, part.shape)
                if self.entries[name].dtype not in part.dtypes:
                    raise ReapcError(
                        f"{self.shard_of[name]}: tensor {name!r} is {self.entries[name].dtype}, quantization_config "
                        f"({found.linear.packing}) implies {' or '.join(part.dtypes)}"
                    )
        prefixes = tuple(f"{layer.prefix}." for layer in self.spec.layers)
        outer = {tensor.module for tensor in self.spec.outer_tensors}
        unexpected = [
            name
            for name in self.entries
            if name not in expected
            and not name.endswith(_CACHE_SCALES)
            and (name.startswith(prefixes) or name.rpartition(".")[0] in outer)
        ]
        if missing or unexpected:
            said = [f"{what} {listed(names)}" for what, names in (("misses", missing), ("has", unexpected)) if names]
            raise ReapcError(
                f"{self.folder}: the checkpoint is not what its quantization_config says: it {'; it '.join(said)}"
                + (", which nothing would read" if unexpected else ""),
                hint="quantize or download it again; loaded by force, the weights of such modules would be random",
            )
        self._find_mtp()

    def _find_mtp(self) -> None:
        """Quantized linears of MTP layers, which no forward pass reads: those that are whole."""
        for tensor, group in mtp_tensors_of(self.spec):
            found = self._packed(tensor, group)
            if found is not None and all(
                (entry := self.entries.get(name)) and entry.shape == part.shape and entry.dtype in part.dtypes
                for name, part in found.parts.items()
            ):
                self.packed[tensor.name] = found.linear

    def _packed(self, tensor: TensorSpec, group: TensorGroup) -> Found | None:
        assert self.quantization is not None
        if self.quantization.method == "mxfp4" and self.spec.family != "gpt_oss":
            raise CannotBeDone(
                f"{self.folder / 'config.json'}: quantization_config: quant_method = 'mxfp4' in a {self.spec.family} "
                "model: this version reads it in gpt-oss",
                hint="take its 16 bit original",
            )
        return find_packed(tensor, group, self.quantization, self.entries, str(self.folder / "config.json"))

    @property
    def decodes(self) -> bool:
        """Whether tensors are made anew whenever they are asked for, rather than mapped."""
        return self.quantization is not None

    def refuse_quantized(self, what: str) -> None:
        """CannotBeDone where the checkpoint is quantized; ``what`` takes 16 or 32 bit ("pruning")."""
        if self.quantization is not None:
            raise CannotBeDone(
                f"{self.folder / 'config.json'}: quantization_config: the checkpoint is quantized "
                f"({self.quantization.method}): {what} takes weights in 16 or 32 bit",
                hint="take its 16 bit original",
            )

    @cached_property
    def digest(self) -> str:
        """Identity of config and weights: headers and sizes of all shards, and their content (shards beyond
        1 GiB: sixteen evenly spaced mebibytes, so that naming a 700 GB model takes seconds)."""
        result = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            size = shard.stat().st_size
            result.update(f"{shard.name}:{size}:".encode())
            with shard.open("rb") as file:
                if size <= 1 << 30:
                    while block := file.read(_SAMPLE):
                        result.update(block)
                else:
                    for i in range(16):
                        file.seek((size - _SAMPLE) * i // 15)
                        result.update(file.read(_SAMPLE))
        return result.hexdigest()

    @cached_property
    def side_digest(self) -> str:
        """Identity of the other small files (tokenizer, chat template, generation config)."""
        result = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in _SIDE_FILES and path.name != INDEX:
                result.update(path.name.encode() + b"\0" + path.read_bytes())
        return result.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped from the file; of a quantized linear's weight, what it means, in float32 (of
        gpt-oss's MXFP4 experts in bfloat16: the very tensor of the 16 bit checkpoint)."""
        if name not in self.packed:
            return self.stored_tensor(name)
        linear, where = self.packed[name], str(self.where(name))
        if not linear.experts:
            return linear.weight(self.stored_tensor, 0, "cpu", where)
        import torch

        first = linear.weight(self.stored_tensor, 0, "cpu", where)
        whole = torch.empty(linear.experts, *first.shape, dtype=first.dtype)
        whole[0] = first
        for expert in range(1, linear.experts):
            whole[expert] = linear.weight(self.stored_tensor, expert, "cpu", where)
        return whole

    def _expert(self, name: str, expert: int, device: str | torch.device) -> torch.Tensor:
        if name not in self.packed:
            return self.stored_tensor(name)[expert]
        return self.packed[name].weight(self.stored_tensor, expert, device, str(self.where(name)))

    def read_expert(self, name: str, expert: int, device: str | torch.device = "cpu") -> torch.Tensor:
        """``tensor(name)[expert]`` of a tensor with the experts on its first axis, from this expert's bytes alone, and
        refused as by ``checked_tensor``. A quantized one is decoded on ``device``; others stay mapped."""
        return self._checked(f"tensor {name!r}, expert {expert},", self._expert(name, expert, device), name)

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype of what ``tensor(name)`` gives."""
        if name not in self.packed:
            return self.entries[name].dtype
        return "BF16" if self.packed[name].packing.method == "mxfp4" else "F32"

    def where(self, name: str) -> Path:
        """The shard that the tensor, or the packed weights of a linear, lie in."""
        return self.shard_of[next(iter(self.packed[name].parts.values())) if name in self.packed else name]

    def checked_tensor(self, name: str) -> torch.Tensor:
        """``tensor(name)``, refused by name when it holds NaN or infinity."""
        return self._checked(f"tensor {name!r}", self.tensor(name), name)

    def _checked(self, what: str, tensor: torch.Tensor, name: str) -> torch.Tensor:
        import torch

        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ReapcError(
                    f"{self.where(name)}: {what} holds NaN or infinite weights",
                    hint="the checkpoint is damaged; scores and quantization would be meaningless",
                )
        return tensor


def several(problems: list[str]) -> str:
    """The first few of ``problems``, and how many there are."""
    text = "; ".join(problems[:_NAMED])
    return f"{text}; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else text


def listed(names: list[str]) -> str:
    """The first few of ``names``, and how many there are."""
    text = ", ".join(map(repr, names[:_NAMED]))
    return f"{text} and {len(names) - _NAMED} more" if len(names) > _NAMED else text
