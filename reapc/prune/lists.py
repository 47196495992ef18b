"""Lists of modules in a ``quantization_config``, for experts that were renumbered.

An entry (a name, a part of one, a regular expression) stays as it is while it says the same of every expert of a layer.
One that tells experts apart is replaced by the names of the modules that it decides about, as they are called now. How
entries match, and which one decides, are the rules of the libraries (see formats/quantization.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.quantization import wildcard
from reapc.prune.names import Names

FILES = ("quantize_config.json", "quantization_config.json")  # where GPTQModel and AutoRound write it once more
_REGEX = set(r"*+?^$()[]{}|\\")


class ModuleLists:
    """Rewrites lists for the experts ``kept`` (by layer) of a checkpoint with these tensors."""

    def __init__(self, names: Names, kept: Mapping[int, list[int]], tensors: Iterable[str], where: str) -> None:
        self.where = where
        self._modules: dict[str, str | None] = {}  # as it was called -> as it is called now, None where it left
        self._families: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)  # one linear of a layer's experts
        for name in tensors:
            module = name.rpartition(".")[0]
            place = names.place(f"{module}.")
            if names.is_dropped(f"{module}."):
                continue
            self._modules[module] = module
            if place and place.kind == "one":
                behind = place.behind.removesuffix(".")
                self._families[place.before, behind][place.expert] = module
                position = {e: i for i, e in enumerate(kept[place.layer])}.get(place.expert)
                self._modules[module] = None if position is None else f"{place.before}{position}{behind}"
        words = "|".join(sorted(re.escape(word) for word in names.words)) or "experts"
        self._numbered = re.compile(rf"(?:^|(?:{words})\\?[./])\(?\d")

    def rewritten(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with its lists; CannotBeDone for a list that numbers experts and is not known here."""
        result = deepcopy(config)
        method = config.get("quant_method")
        if method == "gptq":
            handled = self._gptq(result)
        elif method == "auto-round":
            handled = self._auto_round(result)
        elif method == "compressed-tensors":
            handled = self._compressed_tensors(result)
        elif method == "modelopt":
            handled = self._modelopt(result)
        else:
            handled = [key for key in ("modules_to_not_convert", "ignored_layers") if key in config]
            for key in handled:
                result[key] = self._list(key, config[key], _at_a_dot)
        for key, value in config.items():
            if key not in handled and (name := next((text for text in _texts(value) if self._is_numbered(text)), None)):
                raise CannotBeDone(
                    f"{self.where}: quantization_config: {key} names experts by number ({name!r}), and how it is read "
                    "is not known in this version"
                )
        return result

    def _is_numbered(self, text: str) -> bool:
        return self._numbered.search(text) is not None

    def _gptq(self, config: dict[str, Any]) -> list[str]:
        dynamic: dict[str, Any] = config.get("dynamic") or {}
        rules = {key: self._pattern("dynamic", re.sub(r"^[-+]:", "", key)) for key in dynamic}
        decided = self._decided(list(dynamic), lambda key, module: bool(rules[key].match(module)))
        if dynamic:
            found: dict[str, Any] = {}
            for key, value in dynamic.items():
                sign = key[:2] if key[:2] in ("-:", "+:") else ""
                new = self._new("dynamic", key, decided[key])
                for name in [key] if new is None else [f"{sign}{re.escape(name)}$" for name in new]:
                    found.setdefault(name, value)
            config["dynamic"] = found
        key = "modules_in_block_to_quantize"
        if key in config:
            config[key] = self._parts_of_names(key, config[key])
        return ["dynamic", key]

    def _parts_of_names(self, key: str, value: Any) -> Any:
        """A (nested) list of parts of names, which speak of all layers at once: the numbers past the last expert go."""
        texts = list(_texts(value))
        if not any(self._is_numbered(text) for text in texts):
            return value
        chosen = [module for module in self._modules if any(text in module for text in texts)]
        if not self._is_even(chosen):
            raise CannotBeDone(f"{self.where}: quantization_config: {key} treats experts of one layer differently")
        new = [module for module in self._modules.values() if module is not None]

        def kept(item: Any) -> Any:
            if isinstance(item, list):
                return [inner for inner in map(kept, item) if inner not in (None, [])]
            return item if not self._is_numbered(item) or any(item in module for module in new) else None

        return kept(value)

    def _auto_round(self, config: dict[str, Any]) -> list[str]:
        """An exact name decides, then the end of one, then a pattern; of several the first."""
        extra: dict[str, Any] = config.get("extra_config") or {}
        patterns = {key: self._pattern("extra_config", key) for key in extra if _REGEX & set(key)}
        order = [
            *((key, lambda key, module: key == module) for key in extra),
            *((key, lambda key, module: module.endswith(f".{key}")) for key in extra),
            *((key, lambda key, module: bool(patterns[key].search(module))) for key in patterns),
        ]
        decided: dict[str, list[str]] = {key: [] for key in extra}
        for module in self._modules if extra else ():
            if (key := next((key for key, matches in order if matches(key, module)), None)) is not None:
                decided[key].append(module)
        found: dict[str, Any] = {}
        for key, value in extra.items():
            new = self._new("extra_config", key, decided[key])
            found |= dict.fromkeys([key] if new is None else new, value)
        if extra:
            config["extra_config"] = found
        return ["extra_config"]

    def _compressed_tensors(self, config: dict[str, Any]) -> list[str]:
        def matches(entry: str, module: str) -> bool:
            return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module

        if "ignore" in config:
            config["ignore"] = self._list("ignore", config["ignore"] or [], matches)
        for name, group in (config.get("config_groups") or {}).items():
            if isinstance(group, dict) and group.get("targets"):
                group["targets"] = self._list(f"config_groups.{name}.targets", group["targets"], matches)
        return ["ignore", "config_groups"]

    def _modelopt(self, config: dict[str, Any]) -> list[str]:
        def matches(entry: str, module: str) -> bool:
            return wildcard(entry).fullmatch(module) is not None

        lists = [key for key in ("ignore", "exclude_modules") if config.get(key)]
        for key in lists:
            config[key] = self._list(key, config[key], matches)
        if layers := config.get("quantized_layers"):
            found: dict[str, Any] = {}
            for entry, value in layers.items():
                new = self._new("quantized_layers", entry, [m for m in self._modules if matches(entry, m)])
                found |= dict.fromkeys([entry] if new is None else new, value)
            config["quantized_layers"] = found
        return [*lists, "quantized_layers"]

    def _pattern(self, key: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise ReapcError(
                f"{self.where}: quantization_config: {key}: {text!r} is not a regular expression: {error}"
            ) from error

    def _list(self, key: str, entries: list[str], matches: Callable[[str, str], bool]) -> list[str]:
        """A list in which every entry counts."""
        found: dict[str, None] = {}
        for entry in entries:
            plain = not entry.startswith("re:")
            if not plain:
                self._pattern(key, entry[3:])
            if plain and not self._is_numbered(entry):
                found[entry] = None
                continue
            new = self._new(key, entry, [module for module in self._modules if matches(entry, module)])
            found |= dict.fromkeys([entry] if new is None else new)
        return list(found)

    def _decided(self, keys: list[str], matches: Callable[[str, str], bool]) -> dict[str, list[str]]:
        """The modules that each entry decides about, where the first one that matches does."""
        decided: dict[str, list[str]] = {key: [] for key in keys}
        for module in self._modules if keys else ():
            if (key := next((key for key in keys if matches(key, module)), None)) is not None:
                decided[key].append(module)
        return decided

    def _new(self, key: str, entry: str, decided: list[str]) -> list[str] | None:
        """The names that take an entry's place; None where it stays."""
        if not decided and self._is_numbered(entry):
            bare = entry.removesuffix(".weight")
            if bare != entry and bare in self._modules:
                return [f"{name}.weight" for name in self._new(key, bare, [bare]) or [bare]]
            raise CannotBeDone(
                f"{self.where}: quantization_config: {key}: {entry!r} names an expert by number, and no module here is "
                "called so",
                hint="take its 16 bit original, or mend the list",
            )
        if self._is_even(decided):
            return None
        return [name for module in decided if (name := self._modules[module]) is not None]

    def _is_even(self, modules: list[str]) -> bool:
        """Whether of each linear of each layer all experts are among the ``modules``, or none."""
        chosen = set(modules)
        return all(len({module in chosen for module in family.values()}) == 1 for family in self._families.values())


def _at_a_dot(entry: str, module: str) -> bool:
    padded = f".{module}."
    return padded.startswith(f".{entry}.") or padded.endswith(f".{entry}.")


def _texts(value: Any) -> Iterable[str]:
    """Every string in a value, keys of tables included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (str(key), *_texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
