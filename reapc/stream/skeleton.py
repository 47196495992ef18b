"""The transformers model of a checkpoint on the meta device, and its tensors under the names that they have on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.stream.families import TRANSFORMERS_TYPE, check_family, check_state

Read = Callable[[str], torch.Tensor]


class Skeleton:
    """``model``: the whole class, ``body``: its decoder (embeddings, layers, final norm), all on the meta device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        check_family(checkpoint.spec, str(checkpoint.folder))
        check_state(checkpoint.spec, checkpoint.config, str(checkpoint.folder))
        self._where = str(checkpoint.folder)
        self.config = make_config(checkpoint)
        with torch.device("meta"):
            self.model = auto_class(self.config).from_config(self.config, dtype=dtype).eval()
        body = self.model.get_decoder()
        self.body: Any = body if hasattr(body, "layers") else body.model
        self.text = self.body.config
        self._path: dict[nn.Module, str] = {module: name for name, module in self.model.named_modules()}
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._names = self.model.state_dict()  # meta tensors: names only
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def path(self, module: nn.Module) -> str:
        """The module's place in the whole model."""
        return self._path[module]

    def load(
        self, module: nn.Module, path: str, disk: Iterable[str], read: Read, device: torch.device
    ) -> dict[str, str]:
        """Gives ``module`` (a copy of the one at ``path``) its tensors: ``disk`` names all of them as stored. Any that
        is missing or unexpected is an error. Each takes the dtype that the class gave it: a router's correction bias
        stays fp32 in a 16-bit model. Returns the name on disk of every module that one tensor there became."""
        state, sources = self._converted(disk, read)
        wanted = module.state_dict()
        dot = f"{path}." if path else ""
        found = {name.removeprefix(dot): tensor for name, tensor in state.items() if name.startswith(dot)}
        missing = sorted(wanted.keys() - found.keys())
        others = (name for name in state if name.removeprefix(dot) not in wanted)
        unexpected = sorted(name for name in others if not self._is_ignored(name))
        if missing or unexpected:
            raise CannotBeDone(
                f"{self._where}: {path or 'the model'}: {_listed('not in the checkpoint', missing)}"
                f"{'; ' if missing and unexpected else ''}{_listed('not in the model', unexpected)}",
                hint=f"transformers' {type(module).__name__} and the checkpoint disagree",
            )
        for name, empty in wanted.items():
            tensor = found[name].to(device, empty.dtype)
            if tensor.shape != empty.shape and tensor.numel() == empty.numel():
                tensor = tensor.reshape(empty.shape)
            found[name] = tensor
        module.load_state_dict({name: found[name] for name in wanted}, strict=True, assign=True)
        self.real_buffers(module, device)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return {name.removeprefix(dot).rsplit(".", 1)[0]: source.rsplit(".", 1)[0] for name, source in sources.items()}

    def _converted(self, disk: Iterable[str], read: Read) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors by transformers' names, and the name on disk of each that is one tensor there."""
        from transformers.core_model_loading import rename_source_key

        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        state: dict[str, torch.Tensor] = {}
        sources: dict[str, str] = {}
        collected: dict[str, Any] = {}
        prefix = self.model.base_model_prefix
        for name in disk:
            renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._names)
            if renamed not in self._names and name in self._names:
                renamed, pattern = name, None
            if pattern is None:
                state[renamed] = read(name)
                sources[renamed] = name
                continue
            entry = collected.setdefault(renamed, deepcopy(by_pattern[pattern]))
            entry.add_tensor(renamed, name, pattern, read(name))
            sources[renamed] = name
        for renamed, entry in collected.items():
            made = entry.convert(renamed, model=self.model, config=self.model.config)
            for target, tensor in made.items():
                state[target] = tensor[0] if isinstance(tensor, list) else tensor
        return state, sources

    def _is_ignored(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._ignored)

    def real_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Computes what no checkpoint stores (rotary frequencies, embedding scales) as transformers does on loading."""
        for child in module.modules():
            lost = {name: value for name, value in child.named_buffers(recurse=False) if value.is_meta}
            for name, value in lost.items():
                child._buffers[name] = torch.empty_like(value, device=device)
            if lost:
                with torch.no_grad():
                    self.model._init_weights(child)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"


def make_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of the checkpoint, without its quantization: tensors come decoded."""
    from transformers import CONFIG_MAPPING

    config = deepcopy(checkpoint.config)
    model_type = TRANSFORMERS_TYPE.get(config["model_type"], config["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise CannotBeDone(f"{checkpoint.folder}: transformers does not know the model_type {config['model_type']!r}")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
            section.pop("auto_map", None)
    return CONFIG_MAPPING[model_type].from_dict({**config, **_own_keys(config), "model_type": model_type})


def _own_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.23 does not take from the published keys of a family, under its own names."""
    if config["model_type"] != "mimo_v2_flash":
        return {}
    kinds = ("full_attention", "sliding_attention")
    return {
        "layer_types": [kinds[sliding] for sliding in config["hybrid_layer_pattern"]],
        "mlp_layer_types": ["sparse" if moe else "dense" for moe in config["moe_layer_freq"]],
    }


def auto_class(config: Any) -> Any:
    """transformers' auto class of the whole model, its vision tower included."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    whole = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM
