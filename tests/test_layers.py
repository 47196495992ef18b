"""Who may import whom (DESIGN.md): cli -> build -> passes -> stream -> checkpoint, and build -> planner -> engines."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "reapc"
PURE = (
    "planner", "arch", "formats", "engines", "recipe", "mix", "target", "plan", "units", "schema", "errors", "machine",
    "probes",
)  # fmt: skip
PASSES = ("observe", "prune", "quantize", "verify")
TOP = (
    "allocate",
    "build",
    "choice",
    "cli",
    "emit",
    "estimate",
    "healing",
    "passes",
    "requirements",
    "stages",
    "inspection",
    "output",
    "rehearse",
    "report",
    "serving",
    "sweep",
)
HEAVY = ("torch", "transformers")
FORBIDDEN = {
    **dict.fromkeys(PURE, ("stream", *PASSES, *TOP, "checkpoint")),
    "checkpoint": ("stream", *PASSES, *TOP, "planner", "engines"),
    "stream": (*PASSES, *TOP, "planner", "engines"),
    **dict.fromkeys(PASSES, ("planner", *TOP)),
    **dict.fromkeys(
        (
            "build",
            "choice",
            "emit",
            "estimate",
            "allocate",
            "healing",
            "passes",
            "sweep",
            "requirements",
            "stages",
            "toolchain",
            "progress",
            "inspection",
            "output",
        ),
        ("cli", "serving", "rehearse"),
    ),
    "report": (*(part for part in TOP if part not in ("report", "stages")), "planner", "engines"),
    "rehearse": ("cli",),  # it drives planner, build and server as a user would
    "serving": (
        "planner",
        "engines",
        "observe.observe",
        "prune",
        "quantize",
        *(part for part in TOP if part != "serving"),
    ),
}
FORBIDDEN["prune"] = FORBIDDEN["observe"] = (*FORBIDDEN["observe"], "verify", "quantize")


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def imports(source: str, package: str = "reapc") -> Iterator[tuple[str, int, bool]]:
    """Every imported module (``a.b``), its line and whether it is imported when the file is."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, at_import
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, "relative import"
                for alias in child.names:
                    yield f"{child.module}.{alias.name}", child.lineno, at_import
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_import and not inside and not typing_only)

    yield from visit(ast.parse(source), True)


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def offences(part: str, banned: tuple[str, ...], lazily: bool = True) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of(part)
        for name, line, at_import in imports(path.read_text())
        if (lazily or at_import) and any(inside(name, module) for module in banned)
    ]


def test_every_part_has_a_rule() -> None:
    parts = {
        p.stem if p.suffix else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__", "__main__", "cli"} == set(FORBIDDEN)


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import a, b.c as d\nfrom e import f\nif TYPE_CHECKING:\n    import g\ndef h():\n    from i.j import k\n"
        "class L:\n    import m\n    def n(self):\n        if x:\n            import o\n"
        "try:\n    import p\nfinally:\n    pass\n"
    )
    found = {name: at_import for name, _, at_import in imports(source)}
    assert found == {
        "a": True, "b.c": True, "e.f": True, "g": False, "i.j.k": False, "m": True, "o": False, "p": True,
    }  # fmt: skip
    assert inside("torch.nn", "torch")
    assert not inside("torchvision", "torch")


@pytest.mark.parametrize("part", FORBIDDEN)
def test_direction(part: str) -> None:
    assert not offences(part, tuple(f"reapc.{name}" for name in FORBIDDEN[part]))


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_never_import_torch(part: str) -> None:
    assert not offences(part, HEAVY)


@pytest.mark.parametrize(
    "part",
    ["cli", "toolchain", "progress", "stages", "emit", "checkpoint", "inspection", "serving", "rehearse", "report"],
)
def test_torch_is_imported_late(part: str) -> None:
    assert not offences(part, HEAVY, lazily=False)


def test_transformers_is_always_imported_late() -> None:
    for part in FORBIDDEN:
        assert not offences(part, ("transformers",), lazily=False)


def test_nothing_but_main_imports_cli() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for name, _, _ in imports(path.read_text())
        if inside(name, "reapc.cli")
    }
    assert found == {"__main__.py"}


def test_light_parts_start_without_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for part in (*PURE, "checkpoint", "cli", "toolchain", "progress", "emit", "inspection", "serving", "report")
        for path in files_of(part)
    ]
    assert "reapc.planner.search" in modules
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
