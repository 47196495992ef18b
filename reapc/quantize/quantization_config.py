"""``quantization_config`` as vLLM and transformers read it, from the list of linears and the format of each.

vLLM asks about a layer's experts by one name ("model.layers.3.mlp.experts") and about q, k and v by another
("...qkv_proj"), transformers and the quantizers about every linear by its own: each config answers both.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from reapc.formats.weights import WeightFormat
from reapc.quantize.published import Modules, default_of, experts_parts


def for_auto_round(fmt: WeightFormat, modules: Modules, blocks: str) -> dict[str, Any]:
    """AutoRound's own; ``blocks`` is the path of the decoder layers ("model.layers"), outside which nothing is
    quantized. vLLM (inc/config_parser.py) looks up the name of the fused experts as it stands."""
    default = default_of(fmt, modules)
    named = [*modules.items(), *experts_parts(modules)]
    extra = {
        module: changes(item, default) if item else {"bits": 16, "data_type": "fp"}
        for module, item in named
        if item != default and module.startswith(f"{blocks}.")
    }
    found: dict[str, Any] = {
        "quant_method": "auto-round",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": blocks,
    }
    return {**found, "extra_config": extra} if extra else found


def changes(item: WeightFormat, default: WeightFormat) -> dict[str, int]:
    """What a linear's exception says: its width, and its group size where that is not the top level's."""
    other = {"group_size": item.group_size} if item.group_size != default.group_size else {}
    return {"bits": item.bits, **other}


def for_compressed_tensors(fmt: WeightFormat, modules: Modules) -> dict[str, Any]:
    """compressed-tensors' "pack-quantized": a group for each width, the commonest one of the experts by a pattern and
    that of the other linears by their class, exceptions by name and first.

    transformers 5.23 (integrations/compressed_tensors.py) knows one group for all experts, the one with a pattern that
    has "experts" in it, and one for all other linears; it fails to load a checkpoint with more. vLLM takes any."""
    experts, others = _counted(modules, True), _counted(modules, False)
    targets: list[tuple[WeightFormat, list[str]]] = []
    if len({*experts, *others}) > 1:
        for counts, is_expert in ((experts, True), (others, False)):
            for other in counts[1:]:
                named = [name for name, item in modules.items() if item == other]
                targets.append((other, [name for name in named if _is_expert(name) == is_expert]))
        if experts:
            targets.append((experts[0], [r"re:.*\.experts\.\d+\..*"]))
    targets.append((others[0] if others else experts[0], ["Linear"]))
    ignored = [module for module, item in modules.items() if item is None]
    if "lm_head" not in ignored:  # tied to the embedding on disk, but engines still have a module of that name
        ignored.append("lm_head")
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": {
                    "num_bits": item.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": item.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (item, names) in enumerate(targets)
        },
        "ignore": ignored,
    }


def _is_expert(module: str) -> bool:
    return re.search(r"\.experts\.\d+\.", module) is not None


def _counted(modules: Modules, experts: bool) -> list[WeightFormat]:
    """The formats of the experts' linears, or of the others, the commonest first."""
    found = Counter(item for name, item in modules.items() if item and _is_expert(name) == experts)
    return [item for item, _ in found.most_common()]


def for_gptq(fmt: WeightFormat, modules: Modules) -> dict[str, Any]:
    """GPTQ's, with ``dynamic`` for what differs: patterns matched from the start of a name, the first one counts."""
    default = default_of(fmt, modules)
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "true_sequential": True,
    }
    dynamic = _dynamic(modules, default)
    return {**found, "dynamic": dynamic} if dynamic else found


def _dynamic(modules: Modules, default: WeightFormat) -> dict[str, dict[str, int]]:
    """A pattern for each folder of linears: it also matches the name of what an engine makes of them (qkv_proj)."""
    experts = dict(experts_parts(modules))
    folders: dict[str, dict[str, WeightFormat | None]] = {}
    for module, item in modules.items():
        if not _is_expert(module):
            folders.setdefault(module.rpartition(".")[0], {})[module] = item
    kept: dict[str, dict[str, int]] = {}
    other: dict[str, dict[str, int]] = {}
    for folder, children in folders.items():
        formats = set(children.values())
        if f"{folder}.experts" in experts:  # a pattern for the folder would also match the name of its experts
            for module, item in children.items():
                if item is None:
                    kept[f"-:{_pattern(module)}$"] = {}
                elif item != default:
                    other[f"+:{_pattern(module)}$"] = changes(item, default)
            continue
        if formats == {None}:
            kept[f"-:{_pattern(folder)}\\.[^.]+$" if folder else "-:lm_head$"] = {}
            continue
        kept |= {f"-:{_pattern(module)}$": {} for module, item in children.items() if item is None}
        for item in formats - {None, default}:
            assert item is not None
            other[f"+:{_pattern(folder)}\\.[^.]+$"] = changes(item, default)
    for path, item in experts.items():
        if item is None:
            kept[f"-:{_pattern(path)}(\\.|$)"] = {}
        elif item != default:
            other[f"+:{_pattern(path)}(\\.|$)"] = changes(item, default)
    return kept | other


def _pattern(name: str) -> str:
    """``name`` as a regular expression; vLLM calls "model.language_model." "language_model.model."."""
    rest = name.removeprefix("model.language_model.")
    return re.escape(name) if rest == name else rf".*language_model\..*{re.escape(rest)}"
