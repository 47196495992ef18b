"""The hardware targets that come with reapc, files of a user's own, and bare budgets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT
from specs import recipe_of

import reapc.target as module
from reapc.cli.targets import command, rules_out
from reapc.errors import ReapcError
from reapc.target import (
    Target,
    all_targets,
    bare_target,
    cards_sold_as,
    is_target,
    known_targets,
    load_target,
    make_target,
)

# Names that recipes and scripts out there already use.
OLD_NAMES = {
    "a100-80gx8", "h100x1", "h100x8", "h200x8", "ram16", "ram32", "ram64", "rtx-pro-6000x1", "rtx3090x1", "rtx3090x2",
    "rtx3090x4", "rtx3090x8", "rtx4090x1", "rtx4090x2", "rtx5090x1",
}  # fmt: skip
# One card each, from the table that the makers' data sheets were put in (facts/hardware-targets.csv): target, compute
# capability or the maker's name of the architecture, GB per second, GB that it is sold as, FP8 arithmetic.
CARDS = [
    ("rtx3060-12gx1", "8.6", 360, 12, False),
    ("rtx3090x1", "8.6", 936, 24, False),
    ("rtx4060ti-16gx1", "8.9", 288, 16, True),
    ("rtx4090x1", "8.9", 1008, 24, True),
    ("rtx5090x1", "12.0", 1792, 32, True),
    ("rtx6000-adax1", "8.9", 960, 48, True),
    ("rtx-pro-6000x1", "12.0", 1792, 96, True),
    ("a100-40gx1", "8.0", 1555, 40, False),
    ("a100-80gx1", "8.0", 2039, 80, False),
    ("l4x1", "8.9", 300, 24, True),
    ("l40sx1", "8.9", 864, 48, True),
    ("h100x1", "9.0", 3350, 80, True),
    ("h200x1", "9.0", 4800, 141, True),
    ("b200x1", "10.0", 8000, 180, True),
    ("mi300x-192gx1", "gfx942", 5300, 192, True),
    ("mi355x-288gx1", "gfx950", 8000, 288, True),
    ("m3-ultra-512g", "metal", 819, 512, False),
    ("m4-max-128g", "metal", 546, 128, False),
    ("strix-halo-128g", "gfx1151", 256, 128, False),
    ("dgx-spark", "12.1", 273, 128, True),
]


def refused(data: dict[str, object], **options: Target) -> str:
    with pytest.raises(ReapcError) as caught:
        make_target(data, where="box.toml", **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_target_loads_and_says_where_its_figures_come_from() -> None:
    assert set(known_targets()) >= OLD_NAMES
    assert [target.name for target in all_targets()] == list(known_targets())
    for name in known_targets():
        target = load_target(name)
        assert is_target(name)
        assert target.name == name
        assert target.description
        assert target.source
        assert target.bandwidth
        assert target.marketed
        assert len(target.devices) == max(1, target.gpus)
        if match := re.search(r"[0-9a-z]x([0-9]+)$", name):
            assert target.gpus == int(match[1])
            assert target.description.startswith(f"{match[1]} x ")


@pytest.mark.parametrize(("name", "architecture", "bandwidth", "sold", "fp8"), CARDS)
def test_one_card_agrees_with_the_data_sheets(
    name: str, architecture: str, bandwidth: int, sold: int, fp8: bool
) -> None:
    target = load_target(name)
    is_nvidia = architecture[0].isdigit()
    assert target.gpus == 1
    assert (target.kind == "cuda") == is_nvidia
    assert (target.compute_capability or target.arch or target.kind) == architecture
    assert target.bandwidth == bandwidth * 1e9
    assert target.computes_fp8 == fp8
    assert target.marketed == f"{sold} GB"
    # what a program sees is less than what is sold, counted in GiB, and not less than three quarters of it
    assert 0.75 * sold * 2**30 < target.vram < sold * 2**30


def test_every_card_of_the_data_sheets_is_there_and_no_other() -> None:
    assert {target.name for target in all_targets() if target.gpus == 1} == {name for name, *_ in CARDS}


@pytest.mark.parametrize(
    ("name", "count", "each"),
    [
        ("rtx3090x8", 8, 24123 * 2**20),  # a driver's log
        ("rtx4090x2", 2, 24077 * 2**20),
        ("rtx5090x1", 1, 32109 * 2**20),
        ("rtx-pro-6000x4", 4, 97250 * 2**20),
        ("l40sx1", 1, 45467 * 2**20),
        ("m3-ultra-512g", 1, 498_216_210_000),  # recommendedMaxWorkingSetSize, in MB of 10**6
        ("m4-max-128g", 1, 115_448_730_000),
    ],
)
def test_usable_bytes_are_what_the_driver_shows(name: str, count: int, each: int) -> None:
    assert [device.capacity_bytes for device in load_target(name).devices] == [each] * count


def test_the_eight_3090s_are_a_file_of_their_own_and_the_same_card() -> None:
    path = ROOT / "reapc/targets/rtx3090x8.toml"
    eight, four = load_target(str(path)), load_target("rtx3090x4")
    assert eight == load_target("rtx3090x8")
    changed = {"name": "rtx3090x8", "gpus": 8, "description": eight.description}
    assert four.model_copy(update=changed) == eight
    assert eight.description == "8 x RTX 3090, 24 GB (24123 MiB visible to CUDA)"
    assert eight.geforce
    assert eight.capability == (8, 6)


def test_names_in_any_case_and_a_card_alone() -> None:
    assert load_target("RTX3090x2") == load_target("rtx3090x2")
    assert load_target("h100") == load_target("h100x1")


def test_loading_one_target_reads_its_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(path: Path) -> dict[str, object]:
        read.append(path.name)
        return original(path)

    original = module.read_toml
    monkeypatch.setattr(module, "read_toml", spy)
    load_target("h100x8")
    is_target("ram16")
    assert read == ["h100.toml", "ram16.toml"]
    load_target("rtx3090x8")
    assert read[2:] == ["rtx3090x8.toml", "rtx3090.toml"]


@pytest.mark.parametrize(
    "name", ["rtx3090x3", "rtx3090x", "../targets/ram16", "", "x8", "rtx3090x08", "ram16x1", "RTX 3090"]
)
def test_names_that_are_none(name: str) -> None:
    assert not is_target(name)
    with pytest.raises(ReapcError, match="unknown target") as caught:
        load_target(name)
    assert caught.value.exit_code == 2


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(ReapcError, match="did you mean 'rtx3090x") as caught:
        recipe_of("rtx3090x3")
    assert caught.value.exit_code == 2
    with pytest.raises(ReapcError, match="there is no such file"):
        load_target("nowhere/box.toml")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    box = tmp_path / "box.toml"
    box.write_text('base = "rtx3090"\ngpus = 6\nram = "256GB"\nram_bandwidth = 137e9\ninterconnect = "nvlink"\n')
    target = load_target(str(box))
    assert (target.name, target.gpus, target.vram, target.ram) == ("box", 6, 24123 * 2**20, 256 * 10**9)
    assert target.description.startswith("6 x RTX 3090")
    assert (target.interconnect, target.compute_capability, target.host_bandwidth) == ("nvlink", "8.6", 137e9)
    box.write_text('vram = "24GB"\nnodes = 2\ngpus = 4\n')
    assert (load_target(str(box)).gpus, load_target(str(box)).nodes) == (4, 2)
    box.write_text('vram = "24GB"\n')
    assert load_target(str(box)).gpus == 1
    box.write_text('base = "rtx3O90"\n')
    with pytest.raises(ReapcError, match="unknown target 'rtx3O90'"):
        load_target(str(box))
    box.write_text("vram = ")
    with pytest.raises(ReapcError, match=r"box\.toml: not valid TOML"):
        load_target(str(box))


def test_sizes_need_a_unit_and_counted_bytes_do_not() -> None:
    assert "box.toml: target.vram = 24: 24 has no unit" in refused({"gpus": 1, "vram": 24})
    assert "box.toml: target.ram = '24': 24 has no unit" in refused({"ram": "24"})
    assert "target.ram = -1: -1 is negative" in refused({"ram": -1})
    assert "target.ram = True: True is not a size" in refused({"ram": True})
    known = load_target("rtx3090x2")
    assert Target(**known.model_dump()) == known
    assert Target(**json.loads(known.model_dump_json())) == known
    assert known.model_copy(update={"vram": 5}).vram == 5


def test_changes_to_a_known_target() -> None:
    spark = load_target("dgx-spark")
    assert spark.vram_total == 124609 * 2**20 == spark.total_bytes
    changed = make_target({"vram": "90GiB"}, "recipe.toml", base=spark)
    assert changed == spark.model_copy(update={"vram": 90 * 2**30, "vram_total": 0})
    six = make_target({"gpus": 6}, "recipe.toml", base=load_target("rtx3090x1"))
    assert six.devices[5].name == "RTX 3090 5"
    assert six.description.startswith("6 x ")
    assert "recipe.toml" not in refused({"ram": "8GB", "vrma": "1GB"}, base=spark)
    assert "did you mean 'vram'?" in refused({"ram": "8GB", "vrma": "1GB"}, base=spark)


def test_budgets_that_make_no_sense() -> None:
    assert "vram is not given" in refused({"gpus": 2})
    assert "vram is not given" in refused({"gpus": 2, "vram": "0GB"})
    assert "gpus = 0 but vram" in refused({"gpus": 0, "vram": "24GB", "ram": "64GB"})
    assert "gpus = 0 but vram" in refused({"gpus": 0}, base=load_target("rtx3090x1"))
    assert "neither gpus and vram nor ram" in refused({})
    assert "nodes = 3 does not divide gpus = 8" in refused({"nodes": 3}, base=load_target("rtx3090x8"))
    assert "less than vram" in refused({"gpus": 1, "vram": "24GB", "vram_total": "23GB"})
    assert "target.base = 3" in refused({"base": 3})


def test_a_bare_budget_is_exactly_its_bytes_and_says_how_it_is_read() -> None:
    target = bare_target(24 * 10**9, 2, 64 * 10**9)
    assert [device.capacity_bytes for device in target.devices] == [24_000_000_000] * 2
    assert (target.name, target.ram, target.kind, target.compute_capability) == ("2 x 24GB", 64 * 10**9, "cuda", None)
    assert target.capability == (8, 0)
    assert not target.computes_fp8
    assert "24000000000 bytes on each of 2 cards" in target.assumptions
    assert "compute capability read as 8.0" in target.assumptions
    assert bare_target(24 * 2**30).name == "24GiB"
    assert bare_target(25_294_798_848).name == "24123MiB"
    stated = bare_target(24 * 10**9, compute_capability="9.0")
    assert stated.capability == (9, 0)
    assert "read as" not in stated.assumptions
    alone = bare_target(ram_bytes=64 * 10**9)
    assert (alone.gpus, alone.devices[0].kind, alone.devices[0].capacity_bytes) == (0, "cpu", 64 * 10**9)
    for vram_bytes, gpus in ((1, 0), (1, -1), (0, 1), (-1, 1), (1, 1025)):
        with pytest.raises(ReapcError) as caught:
            bare_target(vram_bytes, gpus)
        assert caught.value.exit_code == 2


def test_the_reading_of_the_capability_does_not_depend_on_the_size() -> None:
    assert len({bare_target(gb * 10**9).capability for gb in (8, 24, 48, 80, 141, 192)}) == 1


def test_cards_sold_as_that_many_gb() -> None:
    sold = cards_sold_as(24 * 10**9)
    # from the drivers' logs: a 3090 shows 25.3e9 bytes, a 4090 25.2e9, an L4 23.6e9
    assert [(name, round(size / 1e8)) for name, size in sold] == [("RTX 3090", 253), ("RTX 4090", 252), ("L4", 236)]
    assert cards_sold_as(24 * 2**30) == sold
    assert [name for name, _ in cards_sold_as(80 * 10**9)] == ["A100 80GB", "H100"]
    assert cards_sold_as(23 * 10**9) == []
    assert cards_sold_as(512 * 10**9) == []  # a Mac is no card, and RAM is none


def test_what_a_capability_rules_out() -> None:
    text = {name: "\n".join(rules_out(load_target(name))) for name in ("rtx3090x8", "rtx4090x1", "h100x8", "b200x8")}
    assert "sparse attention" in text["rtx3090x8"]
    assert "fp8 KV cache needs compute capability 8.9" in text["rtx3090x8"]
    assert "--disable-custom-all-reduce" in text["rtx3090x8"]
    assert "sparse attention" in text["rtx4090x1"]
    assert "fp8 KV cache" not in text["rtx4090x1"]
    assert "all-reduce" not in text["rtx4090x1"]
    assert "sparse attention" not in text["h100x8"]
    assert "FP4 arithmetic" in text["h100x8"]
    assert text["b200x8"] == ""
    assert "Metal" in rules_out(load_target("m4-max-128g"))[0]
    assert "ROCm" in rules_out(load_target("mi300x-192gx8"))[0]
    assert "AVX2" in rules_out(load_target("ram64"))[0]


def test_cli_lists_and_describes() -> None:
    runner = CliRunner()
    listed = runner.invoke(command, []).output
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in known_targets())
    assert max(len(line) for line in listed.splitlines()) <= 100
    row = next(line for line in listed.splitlines() if line.startswith("rtx3090x8 "))
    assert row.split() == ["rtx3090x8", "8", "x", "RTX", "3090", "23.6", "GiB", "936", "8.6", "-"]
    for name in known_targets():
        shown = runner.invoke(command, [name]).output
        assert max(len(line) for line in shown.splitlines()) <= 100
        assert "source" in shown
    assert "25294798848 bytes each" in runner.invoke(command, ["rtx3090x1"]).output
    assert json.loads(runner.invoke(command, ["rtx3090x1", "--json"]).output)["vram"] == 24123 * 2**20
    assert len(json.loads(runner.invoke(command, ["--json"]).output)) == len(known_targets())


def test_json_does_not_import_rich_nor_torch() -> None:
    code = (
        "import sys; from reapc.cli.main import main\n"
        "try: main(['targets', 'h100x8', '--json'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'rich', 'torch', 'transformers', 'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_cli_refuses_an_unknown_name() -> None:
    done = subprocess.run([sys.executable, "-m", "reapc", "targets", "rtx3O90x8"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'rtx3090x8'?" in done.stderr
