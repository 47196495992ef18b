"""What the user wants: a Recipe, read from TOML. Every key may be "auto" where the compiler can decide."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from reapc.errors import ReapcError
from reapc.mix import MixSource, parse_sources
from reapc.schema import explain_validation, nearest
from reapc.target import Target, is_target, load_target, make_target

Auto = Literal["auto"]
PARSER_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Criterion = Literal["reap", "ean", "ean_sum", "frequency", "weighted_sum"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Ratio = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]


class ModelSection(_Section):
    """Where the checkpoint comes from."""

    source: str = Field(min_length=1)
    revision: str | None = None


class ServeSection(_Section):
    """How the result will be served; the memory model counts exactly this."""

    engine: Literal["auto", "llama.cpp", "vllm"] = "auto"
    context: int = Field(default=4096, ge=16)
    concurrency: int = Field(default=1, ge=1)
    # "native": the engine's own 16 bit; "auto": the planner may quantize the cache
    kv_cache: Literal["native", "auto", "f16", "bf16", "q8_0", "q4_0", "fp8"] = "native"
    # vLLM's tensor parallel degree; with a number only vLLM is planned
    tensor_parallel: Auto | Annotated[int, BeforeValidator(_no_bool), Field(ge=1)] = "auto"
    experimental: Annotated[tuple[str, ...], Field(strict=False)] = ()
    # vLLM's parsers of tool calls and of thoughts; "auto": by the model (engines/parsers.toml)
    tool_parser: Annotated[str, Field(pattern=PARSER_NAME)] = "auto"
    reasoning_parser: Annotated[str, Field(pattern=PARSER_NAME)] = "auto"
    # "mtp": vLLM drafts with the model's own multi-token-prediction layers, whose bytes are then counted
    speculative: Literal["none", "mtp"] = "none"
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)


class PruneSection(_Section):
    """Which experts go."""

    method: Literal["auto", "none"] | Criterion = "auto"
    ratio: Auto | Ratio = "auto"
    experts: Auto | Annotated[int, BeforeValidator(_no_bool), Field(ge=1)] = "auto"
    max_ratio: Ratio = 0.25
    # MTP (drafting) layers: left out, or with as many experts as the others
    mtp: Literal["drop", "prune"] = "drop"
    # one group of the router's groups, so that experts are chosen freely: routing changes
    dissolve_groups: bool = False
    # the kept experts' down projections refitted in closed form to what the original gave (prune/heal.py)
    heal: bool = False


class QuantizeSection(_Section):
    """How many bits each weight gets."""

    method: Literal["auto", "none", "gguf", "auto_round", "gptq", "fp8"] = "auto"
    bits: Auto | Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=16)] = "auto"
    group_size: Auto | Annotated[int, BeforeValidator(_no_bool), Field(ge=16)] = "auto"
    # a format of `reapc formats`, or what the quantizers call one: auto_round, auto_gptq, llm_compressor, gptq
    format: str = "auto"
    # other bits for a part of the model: attention = 8, "layers.0-1" = 16
    mixed: dict[str, Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=16)]] = Field(default_factory=dict)
    # AutoRound's tuning steps per layer; 0 rounds to nearest
    iters: Auto | Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = "auto"
    imatrix: bool = True
    # expert count, KV type and every tensor's GGUF type, or every part's width in vLLM, chosen together (allocate/)
    allocate: bool = False
    # the experts' down projections refitted once more beside all weights as they were quantized (healing.py)
    heal: bool = False
    pre_tokenizer: str | None = None

    @property
    def writer(self) -> str:
        """The method whose tool writes the result: AutoRound's own name for a GPTQ file says that it does."""
        return "auto_round" if self.format == "auto_gptq" else self.method


class CalibrationSection(_Section):
    """The text that decides what an expert is worth."""

    # "auto", a path, a preset's name, or a list of tables (make_recipe reads them)
    data: str | tuple[MixSource, ...] = "auto"
    sequences: int = Field(default=128, ge=1)
    tokens: int = Field(default=512, ge=8)
    seed: int = 0


class VerifySection(_Section):
    """What the result must keep; below a threshold the build fails with exit code 1."""

    data: str = "auto"
    sequences: int = Field(default=64, ge=1)
    max_kl: float | None = Field(default=None, gt=0)
    min_top1: float | None = Field(default=None, ge=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, ge=1)


class OutputSection(_Section):
    """Where the result goes."""

    path: str = ""


class Recipe(_Section):
    """A model, a budget and what to do with them. ``base`` is the folder that relative paths start from."""

    model: ModelSection
    target: Target
    serve: ServeSection = ServeSection()
    prune: PruneSection = PruneSection()
    quantize: QuantizeSection = QuantizeSection()
    calibration: CalibrationSection = CalibrationSection()
    verify: VerifySection = VerifySection()
    output: OutputSection = OutputSection()
    name: str = "recipe"
    base: Path = Path(".")

    def path(self, text: str) -> Path:
        """``text`` as a path, relative ones from the recipe's folder."""
        path = Path(text).expanduser()
        return path if path.is_absolute() else self.base / path

    @property
    def output_path(self) -> Path:
        """The folder that the build writes."""
        return Path(os.path.normpath(self.path(self.output.path))) if self.output.path else Path("out") / self.name


