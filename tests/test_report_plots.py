"""Plots and heat maps: pixels and places against the numbers that they show."""

from __future__ import annotations

import base64
import io
import math
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reapc.report import png
from reapc.report.frontier import Point, best_of, frontier, legend, read_points, write_points
from reapc.report.heatmap import PALETTE, heat_map
from reapc.report.svg import Axis, Plot, bar, figures, interval_bar, log_ticks, marker, ticks

EVIL = "</svg><script>alert(1)</script>\"'&"


def pixels_of(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def parsed(markup: str) -> ElementTree.Element:
    """SVG in HTML needs no namespace; an XML parser takes it as it is."""
    return ElementTree.fromstring(f"<div>{markup}</div>")


def test_a_png_is_what_pillow_reads() -> None:
    random = np.random.default_rng(0)
    palette = random.integers(0, 256, (129, 3)).astype(np.uint8)
    pixels = random.integers(0, 129, (7, 13)).astype(np.uint8)
    image = Image.open(io.BytesIO(png.encode(pixels, palette)))
    image.verify()
    assert (pixels_of(png.data_uri(pixels, palette)) == palette[pixels]).all()


def test_a_ramp_goes_from_the_first_to_the_last() -> None:
    made = png.ramp([(0, 0, 0), (100, 50, 0), (200, 0, 255)], 5)
    assert made.tolist() == [[0, 0, 0], [50, 25, 0], [100, 50, 0], [150, 25, 128], [200, 0, 255]]


def kinds(pixels: np.ndarray) -> np.ndarray:
    """0 kept, 1 pruned, 2 never, by the palette's colour."""
    distance = np.abs(pixels[:, :, None, :].astype(int) - PALETTE[None, None].astype(int)).sum(axis=3)
    assert (distance.min(axis=2) == 0).all()
    return np.asarray(distance.argmin(axis=2)) // 64


class TestHeatMap:
    values: ClassVar = {0: np.array([4.0, 1.0, 0.0, 2.0]), 2: np.array([10.0, 30.0, 20.0, 40.0])}
    kept: ClassVar = {0: [0, 3], 2: [1, 2, 3]}
    used: ClassVar = {0: np.array([True, True, False, True]), 2: np.ones(4, bool)}

    def test_by_number(self) -> None:
        found = heat_map(self.values, self.kept, self.used, "Scores", ranked=False)
        assert kinds(pixels_of(found.source)).tolist() == [[0, 1, 2, 0], [1, 0, 0, 0]]
        assert found.cut == ""
        assert [name for _, name in found.layers] == ["0", "2"]
        assert [name for _, name in found.experts] == ["0", "1", "2", "3"]

    def test_by_rank_with_the_cut(self) -> None:
        found = heat_map(self.values, self.kept, self.used, "Scores", ranked=True)
        pixels = pixels_of(found.source)
        assert kinds(pixels).tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
        brightness = pixels.sum(axis=2)
        assert (np.diff(brightness[1, :3].astype(int)) > 0).all()  # darker is more
        assert found.cut == "M50.000 0.000L50.000 50.000L75.000 50.000L75.000 100.000"
        assert "4 experts in each of 2 layers" in found.alt
        assert "5 stay, 3 are pruned" in found.alt

    def test_groups_keep_one_that_is_worth_less(self) -> None:
        """Where groups keep equal counts a kept expert can be worth less than a pruned one: kept still come first."""
        found = heat_map({0: np.array([9.0, 8.0, 2.0, 1.0])}, {0: [0, 2]}, {0: np.ones(4, bool)}, "S", ranked=True)
        assert kinds(pixels_of(found.source)).tolist() == [[0, 0, 1, 1]]

    def test_nothing_pruned_has_no_cut(self) -> None:
        found = heat_map(self.values, {}, self.used, "Scores", ranked=True)
        assert found.cut == ""

    def test_all_zero(self) -> None:
        found = heat_map({0: np.zeros(3)}, {0: [0]}, {0: np.zeros(3, bool)}, "Routed", ranked=True)
        assert kinds(pixels_of(found.source)).tolist() == [[2, 2, 2]]

    def test_layers_of_unlike_counts(self) -> None:
        found = heat_map(
            {0: np.ones(2), 1: np.ones(4)}, {}, {0: np.ones(2, bool), 1: np.ones(4, bool)}, "S", ranked=False
        )
        assert kinds(pixels_of(found.source)).tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]

    def test_kept_and_pruned_are_told_apart_without_colour_vision(self) -> None:
        """Every shade of the one differs from every shade of the other when red and green look the same (Viénot,
        Brettel & Mollon 1999, deuteranopia, on linear light)."""
        linear = (PALETTE[:128].astype(float) / 255) ** 2.2
        matrix = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2) * 255
        distance = np.linalg.norm(seen[:64, None] - seen[None, 64:], axis=2)
        assert distance.min() > 40


