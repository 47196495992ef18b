"""The report of a build: what it says is what the build found, nothing from outside is markup, nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from report_builds import EVIL, write_large

from reapc.report.data import BuildData
from reapc.report.page import build_page
from reapc.report.write import write_report

SECTIONS = [
    "decision", "memory", "allocation", "loss", "passages", "experts", "healing", "stability", "frontier", "provenance",
]  # fmt: skip


@pytest.fixture
def copy(builds: dict[str, Path], tmp_path: Path) -> Path:
    """A build that a test may spoil."""
    return Path(shutil.copytree(builds["healed"], tmp_path / "copy"))


class Page(HTMLParser):
    """Reads a page strictly: elements open and close in order."""

    VOID = ("meta", "link", "img", "br", "wbr", "rect", "path", "line", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.by_section: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        closed = (self.get_starttag_text() or "").endswith("/>")
        if tag not in self.VOID or (tag in ("rect", "path", "line") and not closed):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            self.by_section[self.section] = self.by_section.get(self.section, "") + data

    @property
    def text(self) -> str:
        return "".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_safe(text: str) -> Page:
    """Nothing runs, nothing is fetched, every image has words."""
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "foreignobject",
        "use",
        "image",
        "animate",
    }
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "action", "data", "xlink:href", "srcset", "poster"):
                assert str(value).startswith("data:" if tag != "a" else "#"), f"<{tag} {name}={value}>"
        if tag == "img" or attributes.get("role") == "img":
            assert attributes.get("alt") or attributes.get("aria-label")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    return page


class TestOfABuild:
    def test_every_section_is_there_and_safe(self, builds: dict[str, Path]) -> None:
        for name, folder in builds.items():
            page = check_safe((folder / "report.html").read_text())
            assert [s["id"] for s in page.all("section")] == SECTIONS
            assert "could not be drawn" not in page.text
            missing = [part for part in SECTIONS if "left-out" in section_html(folder, part)]
            # the recipe fixes experts and format, so nothing else was thought of
            assert missing == ["decision", "allocation", *(["healing"] if name == "plain" else []), "frontier"]

    def test_strictly_nothing_fails(self, builds: dict[str, Path]) -> None:
        for folder in builds.values():
            build_page(BuildData.read(folder), strict=True)

    def test_markup_is_shown_as_it_is(self, builds: dict[str, Path]) -> None:
        """The model's name, the domain's name, the target's description and the tokens of the text."""
        text = (builds["healed"] / "report.html").read_text()
        page = check_safe(text)
        assert "<script" not in text.lower()
        assert "onerror=alert(1)>" not in text
        assert "mo<script>alert(1)<_script>del" in page.by_section["decision"]
        assert EVIL in page.by_section["loss"]
        assert EVIL in page.by_section["passages"]
        assert json.dumps(EVIL)[1:-1] in page.by_section["provenance"]
        assert page.by_section["passages"].count("script") > 5

    def test_the_figures_are_the_manifest_s(self, builds: dict[str, Path]) -> None:
        manifest = json.loads((builds["healed"] / "manifest.json").read_text())
        page = Page((builds["healed"] / "report.html").read_text())
        fidelity = manifest["fidelity"]
        assert set(fidelity["domains"]) == {EVIL, "law"}
        for row in (fidelity, *fidelity["domains"].values()):
            assert f"{row['kl']:.4f}" in page.by_section["loss"]
            assert f"{100 * row['top1']:.1f} %" in page.by_section["loss"]
        for row in manifest["fit"]:
            assert f"{row['predicted_bytes']:,}" in page.by_section["memory"]
        assert "8 of 12" in page.by_section["decision"]
        for layer in manifest["healing"]["layers"]:
            removed = 1 - layer["choice"][1] / layer["choice"][0]
            assert f"{100 * removed:.1f} %" in page.by_section["healing"]
        for fact in (manifest["model"]["digest"], manifest["held_out"]["digest"], manifest["key"], manifest["date"]):
            assert fact in page.by_section["provenance"]
        assert manifest["command"].startswith("reapc build ")
        assert "--set prune.heal=true" in page.by_section["provenance"]
        for reason in json.loads((builds["healed"] / "plan.json").read_text())["from_scores"]["reasons"]:
            assert reason in page.by_section["decision"]

    def test_detail_adds_up_to_the_totals(self, builds: dict[str, Path]) -> None:
        for folder in builds.values():
            total = json.loads((folder / "manifest.json").read_text())["fidelity"]
            detail = json.loads((folder / "fidelity.json").read_text())
            rows = detail["sequences"]
            assert sum(rows["tokens"]) == total["tokens"]
            domain = np.array(rows["domain"])
            for number, name in enumerate(detail["domains"]):
                mine, row = domain == number, total["domains"][name]
                counts = np.array(rows["tokens"])[mine].sum()
                assert np.array(rows["kl"])[mine].sum() / counts == pytest.approx(row["kl"], rel=1e-5)
                assert np.array(rows["agree"])[mine].sum() / counts == pytest.approx(row["top1"])
                for side in "ab":
                    mean = np.array(rows[f"loss_{side}"])[mine].sum() / np.array(rows["predictions"])[mine].sum()
                    assert np.exp(mean) == pytest.approx(row[f"perplexity_{side}"], rel=1e-5)
            positions = detail["positions"]
            assert sum(row["tokens"] for row in positions) == total["tokens"]
            mean = sum(row["kl"] * row["tokens"] for row in positions) / total["tokens"]
            assert mean == pytest.approx(total["kl"], rel=1e-5)
            assert [row["from"] for row in positions] == [1, 2, 3, 5, 9, 17, 33]
            assert positions[-1]["to"] == 64

    def test_written_again_it_is_the_same(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (copy / "report.html").read_bytes()
        (copy / "report.html").write_text("spoilt")
        code, text, _ = run_main(capsys, "report", copy)
        assert code == 0
        assert text.strip() == str(copy / "report.html")
        assert (copy / "report.html").read_bytes() == before
        assert run_main(capsys, "verify", copy)[0] == 0  # every size is the manifest's
        (copy / "report.html").unlink()
        assert run_main(capsys, "verify", copy)[0] == 1

    def test_no_build(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for folder in (tmp_path, tmp_path / "nosuch"):
            code, _, err = run_main(capsys, "report", folder)
            assert code == 2
            assert "give the output folder of a `reapc build`" in err


def section_html(folder: Path, name: str) -> str:
    text = (folder / "report.html").read_text()
    return text.split(f'<section id="{name}"')[1].split("</section>")[0]


class TestWhatLacks:
    @pytest.mark.parametrize(
        ("name", "sections", "sentence"),
        [
            ("fidelity.json", ["passages", "loss"], "fidelity.json is not there"),
            ("scores.safetensors", ["experts"], "scores.safetensors is not there"),
            ("plan.json", ["decision", "memory", "experts"], "plan.json is not there"),
        ],
    )
    def test_a_file_that_is_gone(self, copy: Path, name: str, sections: list[str], sentence: str) -> None:
        (copy / name).unlink()
        write_report(copy, strict=True)
        page = check_safe((copy / "report.html").read_text())
        for section in SECTIONS:
            assert (sentence in page.by_section[section]) == (section in sections)

    @pytest.mark.parametrize("junk", ["", "null", "[1]", '{"from_scores": 3}', "\x00\xff", '{"format": 1}'])
    @pytest.mark.parametrize("name", ["fidelity.json", "scores.safetensors", "plan.json"])
    def test_a_file_that_is_damaged(self, copy: Path, name: str, junk: str) -> None:
        (copy / name).write_text(junk)
        write_report(copy)
        page = check_safe((copy / "report.html").read_text())
        assert "cannot be read" in page.text or "could not be drawn" in page.text or "another version" in page.text

    @pytest.mark.parametrize("key", [
        "fidelity", "fit", "kept", "stability", "healing", "healing_quantized", "model", "recipe", "versions",
        "stage_seconds", "reused", "files", "held_out", "calibration", "seconds", "experts_kept", "format",
        "recipe_name", "date",
    ])  # fmt: skip
    def test_a_manifest_that_lacks_or_lies(self, builds: dict[str, Path], key: str) -> None:
        folder = builds["healed"]
        manifest = json.loads((folder / "manifest.json").read_text())
        lies: list[object] = [None, [], "text", 7, {"a": {"b": "<script>"}}]
        del manifest[key]
        for changed in (manifest, *({**manifest, key: lie} for lie in lies)):
            check_safe(build_page(BuildData(folder, changed, folder.parent)))

    def test_healing_after_quantization_is_shown_below_the_other(self, builds: dict[str, Path]) -> None:
        folder = builds["plain"]  # which has neither
        other = json.loads((builds["healed"] / "manifest.json").read_text())["healing"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["healing_quantized"] == {}
        said = {"before quantization": "healing", "after quantization": "healing_quantized"}
        for keys in (["healing_quantized"], ["healing", "healing_quantized"]):
            data = BuildData(folder, {**manifest, **dict.fromkeys(keys, other)}, folder.parent)
            page = check_safe(build_page(data, strict=False))
            text = page.by_section["healing"]
            assert [when for when, key in said.items() if f"The model {when}" in text] == [
                when for when, key in said.items() if key in keys
            ]

    def test_a_build_succeeds_without_its_report(
        self, builds: dict[str, Path], tmp_path: Path, capsys, monkeypatch
    ) -> None:
        def broken(*arguments: object) -> str:
            raise RuntimeError("no page today")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("reapc.report.write.build_page", broken)
        monkeypatch.setattr("reapc.verify.detail.Detail.to_json", broken)
        scores = builds["plain"] / "scores.safetensors"
        code, _, err = run_main(
            capsys, "build", builds["plain"].parent.parent / "tiny.toml", "--out", tmp_path / "out", "--scores", scores
        )
        assert code == 0, err
        assert "report.html: left out, it could not be written (RuntimeError: no page today)" in err
        assert "fidelity.json: left out" in err
        assert not (tmp_path / "out" / "report.html").exists()
        assert run_main(capsys, "verify", tmp_path / "out")[0] == 0
        monkeypatch.undo()
        assert run_main(capsys, "report", tmp_path / "out")[0] == 0
        check_safe((tmp_path / "out" / "report.html").read_text())

    def test_nothing_reads_what_no_text_can_hold(self, copy: Path) -> None:
        """Lone surrogates and control characters, which JSON can carry and UTF-8 or HTML cannot."""
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["recipe_name"] = "a\ud800b\x00c\x1b[31m"
        (copy / "manifest.json").write_text(json.dumps(manifest))
        write_report(copy, strict=True)
        text = (copy / "report.html").read_text(encoding="utf-8")
        assert "a\ufffdb\ufffdc\ufffd[31m" in text


class TestLarge:
    def test_256_experts_in_75_layers_are_small(self, tmp_path: Path) -> None:
        folder = write_large(tmp_path / "big")
        write_report(folder, strict=True)
        assert (folder / "report.html").stat().st_size < 200_000
        page = check_safe((folder / "report.html").read_text())
        sizes = [(image["width"], image["height"]) for image in page.all("img")]
        assert sizes == [("256", "75")] * 3
        assert "RTX 3090 1 .. 7" in page.by_section["memory"]  # equal cards are one bar
        assert "a capacity that nobody stated" in page.by_section["memory"]
        assert "fp8, w4a16" in page.by_section["decision"]

    def test_a_measured_choice_of_the_criterion(self, tmp_path: Path) -> None:
        folder = write_large(tmp_path / "big", layers=2, experts=16, kept=12)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["choice"] = {
            "winner": "greedy", "why": f"KL smaller than reap's {EVIL}",
            "candidates": {
                "reap": {"layer_error": 0.2, "kl": 0.1234, "top1": 0.8},
                "greedy": {
                    "layer_error": 0.1, "kl": 0.0567, "top1": 0.9,
                    "kl_less_reap": {"mean": -0.0667, "interval": [-0.08, -0.05]},
                },
                "ean": {"layer_error": 0.3, "same_as": "reap"},
            },
            "left_out": {"frequency": EVIL}, "protected": {"3": {"7": 12.5}},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
        plans = json.loads((folder / "plan.json").read_text())
        plans["from_scores"]["criterion"] = "greedy"
        (folder / "plan.json").write_text(json.dumps(plans))
        write_report(folder, strict=True)
        page = check_safe((folder / "report.html").read_text())
        words = ("0.1234", "0.0567", "-0.0667", "-0.0800 to -0.0500", "the same experts as reap", EVIL, "layer 3: 7")
        for shown in words:
            assert shown in page.by_section["decision"]
        assert "chosen by greedy" in page.by_section["experts"]

    def test_an_allocation_shows_the_types_of_every_layer(self, tmp_path: Path, capsys) -> None:
        folder = write_large(tmp_path / "big", layers=2, experts=16, kept=12)
        code, text, _ = run_main(capsys, "allocate", "zai-org/GLM-5", "--budget", "180GB", "--json")
        assert code == 0
        allocation = json.loads(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "allocation": allocation}))
        write_report(folder, strict=True)
        page = check_safe((folder / "report.html").read_text())
        shown = page.by_section["allocation"]
        for kind in set(allocation["groups"].values()):
            assert kind in shown
        assert f"{allocation['experts']} of 256 experts" in shown
        assert f"{allocation['certificate']['lower_bound']:.4f}" in shown
        # layers of the same types are one row
        assert section_html(folder, "allocation").count("<tr") < 40

    def test_a_sweep_s_frontier_is_embedded(self, tmp_path: Path) -> None:
        from reapc.report.frontier import Point, write_points

        folder = write_large(tmp_path / "big", layers=2, experts=16, kept=12)
        points = [Point(bytes=10**9, kl=0.1, label=EVIL, series=EVIL, low=0.08, high=0.12, here=True)]
        write_points(tmp_path / "frontier.json", points)
        write_report(folder, strict=True)
        page = check_safe((folder / "report.html").read_text())
        assert page.by_section["frontier"].count(EVIL) >= 2
        (tmp_path / "frontier.json").write_text('[{"bytes": "x"}]')
        write_report(folder, strict=True)
        assert "cannot be drawn" in Page((folder / "report.html").read_text()).by_section["frontier"]


def test_a_light_import() -> None:
    """The table of devices that `reapc plan` shows comes from here, without torch or a template engine."""
    import subprocess

    code = "import sys, reapc.report.devices, reapc.report.data; assert not {'torch', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