def _override(data: dict[str, Any], assignment: str) -> None:
    """Applies one ``section.key=value``; the value is TOML, or else a plain string."""
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ReapcError(f"--set {assignment!r} is not KEY=VALUE", hint="for example --set prune.ratio=0.25")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    here: Any = data
    for part in parts[:-1]:
        if part == "target" and isinstance(here.get(part), str):
            if not _names_target(here[part]):
                load_target(here[part])  # refuses it, and names the nearest
            here[part] = {"name": here[part]}
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise ReapcError(f"--set {key}: {part!r} is not a section")
    here[parts[-1]] = value


def _names_target(name: Any) -> bool:
    return isinstance(name, str) and (name.endswith(".toml") or is_target(name))


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in ``path`` with ``overrides`` applied; ReapcError names file, key and the mend."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ReapcError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReapcError(f"{path}: not UTF-8 text: {error}") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ReapcError(f"{path}: not valid TOML: {error}") from error
    for assignment in overrides:
        _override(data, assignment)
    return make_recipe(data, path)


def make_recipe(data: dict[str, Any], path: Path) -> Recipe:
    """Validates parsed keys; ``path`` gives the name, the base folder and the place in errors."""
    where = str(path)
    sections = [name for name in Recipe.model_fields if name not in ("name", "base")]
    for key in data:
        if key not in sections:
            raise ReapcError(f"{where}: unknown section {key!r}; {nearest(key, sections)}known: {', '.join(sections)}")
    for key in ("model", "target"):
        if key not in data:
            raise ReapcError(f"{where}: [{key}] is missing", hint="a recipe needs [model] source and [target]")
    target = data["target"]
    if isinstance(target, dict) and (set(target) == {"name"} or _names_target(target.get("name"))):
        overrides = {key: value for key, value in target.items() if key != "name"}
        target = target["name"]
    else:
        overrides = {}
    if isinstance(target, str):
        local = path.parent / target
        resolved = load_target(str(local) if target.endswith(".toml") and local.is_file() else target)
        if overrides:
            resolved = make_target(overrides, where, base=resolved)
    elif isinstance(target, dict):
        resolved = make_target(target, where)
    else:
        raise ReapcError(f"{where}: target = {target!r}: a name or a table is expected")
    calibration = data.get("calibration")
    if isinstance(calibration, dict) and not isinstance(calibration.get("data", ""), str):
        sources = parse_sources(calibration["data"], f"{where}: calibration.data")
        data = {**data, "calibration": {**calibration, "data": sources}}
    try:
        recipe = Recipe(**{**data, "target": resolved}, name=path.stem, base=path.parent)
    except ValidationError as error:
        raise ReapcError(explain_validation(error, Recipe, where)) from error
    if recipe.prune.ratio != "auto" and recipe.prune.experts != "auto":
        raise ReapcError(f"{where}: prune.ratio and prune.experts are both given", hint="remove one of them")
    if recipe.quantize.group_size != "auto" and recipe.quantize.method not in ("auto_round", "gptq"):
        raise ReapcError(
            f"{where}: quantize.group_size = {recipe.quantize.group_size}: GGUF types have blocks of their own",
            hint='remove it, or set quantize.method to "auto_round" or "gptq"',
        )
    if recipe.quantize.mixed and recipe.quantize.method in ("none", "gguf"):
        raise ReapcError(
            f'{where}: quantize.mixed, but quantize.method = "{recipe.quantize.method}"',
            hint="llama-quantize mixes types by itself; mixed is for auto_round, gptq and fp8",
        )
    if recipe.quantize.allocate:
        quantize = recipe.quantize
        exports = ("auto", "auto_round", "auto_gptq", "llm_compressor", "gptq")
        if quantize.format not in exports or quantize.bits != "auto" or quantize.method == "none" or quantize.mixed:
            raise ReapcError(
                f"{where}: quantize.allocate chooses types and widths, but quantize.method, format, bits or mixed "
                "fixes them",
                hint="remove them, or set quantize.allocate = false; method and group_size may stay",
            )
        if not quantize.imatrix:
            raise ReapcError(f"{where}: quantize.allocate needs the importance matrix", hint="remove imatrix = false")
    if recipe.quantize.heal:
        quantize = recipe.quantize
        plain = quantize.format.lower() in ("bf16", "f16", "fp16", "f32") or quantize.bits == 16
        if quantize.method == "none" or plain:
            key, value = ("method", quantize.method) if quantize.method == "none" else ("format", quantize.format)
            if value == "auto":
                key, value = "bits", "16"
            raise ReapcError(
                f'{where}: quantize.heal = true, but quantize.{key} = "{value}": nothing is quantized that could be '
                "healed",
                hint="remove one of the two; prune.heal heals what pruning did",
            )
    if recipe.prune.heal and recipe.prune.method == "none":
        raise ReapcError(
            f'{where}: prune.heal = true, but prune.method = "none": without pruning there is nothing to heal',
            hint="remove one of the two",
        )
    if recipe.prune.method == "none" and (recipe.prune.experts != "auto" or recipe.prune.ratio not in ("auto", 0)):
        raise ReapcError(f'{where}: prune.method = "none" but prune.ratio or prune.experts asks for pruning')
    return recipe
