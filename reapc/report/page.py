"""The page: sections that each stand or fall by themselves, and one template around them. Everything from outside is
escaped by the templates; the page loads nothing and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from reapc import __version__
from reapc.report import allocation, frontier_section, loss, passages, sections, tables
from reapc.report.data import BuildData, Missing
from reapc.units import format_bytes

if TYPE_CHECKING:
    from jinja2 import Environment

STYLE = (Path(__file__).parent / "templates" / "style.css").read_text()
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

_BUILD: tuple[tuple[str, str, Callable[[BuildData], dict[str, Any]]], ...] = (
    ("decision", "The decision", sections.decision),
    ("memory", "Memory", sections.memory),
    ("allocation", "Bits by tensor", allocation.allocation),
    ("loss", "What was lost", loss.loss),
    ("passages", "Original and result side by side", passages.passages),
    ("experts", "Experts", sections.experts),
    ("healing", "Healing", sections.healing),
    ("stability", "How stable the choice is", sections.stability),
    ("frontier", "The frontier", frontier_section.frontier),
    ("provenance", "Provenance", sections.provenance),
)


@dataclass(frozen=True)
class Section:
    """A part of a page, rendered."""

    id: str
    title: str
    html: Markup


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("reapc.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["bytes"] = format_bytes
    return environment


def section(
    name: str, title: str, values: Callable[[], Mapping[str, Any]], strict: bool = False, id: str = ""
) -> Section:
    """The section of the template ``name`` with what ``values`` gives; a sentence instead where it cannot be shown.
    ``strict``: whatever is not Missing is raised. ``id``: its anchor, the template's name unless given."""
    try:
        html = _environment().get_template(f"{name}.html.j2").render(values())
    except Missing as error:
        html = left_out(str(error))
    except Exception as error:  # a report must not fail for one of its parts
        if strict:
            raise
        html = left_out(f"This part could not be drawn ({type(error).__name__}: {error}).")
    return Section(id or name, title, Markup(html))


def left_out(sentence: str) -> Markup:
    return Markup('<p class="left-out">{}</p>').format(sentence)


def render(title: str, about: str, tiles: Sequence[tuple[str, str, str]], parts: Sequence[Section]) -> str:
    """A whole page. ``tiles``: (name, figure, remark)."""
    template = _environment().get_template("page.html.j2")
    text = template.render(
        title=title, about=about, tiles=tiles, sections=parts, style=Markup(STYLE), version=__version__
    )
    return _FORBIDDEN.sub("\ufffd", text)


def build_page(data: BuildData, strict: bool = False) -> str:
    """The report of one build."""
    parts = [section(name, title, lambda make=make: make(data), strict) for name, title, make in _BUILD]  # type: ignore[misc]
    try:
        about = f"{data.model} for {data.plan.target}"
    except Missing:
        about = data.model
    try:
        tiles = _tiles(data)
    except Exception:  # a manifest that lies in its figures; the sections say what they can
        if strict:
            raise
        tiles = []
    return render(f"{data.name}: reapc build", about, tiles, parts)


def _tiles(data: BuildData) -> list[tuple[str, str, str]]:
    """The figures that everybody looks for first; those that are not there are left out."""
    manifest, found = data.manifest, []
    try:
        total: int | None = data.plan.num_experts
    except Missing:
        total = None
    if "experts_kept" in manifest:
        remark = f"of {total} per layer" if total else "per layer"
        found.append(("Experts kept", str(manifest["experts_kept"]), remark))
    if "format" in manifest:
        found.append(("Format", str(manifest["format"]), f"served by {manifest.get('engine', 'an engine')}"))
    fit = {str(row.get("name")): row for row in manifest.get("fit") or [] if isinstance(row, dict)}
    if fit.get("file", {}).get("actual_bytes"):
        found.append(("Size", format_bytes(fit["file"]["actual_bytes"]), f"{fit['file']['actual_bytes']:,} bytes"))
    lost = manifest.get("fidelity")
    if isinstance(lost, dict) and "kl" in lost:
        found.append(("KL", tables.kl(lost["kl"]), "nats per token, on held-out text"))
        found.append(("Top-1 agreement", tables.percent(lost.get("top1")), f"of {lost.get('tokens', 0):,} tokens"))
        after = f"{tables.perplexity(lost.get('perplexity_a'))} → {tables.perplexity(lost.get('perplexity_b'))}"
        found.append(("Perplexity", after, "original → result"))
    return found
