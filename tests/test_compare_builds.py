"""``reapc compare A B`` of two builds: figures from the manifests, and when they must not be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_main
from report_builds import EVIL, write_large
from test_report import check_safe

from reapc.report.comparison import compare_builds
from reapc.report.comparison_page import comparison_page
from reapc.report.data import BuildData


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, text, err = run_main(capsys, "compare", *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(text)
    return found


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest.update(changes)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_two_builds(builds: dict[str, Path], capsys) -> None:
    a, b = builds["plain"], builds["healed"]
    found = compare(capsys, a, b)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (a, b)]
    assert found["not_comparable"] == ""
    assert set(found["fidelity"]) == {"all", EVIL, "law"}
    for name, row in found["fidelity"].items():
        own = [m["fidelity"] if name == "all" else m["fidelity"]["domains"][name] for m in manifests]
        assert [row["a"]["kl"], row["b"]["kl"]] == [o["kl"] for o in own]
        difference = row["difference"]
        assert difference["kl"] == pytest.approx(own[1]["kl"] - own[0]["kl"])
        assert difference["interval"][0] <= difference["kl"] <= difference["interval"][1]
        # paired by sequence, a difference is known better than two figures by themselves
        widths = [row[side]["interval"][1] - row[side]["interval"][0] for side in "ab"]
        assert difference["interval"][1] - difference["interval"][0] < np.hypot(*widths)
    for layer, row in found["kept"]["layers"].items():
        kept = [set(m["kept"][layer]) for m in manifests]
        assert (row["a"], row["b"], row["common"]) == (9, 8, len(kept[0] & kept[1]))
        assert row["chance"] == 9 * 8 / 12
    assert found["a"]["healing"] is None
    assert found["a"]["healing_quantized"] is None
    assert found["b"]["healing"]["before"]["kl"] == manifests[1]["healing"]["before"]["kl"]
    assert found["stage_seconds"]["observe"] == [manifests[0]["stage_seconds"]["observe"], "reused"]
    assert found["stage_seconds"]["heal"][0] is None
    turned = compare(capsys, b, a)
    assert turned["fidelity"]["all"]["difference"]["kl"] == pytest.approx(-found["fidelity"]["all"]["difference"]["kl"])

    code, text, _ = run_main(capsys, "compare", a, b)
    assert code == 0
    losses = [f"{manifest['fidelity']['kl']:.4f}" for manifest in manifests]
    for shown in (*losses, "9 of 12", "8 of 12", "Experts kept in common", "mo<script>alert(1)"):  # fmt: skip
        assert shown in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_build_against_itself(builds: dict[str, Path], capsys) -> None:
    found = compare(capsys, builds["healed"], builds["healed"])
    assert found["kept"]["share"] == 1
    for row in found["fidelity"].values():
        assert row["difference"] == {"kl": 0, "interval": [0, 0], "top1": 0}


def test_the_page(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    a, b = builds["plain"], builds["healed"]
    compare(capsys, a, b, "--html", tmp_path / "c.html")
    page = check_safe((tmp_path / "c.html").read_text())
    ids = ["decision", "memory", "loss", "experts", "healing", "provenance"]
    assert [s["id"] for s in page.all("section")] == ids
    assert "could not be drawn" not in page.text
    assert "9 of 12" in page.by_section["decision"]
    assert "8 of 12" in page.by_section["decision"]
    assert EVIL in page.by_section["loss"]
    assert "paired by sequence" in page.by_section["loss"]
    comparison_page(BuildData.read(a), BuildData.read(b), strict=True)


def test_healing_after_quantization_is_compared(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    other = json.loads((builds["healed"] / "manifest.json").read_text())["healing"]
    b = edited(builds["plain"], tmp_path / "b", healing_quantized=other)
    found = compare(capsys, builds["healed"], b, "--html", tmp_path / "c.html")
    assert (found["a"]["healing_quantized"], found["b"]["healing"]) == (None, None)
    assert found["b"]["healing_quantized"]["after"]["kl"] == other["after"]["kl"]
    text = check_safe((tmp_path / "c.html").read_text()).by_section["healing"]
    rows = [f"{name}, {when} quantization" for when in ("before", "after") for name in "AB"]
    assert all(row in text for row in rows)
    _, text, _ = run_main(capsys, "compare", builds["healed"], b)
    assert "healed after quantization" in " ".join(text.split())


def test_other_held_out_text_is_not_compared(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    a = builds["plain"]
    other = json.loads((a / "manifest.json").read_text())["held_out"] | {"digest": "e" * 64}
    b = edited(builds["healed"], tmp_path / "b", held_out=other)
    found = compare(capsys, a, b, "--html", tmp_path / "c.html")
    assert "held-out texts differ" in found["not_comparable"]
    assert all("difference" not in row for row in found["fidelity"].values())
    page = check_safe((tmp_path / "c.html").read_text())
    assert "The KLs of A and B are not comparable: the held-out texts differ" in page.by_section["loss"]
    assert "paired by sequence" not in page.by_section["loss"]
    _, text, _ = run_main(capsys, "compare", a, b)
    assert "The KLs of A and B are not comparable: the held-out texts differ" in " ".join(text.split())


def test_another_original(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    b = edited(builds["healed"], tmp_path / "b", model={"source": "x", "digest": "0" * 64})
    found = compare(capsys, builds["plain"], b)
    assert "originals differ" in found["not_comparable"]
    assert found["kept"]["layers"] == {}
    assert "one original" in found["kept"]["reason"]


def test_a_manifest_without_the_digest_of_its_text(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    """As reapc wrote them before: held_out.safetensors tells which text it was."""
    b = edited(builds["healed"], tmp_path / "b", held_out={"source": "held_out.safetensors", "tokens": 1})
    assert compare(capsys, builds["plain"], b)["not_comparable"] == ""
    (b / "held_out.safetensors").unlink()
    assert "is not known" in compare(capsys, builds["plain"], b)["not_comparable"]


def test_without_detail_there_is_a_difference_but_no_interval(builds: dict[str, Path], capsys, tmp_path: Path) -> None:
    b = edited(builds["healed"], tmp_path / "b")
    (b / "fidelity.json").unlink()
    found = compare(capsys, builds["plain"], b, "--html", tmp_path / "c.html")
    assert found["fidelity"]["all"]["difference"]["interval"] is None
    assert found["fidelity"]["all"]["a"]["interval"] is not None
    assert "no interval" in check_safe((tmp_path / "c.html").read_text()).by_section["loss"]


def test_a_large_one(tmp_path: Path) -> None:
    a, b = (BuildData.read(write_large(tmp_path / name, kept=kept)) for name, kept in (("a", 160), ("b", 128)))
    found = compare_builds(a, b)
    assert len(found["kept"]["layers"]) == 75
    assert all(row["common"] == 128 for row in found["kept"]["layers"].values())  # the best 128 are among the best 160
    text = comparison_page(a, b, strict=True)
    check_safe(text)
    assert len(text) < 150_000


class TestRefusals:
    def test_tokens_are_missing(self, builds: dict[str, Path], capsys, tmp_path: Path) -> None:
        code, _, err = run_main(capsys, "compare", builds["plain"], tmp_path)
        assert code == 2
        assert "Missing option '--tokens'" in err
        assert f"{tmp_path} is no output folder of a build" in " ".join(err.split())

    def test_html_is_of_builds(self, builds: dict[str, Path], capsys, tmp_path: Path) -> None:
        pair = (builds["plain"], builds["healed"])
        code, _, err = run_main(capsys, "compare", *pair, "--tokens", tmp_path / "t", "--html", tmp_path / "c.html")
        assert code == 2
        assert "leave --tokens out" in err

    @pytest.mark.parametrize("changes", [{"fidelity": 7}, {"fit": [3]}, {"kept": {"0": 1}}, {"model": "x"}])
    def test_a_manifest_of_something_else(
        self, builds: dict[str, Path], capsys, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        b = edited(builds["healed"], tmp_path / "b", **changes)
        code, _, err = run_main(capsys, "compare", builds["plain"], b)
        assert code == 2
        assert "is not as this version writes it" in err
