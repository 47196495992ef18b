"""Text for the demonstration model, gathered from the Python installation that runs this file.

Nothing is downloaded. Each domain is a list of documents with a stable name; the name alone decides
whether a document is trained on or held out, and lines seen twice are kept once, held-out documents first,
so that what is held out was never trained on.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HELD_OUT_PERCENT = 6
CHUNK_LINES = 4
LONG_LINE = 100
MIN_DOCUMENT_CHARS = 200
MIN_DOMAIN_CHARS = 400_000
PROSE_PACKAGES = ("torch", "transformers", "numpy", "scipy", "sympy", "networkx", "matplotlib", "mpmath")
DATA_SUFFIXES = {".json", ".csv", ".xml", ".html", ".css", ".afm", ".decTest", ".zi", ".toml", ".yaml"}
PYTHON_EXCLUDED = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One piece of text: ``name`` is relative to its source, so it is the same on every machine."""

    name: str
    text: str
    held_out: bool


@dataclass
class Corpus:
    """Documents per domain, and the sources they came from."""

    domains: dict[str, list[Document]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def documents(self, domain: str, held_out: bool) -> list[Document]:
        """Documents of one domain on one side of the split."""
        return [document for document in self.domains[domain] if document.held_out == held_out]


class _Sources:
    """Finds folders of the installation, and remembers which were used (or says which are absent)."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stdlib = Path(sysconfig.get_paths()["stdlib"])
        self.packages = Path(sysconfig.get_paths()["purelib"])
        self.include = Path(sysconfig.get_paths()["include"])
        self.used: dict[str, str] = {"CPython": sys.version.split()[0]}
        self._say = say

    def folder(self, path: Path, distribution: str | None = None) -> Path | None:
        """``path`` when it exists (noting the distribution it belongs to), else None with a line."""
        if not path.is_dir():
            self._say(f"skipped: no folder {path}")
            return None
        if distribution:
            self.used[distribution] = metadata.version(distribution)
        return path


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether the document of that name is kept from training: a fixed share, decided by its name alone."""
    return _stable_hash(name) % 100 < HELD_OUT_PERCENT


def _read(path: Path, limit: int) -> str:
    """Text of a file up to ``limit`` characters, cut at a line end; empty when it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return text if len(text) <= limit else text[:limit].rpartition("\n")[0]


def _files(root: Path, suffixes: set[str], excluded: set[str], limit: int) -> Iterator[tuple[str, str]]:
    """(relative name, text) of the files below ``root``, in name order."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in suffixes and not excluded.intersection(relative.parts[:-1]) and path.is_file():
            yield f"{root.name}/{relative.as_posix()}", _read(path, limit)


def _python(sources: _Sources) -> Iterator[tuple[str, str]]:
    for name, text in _files(sources.stdlib, {".py"}, PYTHON_EXCLUDED, 60_000):
        yield "stdlib/" + name.partition("/")[2], text


def _prose_paragraphs(text: str) -> str:
    """Paragraphs of ``text`` that read as sentences: mostly letters, no code, closed by a full stop."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        letters = sum(character.isalpha() or character == " " for character in joined)
        sentence = len(joined) >= 60 and joined[-1] in ".:" and letters > 0.88 * len(joined)
        if sentence and not joined.startswith((">>>", "..", ":", "|", "-", "*")):
            kept.append(joined)
    return "\n\n".join(kept)


def _chat(question: str, answer: str) -> str:
    """One question and answer in the layout of the chat template."""
    turns = (("user", question), ("assistant", answer))
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)


def _docstrings(text: str, package: str) -> str:
    """Prose of a module's docstrings; every fourth is put as a question and an answer."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    pieces = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        prose = _prose_paragraphs(inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))
        if not prose:
            continue
        name = getattr(node, "name", None)
        if name and _stable_hash(prose) % 4 == 0:
            prose = _chat(f"What is {name} in {package}?", prose.split("\n\n")[0])
        pieces.append(prose)
    return "\n\n".join(pieces)


def _english(sources: _Sources) -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for topic, text in sorted(topics.items()):
        yield f"pydoc/{topic}", _prose_paragraphs(inspect.cleandoc(text))
    for package in PROSE_PACKAGES:
        folder = sources.folder(sources.packages / package, package)
        for name, text in _files(folder, {".py"}, {"__pycache__"}, 400_000) if folder else ():
            yield name, _docstrings(text, package)
    help_root = sources.folder(sources.packages / "cmake" / "data" / "share", "cmake")
    for name, text in _files(help_root, {".rst"}, set(), 60_000) if help_root else ():
        yield name, _prose_paragraphs(text)
    for info in sorted(sources.packages.glob("*.dist-info")):
        distribution, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        sources.used.setdefault(distribution, version)
        for name, text in _files(info, {".txt", ".md", ".rst", ""}, {"sboms"}, 30_000):
            if not name.endswith(("RECORD", "WHEEL", "INSTALLER", "REQUESTED")):
                yield name, _prose_paragraphs(text)


def _headers(sources: _Sources) -> Iterator[tuple[str, str]]:
    roots = [
        (sources.include, None),
        (sources.packages / "numpy" / "_core" / "include", "numpy"),
        (sources.packages / "torch" / "include", "torch"),
    ]
    for path, distribution in roots:
        folder = sources.folder(path, distribution)
        for name, text in _files(folder, {".h", ".hpp", ".cuh"}, {"ops"}, 40_000) if folder else ():
            yield f"{distribution or 'python'}/{name}", text


def _unicode_table(first: int) -> str:
    """A table of the named characters of one block of 256 code points, as semicolon-separated values."""
    rows = []
    for code in range(first, first + 256):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH" not in name and "HANGUL SYLLABLE" not in name:
            character = chr(code)
            rows.append(
                f"{code:04X};{name};{unicodedata.category(character)};"
                f"{unicodedata.combining(character)};{unicodedata.bidirectional(character)}"
            )
    return "\n".join(rows)


def _data(sources: _Sources) -> Iterator[tuple[str, str]]:
    for first in range(0, 0x20000, 256):
        yield f"unicode/{first:05X}", _unicode_table(first)
    for name, text in _files(sources.stdlib, DATA_SUFFIXES, {"site-packages", "__pycache__"}, 24_000):
        yield "stdlib/" + name.partition("/")[2], text
    for name, text in _files(sources.packages, DATA_SUFFIXES, {"__pycache__"}, 24_000):
        yield name, text


def _cmake(sources: _Sources) -> Iterator[tuple[str, str]]:
    roots = [
        (sources.packages / "torch" / "share" / "cmake", "torch"),
        (sources.packages / "cmake" / "data" / "share", "cmake"),
    ]
    for path, distribution in roots:
        folder = sources.folder(path, distribution)
        for name, text in _files(folder, {".cmake", ".in"}, set(), 30_000) if folder else ():
            yield f"{distribution}/{name}", text


DOMAINS: dict[str, Callable[[_Sources], Iterator[tuple[str, str]]]] = {
    "python": _python,
    "english": _english,
    "c_headers": _headers,
    "data": _data,
    "cmake": _cmake,
}


def _windows(lines: list[str]) -> Iterator[tuple[int, range]]:
    """(hash, line numbers) of every run of ``CHUNK_LINES`` non-blank lines, and of every long line alone."""
    filled = [(number, " ".join(line.split()).lower()) for number, line in enumerate(lines) if line.strip()]
    for start in range(len(filled)):
        run = filled[start : start + CHUNK_LINES]
        yield _stable_hash("\n".join(text for _, text in run)), range(run[0][0], run[-1][0] + 1)
        if len(run[0][1]) >= LONG_LINE:
            yield _stable_hash(run[0][1]), range(run[0][0], run[0][0] + 1)


def _without_seen(text: str, seen: set[int]) -> str:
    """``text`` less the lines met before, in runs or as one long line (licence headers, copies)."""
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    dropped: set[int] = set()
    found = set()
    for key, numbers in _windows(lines):
        if key in seen:
            dropped.update(numbers)
        found.add(key)
    seen.update(found)
    kept = "\n".join(line for number, line in enumerate(lines) if number not in dropped)
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n")


def build_corpus(say: Callable[[str], None] = print) -> Corpus:
    """Gather every domain from this installation, held-out documents first so that training loses copies."""
    sources = _Sources(say)
    corpus = Corpus()
    seen: set[int] = set()
    for domain, gather in DOMAINS.items():
        documents = [Document(name, text, is_held_out(name)) for name, text in gather(sources)]
        kept = []
        for document in sorted(documents, key=lambda item: (not item.held_out, item.name)):
            text = _without_seen(document.text, seen)
            if len(text) >= MIN_DOCUMENT_CHARS:
                kept.append(Document(document.name, text + "\n", document.held_out))
        total = sum(len(document.text) for document in kept)
        if total < MIN_DOMAIN_CHARS:
            say(f"skipped: domain {domain} has only {total} characters")
            continue
        corpus.domains[domain] = kept
        held = sum(len(document.text) for document in kept if document.held_out)
        say(f"domain {domain}: {len(kept)} documents, {total / 1e6:.1f} M characters ({held / 1e6:.2f} M held out)")
    corpus.sources = dict(sorted(sources.used.items()))
    return corpus
