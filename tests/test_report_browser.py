"""Reports in a real browser: nothing is fetched or complained of, a phone needs no scrolling sideways, both colour
schemes can be read. Skipped where there is no Chromium (apt-get install chromium)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from report_builds import write_large
from test_report import SECTIONS

from reapc.report.comparison_page import comparison_page
from reapc.report.data import BuildData
from reapc.report.frontier import Point, write_points
from reapc.report.write import write_report

pytestmark = pytest.mark.skipif(chromium.find() is None, reason=chromium.MISSING)
PHONE, DESKTOP = 390, 1280

# WCAG 2.2: relative luminance and contrast of every text with what lies behind it; large text needs 3, other 4.5.
CONTRAST = """
(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = c => {
    const l = c.map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const behind = e => { const grounds = [];
    for (; e; e = e.parentElement) grounds.push(parse(getComputedStyle(e).backgroundColor));
    return grounds.reverse().reduce((under, ground) => over(ground, under), [255, 255, 255]); };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || !e.getClientRects().length || e.tagName === 'title') continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const colour = parse(svg ? style.fill : style.color), ground = behind(e);
    const a = light(over(colour, ground)), b = light(ground);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    seen += 1;
    if (ratio < (size >= 24 || (size >= 18.6 && style.fontWeight >= 700) ? 3 : 4.5))
      found.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return {seen, found};
})()
"""
WIDE = """
(() => {
  const width = document.documentElement.clientWidth;
  const boxed = e => e.closest('.scroll, pre, svg');
  return [...document.querySelectorAll('body *')]
    .filter(e => !boxed(e) && e.getBoundingClientRect().right > width + 0.5)
    .map(e => e.tagName + '.' + e.className + ' ' + e.getBoundingClientRect().right);
})()
"""
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(builds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A build's report, one as large as GLM-5's with a frontier, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    large = write_large(folder / "large")
    points = [
        Point(bytes=10**9 * size, kl=1 / size / (1 + n), low=0.8 / size / (1 + n), high=1.2 / size / (1 + n),
              label=f"{name} {size}", series=name, here=size == 3)
        for n, name in enumerate(("ours", "uniform", "llama-quantize")) for size in (2, 3, 5)
    ]  # fmt: skip
    write_points(folder / "frontier.json", points)
    write_report(large, strict=True)
    both = folder / "both.html"
    both.write_text(comparison_page(*(BuildData.read(path) for path in builds.values()), strict=True))
    return {"build": builds["healed"] / "report.html", "large": large / "report.html", "comparison": both}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["build", "large", "comparison"])
def test_a_page(browser: chromium.Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    browser.open(pages[name], width, dark=dark)
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:image/png")] == [pages[name].as_uri()]
    for state in ("as it opens", "with everything unfolded"):
        if state != "as it opens":
            browser.value(OPEN)
        assert browser.value("document.documentElement.clientWidth") == width
        assert browser.value("document.documentElement.scrollWidth") <= width, state
        assert browser.value(WIDE) == [], state
        contrast = browser.value(CONTRAST)
        assert contrast["seen"] > 100
        assert contrast["found"] == [], state
    assert browser.complaints == []


def test_the_schemes_differ(browser: chromium.Browser, pages: dict[str, Path]) -> None:
    grounds = []
    for dark in (False, True):
        browser.open(pages["build"], dark=dark)
        grounds.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_headings_images_and_plots_can_be_seen(browser: chromium.Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["large"], width)
    sizes = """[...document.querySelectorAll('%s')].map(e => {
      const r = e.getBoundingClientRect();
      return [e.id || e.getAttribute('aria-label') || e.alt, r.width, r.height] })"""
    headings = browser.value(sizes % "h1, h2")
    assert [name for name, _, _ in headings] == [None, *(f"{part}-title" for part in SECTIONS)]
    images = browser.value(sizes % "img")
    assert len(images) == 3
    assert browser.value(
        "[...document.images].every(i => i.complete && i.naturalWidth === 256 && i.naturalHeight === 75)"
    )
    for name, wide, high in [*headings, *images]:
        assert wide > 100, name
        assert high > 10, name
    for name, wide, high in browser.value(sizes % "svg.plot"):
        assert name
        assert (wide, high) > (13, 13), name
    # on a phone an expert is wider than a device pixel, and a layer higher than two
    for _, wide, high in images:
        assert wide / 256 > 1
        assert high / 75 > 2
    cut = browser.value("document.querySelector('.heat .over').getBoundingClientRect().left")
    frame = browser.value("(() => { const r = document.querySelector('.heat img').getBoundingClientRect();"
                          "return [r.left, r.width] })()")  # fmt: skip
    assert (cut - frame[0]) / frame[1] == pytest.approx(160 / 256, abs=0.01)


def test_a_screen_reader_is_told_of_every_picture(browser: chromium.Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page)
        browser.call("Accessibility.enable")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        roles = [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]
        ]
        pictures = [name for role, name in roles if role in ("image", "img")]
        assert len(pictures) >= 5
        assert all(pictures)
        assert all(name for role, name in roles if role in ("table", "region", "navigation"))
        assert sum(role == "heading" for role, _ in roles) > 6


def test_what_markup_there_is_in_names_does_not_run(browser: chromium.Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["build"])
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelectorAll('[onerror]').length") == 0
    assert not [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"]
    # and were there a script after all, the page's policy would stop it
    spoilt = pages["build"].with_name("spoilt.html")
    spoilt.write_text(pages["build"].read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    try:
        browser.open(spoilt)
        assert browser.value("document.title") != "ran"
        assert any("Content Security Policy" in line for line in browser.complaints)
    finally:
        spoilt.unlink()


def test_the_checks_see_what_is_wrong(browser: chromium.Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1"><body>'
        '<div style="width:600px">wide</div><p style="color:#999">pale</p><img src="missing.png">'
        "<svg><text y=20 style='fill:#eee'>faint</text></svg><script>console.error('no')</script>"
    )
    browser.open(bad, PHONE)
    assert browser.value("document.documentElement.scrollWidth") >= 600
    assert browser.value(WIDE)[0].startswith("DIV")
    assert [line.split(":")[0] for line in browser.value(CONTRAST)["found"]] == ["pale", "faint"]
    assert any("missing.png" in url for url in browser.requests)
    assert any("no" in line for line in browser.complaints)
