"""Every family: the streamed pass computes what transformers computes, records the gate weight that the model uses, and
what is pruned loads without a missing or unexpected key. docs/families.md says what these tests see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import family_checks as checks
import pytest
from conftest import ROOT
from family_models import CONFIGS, NAMES

from reapc.arch import known, model_spec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone
from reapc.stream.families import SUPPORTED, check_family, check_router, check_state
from reapc.toolchain import find_llamacpp

PRUNED: dict[str, Path] = {}  # what the tests of this module left, for the converter


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder, model = checks.prepared(request.param, tmp_path_factory.mktemp("family"))
    return request.param, folder, model


def test_streamed_logits_are_those_of_transformers(family: tuple[str, Path, Any]) -> None:
    _, folder, model = family
    assert checks.same_names(Checkpoint(folder))
    assert checks.streams_alike(folder, model)


def test_the_recorded_weight_is_the_one_that_the_model_uses(family: tuple[str, Path, Any]) -> None:
    assert checks.weighs_alike(*family)


def test_pruned_models_load_and_compute(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, folder, _ = family
    pruned = checks.observe_and_prune(folder, tmp_path)
    checkpoint = Checkpoint(pruned.folder)
    assert checkpoint.spec.num_experts == pruned.kept < pruned.checkpoint.spec.num_experts
    assert checkpoint.spec.mtp_layers == ()
    assert checks.same_names(checkpoint)
    assert checks.reloads(pruned)
    PRUNED[name] = pruned.folder


def test_the_converter_takes_what_was_pruned() -> None:
    """Just the tensors that the planner counts, but for what docs/families.md says of the others."""
    if find_llamacpp().convert is None:
        pytest.skip("no llama.cpp: reapc doctor --install")
    if PRUNED.keys() != set(NAMES):
        pytest.skip("only part of this module was run")
    rows = table()
    for name, said in checks.converter_says(PRUNED).items():
        expected = rows[name]["GGUF"]
        assert (said == "yes") == (expected == "yes"), (name, said)


def table() -> dict[str, dict[str, str]]:
    """The rows of docs/families.md by the tiny model's name."""
    lines = [line for line in (ROOT / "docs" / "families.md").read_text().splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    found = {re.sub("`", "", row[0]): dict(zip(head, row, strict=True)) for row in rows}
    return found


def test_the_table_says_what_is_tested() -> None:
    """The columns that the tests above assert for every row are "yes" in every row."""
    rows = table()
    assert list(rows) == NAMES
    for name, row in rows.items():
        assert {row[column] for column in checks.COLUMNS[:-1]} == {"yes"}, name


def test_every_family_is_here_or_refused_by_name() -> None:
    tested = {model_spec(CONFIGS[name]).family for name in NAMES}
    assert tested == set(SUPPORTED)
    with pytest.raises(CannotBeDone, match=r"kimi_k3 models cannot be observed(?s:.*)deepseek, .*step3p7"):
        check_family(model_spec(CONFIGS["kimi-k3"]), "here")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("glm_moe_dsa", "scoring_func", "softmax"), ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v3", "topk_method", "greedy"), ("kimi-linear", "moe_router_activation_func", "softmax"),
        ("qwen3_moe", "router_temperature", 0.5), ("qwen35moe", "moe_routing_mode", "dense"),
    ],
)  # fmt: skip
def test_a_router_attribute_that_is_not_known_is_refused(name: str, key: str, value: object) -> None:
    config = CONFIGS[name]
    text = {**config.get("text_config", config), key: value}
    changed = {**config, "text_config": text} if "text_config" in config else text
    with pytest.raises(CannotBeDone, match=f"here: config.json: {key} = {value!r}"):
        check_state(model_spec(config), changed, "here")


def test_routers_of_the_catalogue_are_understood() -> None:
    for name in known.names():
        check_router(known.config(name), name)


@pytest.mark.parametrize(("key", "value"), [("num_kv_shared_layers", 2), ("hidden_size_per_layer_input", 16)])
def test_state_that_is_not_carried_is_refused_by_name(key: str, value: int) -> None:
    config = {**CONFIGS["gemma4"], "text_config": {**CONFIGS["gemma4"]["text_config"], key: value}}
    with pytest.raises(CannotBeDone, match=f"here: config.json: {key} = {value}"):
        check_state(model_spec(CONFIGS["gemma4"]), config, "here")
