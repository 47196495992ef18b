"""Healing where it is asked for: in a build, and by ``reapc prune --heal``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_project, make_tokens, run_main
from quantized_models import quantized
from test_build import RECIPE as BUILD

from reapc import healing
from reapc.checkpoint.reader import Checkpoint
from reapc.stream.tokens import write_tokens

RECIPE = (
    BUILD.replace("experts = 9", "experts = 8\nheal = true")
    .replace('format = "Q4_K_M"', 'format = "BF16"')
    .replace("sequences = 16", "sequences = 56")
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal")
    return make_project(folder, RECIPE, sequences=60, num_experts_per_tok=4)


def test_a_build_heals_what_it_prunes(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    results = {}
    for name, setting in (("healed", "true"), ("plain", "false")):
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", "--set", f"prune.heal={setting}", "--out", tmp_path / name, "--json"
        )
        assert code == 0, err
        results[name] = json.loads((tmp_path / name / "manifest.json").read_text())
    found = results["healed"]["healing"]
    assert found["healed"]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert all(layer["choice"][1] < layer["choice"][0] for layer in found["layers"] if layer["kept"])
    # the result itself is closer to the original on text that neither of them saw
    assert results["healed"]["fidelity"]["kl"] < results["plain"]["fidelity"]["kl"]
    assert "heal" in results["healed"]["stage_seconds"]
    assert "prune" in results["plain"]["reused"]
    assert results["plain"]["healing"] == {}


def test_a_build_that_healing_made_worse_ships_unhealed(
    project: Path, cache: str, capsys, tmp_path: Path, monkeypatch, stage_folders: dict[str, Path]
) -> None:
    """Told that top-1 has to rise by more than it can, no result is good enough."""
    monkeypatch.setattr(healing, "TOP1_LOSS", -1.0)
    code, _, err = run_main(
        capsys, "build", project / "tiny.toml", "--set", "calibration.sequences=48", "--out", tmp_path / "out"
    )
    assert (code, "the result stays unhealed" in err) == (0, True)
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["healing"]["healed"]
    pruned, shipped = (Checkpoint(stage_folders[name] / "model") for name in ("prune", "heal"))
    assert all(torch.equal(pruned.tensor(name), shipped.tensor(name)) for name in pruned.entries)


def test_a_quantized_source_is_decoded_and_then_healed(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    """FP8 in tiles, which the converter would have read as it is."""
    quantized(project / "model", tmp_path / "fp8", "fp8-block")
    shutil.copy(project / "tokens.safetensors", tmp_path)
    (tmp_path / "fp8.toml").write_text((project / "tiny.toml").read_text().replace('"model"', '"fp8"'))
    code, _, err = run_main(capsys, "build", tmp_path / "fp8.toml", "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert found["healing"]["healed"]
    assert list(found["stage_seconds"])[:5] == ["observe", "choice", "prune", "decode", "heal"]


def test_what_cannot_be_healed_is_refused_before_anything_is_computed(
    project: Path, cache: str, capsys, tmp_path: Path
) -> None:
    def refused(*settings: str, recipe: Path = project / "tiny.toml") -> tuple[int, str]:
        options = [part for setting in settings for part in ("--set", setting)]
        code, _, err = run_main(capsys, "build", recipe, *options, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert "observe" not in err
        return code, err

    code, err = refused("calibration.sequences=2")
    assert (code, "healing needs some to fit" in err) == (2, True)
    code, err = refused('prune.method="none"', 'prune.experts="auto"')
    assert (code, "without pruning there is nothing to heal" in err) == (2, True)


def test_a_build_that_keeps_fp8_heals_in_fp8(project: Path, cache: str, capsys, tmp_path: Path) -> None:
    """Down projections in the scheme of the source, everything else its own bytes."""
    quantized(project / "model", tmp_path / "fp8", "fp8")
    shutil.copy(project / "tokens.safetensors", tmp_path)
    text = (project / "tiny.toml").read_text().replace('"model"', '"fp8"').replace('format = "BF16"', 'method = "none"')
    text = text.replace('ram = "80MB"', 'name = "rtx4090"')
    (tmp_path / "fp8.toml").write_text(text)
    code, _, err = run_main(capsys, "build", tmp_path / "fp8.toml", "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (found["healing"]["healed"], found["as_stored"]) == (True, True)
    assert found["healing"]["after"]["kl"] < found["healing"]["before"]["kl"]
    source, result = Checkpoint(tmp_path / "fp8"), Checkpoint(next((tmp_path / "out").rglob("config.json")).parent)
    assert result.quantization.method == source.quantization.method
    kept = {int(layer): experts for layer, experts in found["kept"].items()}
    changed = set()
    for name, entry in result.entries.items():
        before = name
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            number, _, part = rest.partition(".")
            before = f"{head}.experts.{kept[int(head.split('.')[2])][int(number)]}.{part}"
        theirs = source.stored_tensor(before) if "mlp.gate." not in name else None
        assert entry.dtype == source.entries[before].dtype
        if theirs is not None and not torch.equal(
            result.stored_tensor(name).view(torch.uint8), theirs.view(torch.uint8)
        ):
            changed.add(name.split(".")[-2])
    assert changed == {"down_proj"}


def interrupted(*_args, **_settings) -> None:
    raise KeyboardInterrupt


def test_prune_heals(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4)
    write_tokens(tmp_path / "tokens", make_tokens(60, 32, seed=1))
    code, _, err = run_main(capsys, "observe", folder, "--tokens", tmp_path / "tokens", "--out", tmp_path / "scores")
    assert code == 0, err
    base = ("prune", folder, "--scores", tmp_path / "scores", "--ratio", "0.5")
    code, _, err = run_main(capsys, *base, "--out", tmp_path / "pruned")
    assert code == 0, err
    healed = (*base, "--heal", "--tokens", tmp_path / "tokens", "--out", tmp_path / "healed")
    code, text, err = run_main(capsys, *healed, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["healing"]["healed"]
    before, after = Checkpoint(tmp_path / "pruned"), Checkpoint(tmp_path / "healed")
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "healed").glob("*.safetensors"))
    assert before.bytes == after.bytes
    changed = {n for n in after.entries if not torch.equal(after.tensor(n), before.tensor(n))}
    assert changed
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert not (tmp_path / "healed.work").exists()
    # the same as in two steps
    code, _, err = run_main(
        capsys, "heal", folder, tmp_path / "pruned", "--tokens", tmp_path / "tokens", "--out", tmp_path / "two"
    )
    assert code == 0, err
    two = Checkpoint(tmp_path / "two")
    assert all(np.array_equal(two.tensor(n).float(), after.tensor(n).float()) for n in two.entries)

    # interrupted behind the pruning: goes on with what was pruned, to the same bytes
    again = (*healed[:-1], tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr(healing, "heal", interrupted)
        code, _, _ = run_main(capsys, *again)
        assert (code != 0, (tmp_path / "again").exists()) == (True, False)
    with monkeypatch.context() as patched:
        patched.setattr(healing, "prune", interrupted)
        code, _, err = run_main(capsys, *again)
        assert code == 0, err
    for shard in after.shards:
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()

    # what an interrupted run pruned for another request is not taken
    with monkeypatch.context() as patched:
        patched.setattr(healing, "heal", interrupted)
        run_main(capsys, *healed[:-1], tmp_path / "changed")
        patched.setattr(healing, "prune", interrupted)
        code, _, _ = run_main(capsys, *healed[:-1], tmp_path / "changed", "--criterion", "frequency")
        assert (code != 0, list((tmp_path / "changed.work").iterdir())) == (True, [tmp_path / "changed.work/identity"])

    code, _, err = run_main(capsys, *base, "--heal", "--out", tmp_path / "other")
    assert (code, "--heal and --tokens go together" in err) == (2, True)
    code, _, err = run_main(capsys, *healed)
    assert (code, "exists already" in err) == (2, True)
