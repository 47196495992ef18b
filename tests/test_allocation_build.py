"""Builds with ``quantize.allocate``: the types and bytes that the plan announces are those of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
from conftest import make_project, run_main
from test_build import RECIPE as BUILD

from reapc.allocate.sensitivity import Prober
from reapc.arch import known
from reapc.build import Build
from reapc.errors import CannotBeDone
from reapc.estimate import Estimate
from reapc.planner.allocate import allocate
from reapc.planner.devices import Devices, Taken
from reapc.planner.search import answer
from reapc.planner.tensor_groups import LADDER
from reapc.progress import Silent
from reapc.quantize.gguf import check_types
from reapc.recipe import load_recipe
from reapc.stages import StageCache

RECIPE = (
    BUILD.replace('format = "Q4_K_M"', "allocate = true")
    .replace("experts = 9", "max_ratio = 0.5")
    .replace('ram = "80MB"', 'ram = "45MB"')
)
KV = 'serve.kv_cache="auto"'


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocated")
    return make_project(folder, RECIPE, hidden_size=256, moe_intermediate_size=256, head_dim=64)


class Built(NamedTuple):
    """A build that chooses its KV cache too. ``plain``: what one without allocation is expected to need; ``most``:
    bytes in its stages whenever a probe was measured, and at the end."""

    out: Path
    cache: StageCache
    plain: Estimate
    expected: Estimate
    most: int

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def built(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    cache = StageCache(folder / "stages", lambda _: None)
    seen: list[int] = []

    def note() -> None:
        seen.append(sum(path.stat().st_size for path in cache.root.rglob("*") if path.is_file()))

    whole = Prober.fidelity

    def fidelity(self, *arguments):
        note()
        return whole(self, *arguments)

    plain = Build(load_recipe(project / "tiny.toml", ("quantize.allocate=false",)), Silent(), cache=cache).expect()
    build = Build(load_recipe(project / "tiny.toml", (KV,)), Silent(), cache=cache)
    expected = build.expect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prober, "fidelity", fidelity)
        build.run(folder / "out")
    note()
    assert len(seen) > 6
    return Built(folder / "out", cache, plain, expected, max(seen))


def test_a_build_allocates(built: Built) -> None:
    manifest = built.manifest
    found = manifest["allocation"]
    assert manifest["format"].startswith("mix of GGUF types, ")
    assert manifest["experts_kept"] == found["experts"]
    assert found["predicted"]["source"] == "measured"
    assert found["certificate"]["lower_bound"] <= found["certificate"]["best_predicted_kl"]
    path = built.out / "model.gguf"
    check_types(path, found["types"])
    data = path.stat().st_size - gguf.GGUFReader(str(path)).data_offset
    assert data == found["data_bytes"]
    weights = next(row for row in manifest["fit"] if row["name"] == "weights")
    assert weights["predicted_bytes"] == weights["actual_bytes"]
    plan = json.loads((built.out / "plan.json").read_text())["from_scores"]
    assert all(device["free_bytes"] >= 0 for device in plan["chosen"]["placement"]["devices"])
    assert "allocated tensor by tensor" in plan["reasons"][0]
    # what measuring chooses is what pruning was measured with, and the script and the plan name a mix
    assert found["measured_choice"]
    assert plan["chosen"]["format"] == manifest["format"]
    assert f"llama.cpp: {manifest['format']}" in (built.out / "serve.sh").read_text()


def test_an_allocation_is_reused_and_healed_after_it(built: Built, project: Path, tmp_path: Path) -> None:
    """Served on another port, and healed after quantization."""
    settings = (KV, "serve.port=8099", "quantize.heal=true")
    healed = Build(load_recipe(project / "tiny.toml", settings), Silent(), cache=built.cache).run(tmp_path / "out")
    assert "allocate" in healed.manifest["reused"]
    assert healed.manifest["healing_quantized"]["layers"]
    types = built.manifest["allocation"]["types"]
    assert healed.manifest["allocation"]["types"] == types
    check_types(tmp_path / "out" / "model.gguf", types)


def test_what_kv_caches_cost_is_measured_and_part_of_what_is_expected(built: Built) -> None:
    found = built.manifest["allocation"]
    losses = found["kv_losses"]
    assert losses["f16"] == 0 < losses["q8_0"] < losses["q4_0"]
    expected = [one["measured_kl"] + losses[one["kv_dtype"]] for one in found["measured"]]
    assert found["expected_kl"] == pytest.approx(min(expected))
    assert found["predicted"]["kv_cache"] == losses[found["kv_dtype"]]


def test_what_allocating_needs_is_estimated(built: Built) -> None:
    assert built.most <= built.expected.disk_bytes < 2.5 * built.most
    assert built.expected.disk_bytes > built.plain.disk_bytes
    assert built.expected.seconds > built.plain.seconds


def test_what_contradicts_it_is_refused(project: Path, capsys, tmp_path: Path) -> None:
    for setting, message in (("quantize.format=Q4_K_M", "fixes them"), ("quantize.imatrix=false", "importance matrix")):
        code, _, err = run_main(
            capsys, "build", project / "tiny.toml", "--set", setting, "--out", tmp_path / "out", "--json"
        )
        assert code == 2
        assert message in err


def question(model: str, target: str, **serve):
    from reapc.planner.fit import Wish, question_of
    from reapc.recipe import ServeSection
    from reapc.target import load_target

    wish = Wish(load_target(target), ServeSection(engine="llama.cpp", **serve), max_ratio=0.5)
    return question_of(model, known.spec(model), wish)


def test_every_card_has_its_own_budget() -> None:
    """GLM-5 on eight cards: no card above what it has, the plan's bytes the allocation's, and less predicted loss than
    the uniform choice."""
    from reapc.allocate.allocation import expert_bits, prior_only

    asked = question("zai-org/GLM-5", "rtx3090x8", context=32768)
    plan = answer(asked)
    damages = prior_only(asked.spec, asked.counts)
    devices = Devices(plan, asked.spec, asked.target, asked.serve)
    found = allocate(devices.budgets(damages.problem(0), damages.parts))
    groups = {g.name: LADDER[o] for g, o in zip(damages.parts.groups, found.best.options, strict=True)}
    bits = expert_bits(damages, asked.spec, found.best)[0]
    taken = Taken(groups, found.best.experts, found.best.kv, found.best.damage, bits)
    made = devices.planned(plan, asked.spec, damages.parts, taken)
    assert all(device.free_bytes >= 0 for device in made.chosen.placement.devices)
    held = [device.weights_bytes for device in made.chosen.placement.devices]
    assert sum(held) == made.chosen.weights_bytes
    assert len([device for device in made.chosen.placement.devices if device.free_bytes < 2**29]) >= 7
    assert found.best.damage < plan.chosen.predicted_loss
    assert found.relative_gap < 1e-3


def test_offloaded_experts_are_refused() -> None:
    asked = question("zai-org/GLM-4.5-Air", "rtx3090x1", context=4096)
    from dataclasses import replace

    from reapc.target import make_target

    target = make_target({"ram": "128GB"}, "test", base=asked.target)
    plan = answer(replace(asked, target=target))
    assert plan.chosen.placement.offloaded_layers
    with pytest.raises(CannotBeDone, match="beside the cards"):
        Devices(plan, asked.spec, target, asked.serve)
