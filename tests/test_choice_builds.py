"""The measured choice where it is asked for: in a build, and by ``reapc prune --criterion auto``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, make_project, make_tokens, run_main
from test_build import RECIPE as BUILD

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import CRITERIA, choose
from reapc.recipe import load_recipe
from reapc.stream.tokens import write_tokens

RECIPE = (
    BUILD.replace("experts = 9", "experts = 8").replace('format = "Q4_K_M"', 'format = "BF16"').replace("= 16", "= 56")
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    return make_project(folder, RECIPE, sequences=72, num_experts_per_tok=4)


def built(capsys, project: Path, out: Path, *settings: str) -> tuple[dict, str]:
    options = [part for setting in settings for part in ("--set", setting)]
    code, _, err = run_main(capsys, "build", project / "tiny.toml", *options, "--out", out, "--json")
    assert code == 0, err
    return json.loads((out / "manifest.json").read_text()), err


def test_a_build_measures_its_criterion(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    manifest, err = built(capsys, project, tmp_path / "auto")
    choice = manifest["choice"]
    assert set(choice["candidates"]) == {*CRITERIA, "greedy"}
    winner = choice["winner"]
    assert f"choice: {winner} wins: {choice['why']}" in err
    assert list(manifest["stage_seconds"])[:3] == ["observe", "choice", "prune"]
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text())
    assert plan["from_scores"]["criterion"] == winner
    # by name the same criterion keeps the same experts, and nothing is measured
    name = "reap" if winner == "greedy" else winner
    named, err = built(capsys, project, tmp_path / "named", f'prune.method="{name}"')
    assert (named["choice"], "choice" in named["stage_seconds"], "choice:" in err) == ({}, False, False)
    if winner == name:
        assert named["kept"] == manifest["kept"]
    # again, from the cache; with a seed of its own it would be measured anew
    again, err = built(capsys, project, tmp_path / "again", "verify.max_kl=100.0")
    assert "choice" in again["reused"]
    assert (again["choice"], again["kept"]) == (choice, manifest["kept"])


def test_nothing_is_measured_where_nothing_is_pruned_or_too_little_text_is_there(
    project: Path, cache: str, capsys, tmp_path: Path
) -> None:
    manifest, _ = built(capsys, project, tmp_path / "whole", "prune.experts=12", 'target.ram="200MB"')
    assert (manifest["choice"], "choice" in manifest["stage_seconds"]) == ({}, False)
    manifest, err = built(capsys, project, tmp_path / "few", "calibration.sequences=3")
    assert manifest["choice"]["winner"] == "reap"
    assert "choice: reap, not measured: 3 sequences: the choice of a criterion needs at least 4" in err
    assert "choice" not in manifest["stage_seconds"]


def test_given_scores_and_healing_go_with_it(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    first, _ = built(capsys, project, tmp_path / "first")
    code, _, err = run_main(
        capsys, "build", project / "tiny.toml", "--scores", tmp_path / "first" / "scores.safetensors", "--set",
        "prune.heal=true", "--out", tmp_path / "second",
    )  # fmt: skip
    assert code == 0, err
    second = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert second["choice"] == first["choice"]
    assert second["healing"]["layers"]


def test_the_estimate_counts_it(project: Path, cache: str) -> None:
    from reapc.build import Build
    from reapc.choice.samples import forward_tokens

    def needs(*overrides: str) -> Build:
        return Build(load_recipe(project / "tiny.toml", overrides), Silent())

    auto, named = needs(), needs('prune.method="reap"')
    assert auto.requirements.measures(auto.first_plan.chosen)
    assert not named.requirements.measures(named.first_plan.chosen)
    spec, tokens = auto.inputs.checkpoint.spec, auto.inputs.calibration
    assert 0 < forward_tokens(spec, tokens) < 12 * tokens.count
    assert auto.expect().disk_bytes >= named.expect().disk_bytes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "m", num_experts_per_tok=4)
    tokens = make_tokens(60, 32, seed=1)
    write_tokens(folder / "tokens", tokens)
    scores = observe(Checkpoint(folder / "m"), tokens, folder / "w", Silent(), moments=False)
    scores.save(folder / "scores")
    return folder


def test_prune_command(files: Path, capsys, tmp_path: Path) -> None:
    arguments = ["prune", files / "m", "--scores", files / "scores", "--ratio", 0.25, "--criterion", "auto"]
    text = ["--tokens", files / "tokens"]
    code, out, err = run_main(capsys, *arguments, *text, "--out", tmp_path / "p", "--json")
    assert code == 0, err
    found = json.loads(out)
    choice = found["choice"]
    assert choice["experts_kept"] == found["experts_kept"] == 9
    ends = {name: own["kl"] for name, own in choice["candidates"].items() if "kl" in own}
    assert {"reap", choice["winner"]} <= set(ends)
    assert ends[choice["winner"]] <= ends["reap"]
    kept = {int(i): sorted(set(range(12)) - set(gone)) for i, gone in found["dropped"].items()}
    if choice["winner"] != "greedy":
        from reapc.observe.scores import load_scores

        assert kept == choose(load_scores(files / "scores"), choice["winner"], 9)
    original, pruned = Checkpoint(files / "m"), Checkpoint(tmp_path / "p")
    for layer, experts in kept.items():
        name = f"model.layers.{layer}.mlp.gate.weight"
        np.testing.assert_array_equal(pruned.tensor(name), original.tensor(name)[experts])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]

    code, out, err = run_main(capsys, *arguments, *text, "--heal", "--out", tmp_path / "healed", "--json")
    assert code == 0, err
    assert json.loads(out)["choice"] == choice
    assert "healing" in json.loads(out)


def test_prune_command_refuses_what_cannot_be_measured(files: Path, capsys, tmp_path: Path) -> None:
    arguments = ["prune", files / "m", "--scores", files / "scores", "--ratio", 0.25, "--out", tmp_path / "p"]
    code, _, err = run_main(capsys, *arguments, "--criterion", "auto")
    assert (code, "--criterion auto and --tokens go together" in err) == (2, True)
    write_tokens(tmp_path / "few", make_tokens(3, 32))
    code, _, err = run_main(capsys, *arguments, "--criterion", "auto", "--tokens", tmp_path / "few")
    assert (code, "the choice of a criterion needs at least 4" in err) == (2, True)
    code, _, err = run_main(capsys, *arguments, "--tokens", files / "tokens")
    assert (code, "--heal and --tokens go together" in err) == (2, True)
    assert not (tmp_path / "p").exists()
    # all experts stay: nothing to measure
    whole = [*arguments[:5], 0, "--out", tmp_path / "whole", "--criterion", "auto", "--tokens", files / "tokens"]
    code, _, err = run_main(capsys, *whole)
    assert code == 0, err
    assert "choice:" not in err
