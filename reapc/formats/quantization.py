"""``quantization_config``: which linears are quantized and how, by the rules of the libraries that read it.

GPTQ: ``dynamic`` patterns matched from the start of a name, the first one counts (gptqmodel, vLLM gptq_utils).
AutoRound: an exact name in ``extra_config``, then a pattern found anywhere in a name, within
``block_name_to_quantize`` (vLLM inc/config_parser.py). compressed-tensors: ``ignore``, then ``config_groups`` by name,
by pattern, by class. FP8: ``modules_to_not_convert`` by a whole name, its start or its end at a dot (transformers).
ModelOpt: ``ignore`` (once ``exclude_modules``) with * for any part of a name, or a name and what is below it; where
``quantized_layers`` are named, those and what is below them (vLLM modelopt.py).
MXFP4 (gpt-oss): fused experts only, less ``modules_to_not_convert`` as patterns from the start of a name up to a dot or
as its very end (transformers quantizers_utils.should_convert_module; vLLM leaves other linears alone too).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.packing import Packing
from reapc.formats.weights import FP8_BLOCK

READ = ("gptq", "auto-round", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "mxfp4")
EXPERT_DTYPE = "expert_dtype"
_UNQUANTIZED_BITS = 16
_REGEX_CHARACTERS = set(r"*+?^$()[]{}|\\")


class Quantization:
    """The quantization of a checkpoint, read from its config.json; CannotBeDone for what is not read here."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = f"{where}: quantization_config"
        self.method = str(config.get("quant_method"))
        readers: dict[str, Callable[[], Callable[[str], Packing | None]]] = {
            "gptq": self._gptq,
            "auto-round": self._auto_round,
            "compressed-tensors": self._compressed_tensors,
            "fp8": self._fp8,
            "fbgemm_fp8": self._fbgemm,
            "modelopt": self._modelopt,
            "mxfp4": self._mxfp4,
        }
        if self.method not in readers:
            raise self._unread("quant_method", self.method, f"one of {', '.join(READ)}")
        self.packing = lru_cache(maxsize=None)(readers[self.method]())
        """The packing of a module by its name; None where it stays as it is. A class that is not Linear (embeddings) is
        not told apart: ask about linears only."""

    @property
    def refused_by_vllm(self) -> str | None:
        """Why vLLM does not load what is packed so, whatever the model and the card; None where nothing speaks against
        it (facts/vllm-legality.md, facts/vllm-cpu-and-quantized-moe.md)."""
        if self.method in ("gptq", "auto-round") and not self.config.get("sym", True):
            return f"the checkpoint is asymmetric ({self.method}, sym = false), and vLLM loads symmetric experts only"
        if self.method == "gptq" and self.config.get("desc_act") and self.config.get("group_size") != -1:
            return "the checkpoint's columns are reordered (desc_act = true), and vLLM loads no such experts"
        block = self.config.get("weight_block_size")
        if self.method == "fp8" and block and list(block) != [FP8_BLOCK, FP8_BLOCK]:
            return f"the checkpoint's tiles are {block[0]} x {block[1]}; reapc plans {FP8_BLOCK} x {FP8_BLOCK}"
        return None

    def _unread(self, key: str, found: object, expected: str) -> CannotBeDone:
        return CannotBeDone(
            f"{self.where}: {key} = {found!r}: this version reads {expected}", hint="take its 16 bit original"
        )

    def _number(self, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ReapcError(f"{self.where}: {key} = {value!r}: a whole number expected")
        return value

    def _bits(self, config: Mapping[str, Any], key: str = "bits") -> int:
        bits = self._number(config, key)
        if not 2 <= bits <= 8:
            raise self._unread(key, bits, "2 to 8")
        return bits

    def _dict(self, config: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise ReapcError(f"{self.where}: {key}: a table expected, found {type(value).__name__}")
        return value

    def _names(self, key: str) -> list[str]:
        value = self.config.get(key) or []
        if isinstance(value, str):
            value = value.split(",")
        names: list[str] = []
        for item in value:
            names += item if isinstance(item, list) else [item]
        if not all(isinstance(name, str) for name in names):
            raise ReapcError(f"{self.where}: {key}: a list of names expected")
        return names

    def _pattern(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise ReapcError(f"{self.where}: the pattern {text!r} is not a regular expression: {error}") from error

    def _group(self, config: Mapping[str, Any]) -> int:
        size = self._number(config, "group_size")
        if size < -1 or size == 0:
            raise ReapcError(f"{self.where}: group_size = {size}: -1 or more than 0 expected")
        return max(size, 0)

    def _gptq(self) -> Callable[[str], Packing | None]:
        version = self.config.get("checkpoint_format") or self.config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise self._unread("checkpoint_format", version, "gptq and gptq_v2")
        if (pack := self.config.get("pack_dtype", "int32")) != "int32":
            raise self._unread("pack_dtype", pack, "int32")
        rules = [
            (pattern.startswith("-:"), self._pattern(re.sub(r"^[-+]:", "", pattern)), changes or {})
            for pattern, changes in self._dict(self.config, "dynamic").items()
        ]
        only = self._names("modules_in_block_to_quantize")

        def found(config: Mapping[str, Any]) -> Packing:
            return Packing(
                "gptq", self._bits(config), self._group(config), bool(config.get("sym", True)),
                zero_offset=1 if version == "gptq" else 0, act_order=bool(config.get("desc_act", False)),
            )  # fmt: skip

        base = found(self.config)

        def packing(module: str) -> Packing | None:
            if only and not any(part in module for part in only):
                return None
            for negative, pattern, changes in rules:
                if pattern.match(module):
                    return None if negative else found({**self.config, **changes})
            return base

        return packing

    def _auto_round(self) -> Callable[[str], Packing | None]:
        packed = self.config.get("packing_format", "auto_round:auto_gptq")
        if packed != "auto_round:auto_gptq":
            raise self._unread("packing_format", packed, "auto_round:auto_gptq")
        extra = self._dict(self.config, "extra_config")
        blocks = self._names("block_name_to_quantize") or self._names("to_quant_block_names")
        patterns = [(self._pattern(name), changes) for name, changes in extra.items() if _REGEX_CHARACTERS & set(name)]

        def found(changes: Mapping[str, Any]) -> Packing | None:
            config = {**self.config, **changes}
            if self._number(config, "bits") >= _UNQUANTIZED_BITS:
                return None
            if (kind := config.get("data_type", "int")) != "int":
                raise self._unread("data_type", kind, "int")
            return Packing(
                "auto-round", self._bits(config), self._group(config), bool(config.get("sym", True)), zero_offset=1
            )

        base = found({})

        def packing(module: str) -> Packing | None:
            if module in extra:
                return found(extra[module])
            suffix = next((name for name in extra if module.endswith(f".{name}")), None)
            if suffix is not None:
                return found(extra[suffix])
            if blocks and not any(module.startswith(block) for block in blocks):
                return None
            changes = next((changes for pattern, changes in patterns if pattern.search(module)), None)
            return base if changes is None else found(changes)

        return packing

    def _compressed_tensors(self) -> Callable[[str], Packing | None]:
        if (self.config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise self._unread("sparsity_config", self.config["sparsity_config"]["format"], "dense weights")
        targets: list[tuple[str, Packing]] = []
        for name, group in self._dict(self.config, "config_groups").items():
            packing_of_group = self._ct_group(name, group)
            targets += [(str(target), packing_of_group) for target in group.get("targets") or ()]
        ignored = self._names("ignore")
        for pattern in (*ignored, *(target for target, _ in targets)):
            if pattern.startswith("re:"):
                self._pattern(pattern[3:])

        def matches(module: str, target: str) -> bool:
            if target.startswith("re:"):
                return re.match(target[3:], module) is not None
            return target == module

        def packing(module: str) -> Packing | None:
            if "Linear" in ignored or any(matches(module, target) for target in ignored):
                return None
            named = sorted((t for t in targets if matches(module, t[0])), key=lambda t: t[0].startswith("re:"))
            if named:
                return named[0][1]
            return next((found for target, found in targets if target == "Linear"), None)

        return packing

    def _ct_group(self, name: str, group: Mapping[str, Any]) -> Packing:
        layout = group.get("format") or self.config.get("format")
        stored = self._dict(group, "weights")
        strategy, key = stored.get("strategy"), f"config_groups.{name}"
        if stored.get("actorder") not in (None, "static", "weight", False):
            raise self._unread(f"{key}.weights.actorder", stored["actorder"], "static order")
        if not stored.get("symmetric", True):
            raise self._unread(f"{key}.weights.symmetric", False, "symmetric weights")
        kind, bits = stored.get("type", "int"), stored.get("num_bits")
        match layout:
            case "pack-quantized" if kind == "int" and strategy in ("group", "channel"):
                size = self._group(stored) if strategy == "group" else 0
                return Packing("ct", self._bits(stored, "num_bits"), size)
            case "float-quantized" | "naive-quantized" if kind == "float" and bits == 8 and strategy == "channel":
                return Packing("fp8", 8)
            case "float-quantized" | "naive-quantized" if kind == "float" and bits == 8 and strategy == "block":
                return Packing("fp8-block", 8, block=self._block(stored, "block_structure"), block_scale="weight_scale")
            case "float-quantized" | "naive-quantized" if kind == "float" and bits == 8 and strategy == "tensor":
                return Packing("fp8", 8, per_tensor=True)
            case "int-quantized" if kind == "int" and bits == 8 and strategy == "channel":
                return Packing("int8", 8)
            case "nvfp4-pack-quantized" if stored.get("group_size", 16) == 16:
                return Packing("nvfp4", 4, 16, names="ct")
            case "mxfp4-pack-quantized" if stored.get("group_size", 32) == 32:
                return Packing("mxfp4", 4, 32, names="ct")
        raise self._unread(
            key, f"{layout}, {kind}, {bits} bits, strategy {strategy}",
            "pack-quantized (group, channel), float-quantized (channel, block, tensor), int-quantized (channel), "
            "nvfp4-pack-quantized and mxfp4-pack-quantized",
        )  # fmt: skip

    def _block(self, config: Mapping[str, Any], key: str) -> tuple[int, int]:
        value = config.get(key)
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)):
            raise self._unread(key, value, "two numbers, such as [128, 128]")
        return value[0], value[1]

    def _fp8(self) -> Callable[[str], Packing | None]:
        if (fmt := self.config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):  # MiniMax says the latter
            raise self._unread("fmt", fmt, "e4m3")
        if self.config.get("weight_block_size") is None:  # one scale for a linear, as AutoFP8 and Mistral write it
            return self._unless_kept(Packing("fp8", 8, per_tensor=True))
        block = self._block(self.config, "weight_block_size")
        if (scheme := self.config.get("activation_scheme", "dynamic")) != "dynamic":
            raise self._unread("activation_scheme", scheme, "dynamic")
        if (experts := self.config.get(EXPERT_DTYPE)) is None:
            return self._unless_kept(Packing("fp8-block", 8, block=block))
        if experts not in ("fp4", "fp8"):
            raise self._unread(EXPERT_DTYPE, experts, "fp4 and fp8")
        tiles = Packing("fp8-block", 8, block=block, block_scale="scale", names="deepseek_v4")
        four = Packing("mxfp4", 4, 32, names="deepseek_v4") if experts == "fp4" else tiles
        return self._unless_kept(tiles, lambda module: four if re.search(r"\.experts\.\d+\.", module) else tiles)

    def _unless_kept(
        self, usual: Packing, choose: Callable[[str], Packing] | None = None
    ) -> Callable[[str], Packing | None]:
        kept = self._names("modules_to_not_convert") or self._names("ignored_layers")

        def packing(module: str) -> Packing | None:
            padded = f".{module}."
            if any(padded.startswith(f".{name}.") or padded.endswith(f".{name}.") for name in kept):
                return None
            return usual if choose is None else choose(module)

        return packing

    def _fbgemm(self) -> Callable[[str], Packing | None]:
        return self._unless_kept(Packing("fp8", 8))

    def _modelopt(self) -> Callable[[str], Packing | None]:
        ignored = [wildcard(name) for name in (*self._names("ignore"), *self._names("exclude_modules"))]
        algorithm = str(self.config.get("quant_algo"))
        layers = {
            wildcard(name): self._modelopt_algorithm(f"quantized_layers.{name}", str((own or {}).get("quant_algo")))
            for name, own in self._dict(self.config, "quantized_layers").items()
        }
        base = None if algorithm == "MIXED_PRECISION" else self._modelopt_algorithm("quant_algo", algorithm)

        def packing(module: str) -> Packing | None:
            if any(pattern.fullmatch(module) for pattern in ignored):
                return None
            return next((found for pattern, found in layers.items() if pattern.fullmatch(module)), base)

        return packing

    def _modelopt_algorithm(self, key: str, name: str) -> Packing:
        if name in ("NVFP4", "W4A16_NVFP4"):
            if (size := self.config.get("group_size", 16)) not in (None, 16):
                raise self._unread("group_size", size, "16")
            return Packing("nvfp4", 4, 16)
        if name == "FP8":
            return Packing("fp8", 8, per_tensor=True)
        raise self._unread(key, name, "NVFP4, W4A16_NVFP4, FP8 and MIXED_PRECISION of these")

    def _mxfp4(self) -> Callable[[str], Packing | None]:
        kept = self._names("modules_to_not_convert")
        patterns = [self._pattern(rf"(?:{name})(?:(?<=\.)|(?=\.|$))") for name in kept]

        def packing(module: str) -> Packing | None:
            if not module.endswith(".experts") or module.endswith(tuple(kept)):
                return None
            return None if any(pattern.match(module) for pattern in patterns) else Packing("mxfp4", 4, 32)

        return packing


def wildcard(name: str) -> re.Pattern[str]:
    """A name of ModelOpt's lists as a pattern of whole names: itself and what is below it."""
    return re.compile(".*".join(re.escape(part) for part in name.split("*")) + r"(?:\..*)?")


def quantization_config(config: Mapping[str, Any]) -> Any:
    """What a config.json states as its quantization, beside or inside ``text_config``; None where it states none."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or None


def quantization_of(config: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantization that a config.json states; None where it states none."""
    found = quantization_config(config)
    if not found:
        return None
    if not isinstance(found, dict):
        raise ReapcError(f"{where}: quantization_config: a table expected, found {type(found).__name__}")
    if EXPERT_DTYPE in config:  # DeepSeek-V4 says it beside
        found = {**found, EXPERT_DTYPE: config[EXPERT_DTYPE]}
    return Quantization(found, where)