@given(st.floats(1e-6, 1e9), st.floats(1.001, 1e6))
def test_ticks_are_round_and_within(low: float, factor: float) -> None:
    high = low * factor
    made = ticks(low, high)
    assert 1 <= len(made) <= 11
    assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in made)
    for tick in log_ticks(low, high):
        assert low * (1 - 1e-6) <= tick <= high * (1 + 1e-6)
        assert round(tick / 10 ** math.floor(math.log10(tick) + 1e-9)) in (1, 2, 5)
    assert len(log_ticks(low, high)) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1234.0, "1234"), (0.1234, "0.123"), (2e-5, "2e-05"), (100, "100"), (-2.5, "-2.5")],
)
def test_figures(value: float, text: str) -> None:
    assert figures(value) == text


def test_places_on_axes() -> None:
    axis = Axis(0, 10, 100, 200)
    assert [axis.at(v) for v in (0, 5, 10)] == [100, 150, 200]
    log = Axis(1, 100, 0, 2, log=True)
    assert [log.at(v) for v in (1, 10, 100)] == pytest.approx([0, 1, 2])
    assert Axis(3, 3, 0, 10).at(3) == 5  # a single value is in the middle
    assert Axis(3, 3, 0, 10, log=True).at(3) == pytest.approx(5)


def test_what_is_written_into_plots_is_escaped() -> None:
    plot = Plot.of(EVIL, (0, 1), (0, 1), x_label=EVIL, y_label=EVIL)
    plot.mark(0.5, 0.5, EVIL)
    plot.column(0, 1, 0.5, title=EVIL)
    plot.level(0.2, EVIL)
    for made in (plot.render(), bar(EVIL, [(1, "c0")], 2), interval_bar(EVIL, 1, (0.5, 1.5), 2), marker(0, 0, 7, EVIL)):
        tree = parsed(made)
        assert not list(tree.iter("script"))
        assert EVIL in [*(e.text for e in tree.iter()), *(v for e in tree.iter() for v in e.attrib.values())]


def test_a_bar_s_parts_lie_one_after_another() -> None:
    rects = list(parsed(bar("memory", [(1, "a"), (0, "b"), (2, "c")], 4)).iter("rect"))
    assert [(r.get("class"), r.get("x"), r.get("width")) for r in rects] == [("a", "0%", "25%"), ("c", "25%", "50%")]


class TestFrontier:
    points: ClassVar = [
        Point(bytes=100 << 20, kl=0.5, label="a small", series="a"),
        Point(bytes=200 << 20, kl=0.1, low=0.08, high=0.12, label="a large", series="a", here=True),
        Point(bytes=150 << 20, kl=0.7, label="a bad", series="a"),
        Point(bytes=200 << 20, kl=0.3, label=EVIL, series=EVIL),
    ]

    def test_the_best(self) -> None:
        assert [p.label for p in best_of(self.points)] == ["a small", "a large"]

    def test_every_point_is_drawn_where_it_belongs(self) -> None:
        tree = parsed(frontier(self.points))
        marks = {p.find("title").text: p for p in tree.iter("path")}  # type: ignore[union-attr]
        assert len(marks) == 4
        assert any(str(text).startswith(EVIL) for text in marks)
        places = {}
        for text, mark in marks.items():
            x, y = mark.get("transform", "")[len("translate(") : -1].split()
            places[str(text).split(":")[0]] = (float(x), float(y))
        assert places["a small"][0] < places["a bad"][0] < places["a large"][0]
        assert places["a large"][1] > places["a small"][1] > places["a bad"][1]  # less KL is lower
        ys = [places[name][1] for name in ("a large", "a small", "a bad")]
        assert (ys[0] - ys[1]) / (ys[1] - ys[2]) == pytest.approx(math.log(5) / math.log(1.4), rel=0.02)
        assert sum("ring" in str(m.get("class")) for m in marks.values()) == 1
        lines = [line.get("points", "").split() for line in tree.iter("polyline")]
        assert [len(line) for line in lines] == [2, 1]

    def test_one_point_and_none(self) -> None:
        parsed(frontier(self.points[:1]))
        parsed(frontier([Point(bytes=5, kl=0.0, label="lossless")]))
        with pytest.raises(ValueError, match="needs a point"):
            frontier([])

    def test_points_are_stored(self, tmp_path) -> None:
        write_points(tmp_path / "frontier.json", self.points)
        assert read_points(tmp_path / "frontier.json") == self.points
        for junk in ("", "{}", '[{"bytes": 0, "kl": 1, "label": "x"}]', '[{"bytes": 1, "kl": NaN, "label": "x"}]'):
            (tmp_path / "frontier.json").write_text(junk)
            with pytest.raises(ValueError, match="not a list of points"):
                read_points(tmp_path / "frontier.json")

    def test_more_series_than_marks(self) -> None:
        many = [Point(bytes=1000 + i, kl=0.1 + i / 100, label=str(i), series=str(i)) for i in range(14)]
        parsed(frontier(many))
        assert len(legend(many)) == 14
