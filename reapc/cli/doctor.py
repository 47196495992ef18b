"""``reapc doctor``: what is installed here, and what each missing thing costs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from reapc.toolchain import (
    EXECUTABLES,
    TOOL_NAMES,
    cache_root,
    find_build_tool,
    find_cxx_compiler,
    find_llamacpp,
    install_llamacpp,
    tool_version,
)
from reapc.units import format_bytes

_PACKAGES = {
    "torch": "observe, prune, convert and verify will not run",
    "transformers": "observe and the GGUF conversion will not run",
    "safetensors": "checkpoints cannot be read",
    "tokenizers": "the calibration corpus cannot be tokenized",
    "numpy": "nothing that touches weights will run",
    "gguf": "GGUF files can be neither read nor written",
}
_OPTIONAL_PACKAGES = {
    "vllm": "plans for vLLM are made, but not served from here",
    "auto-round": "no AutoRound (W4A16) checkpoints from here",
    "gptqmodel": "no GPTQ checkpoints from here",
}
_TOOL_COSTS = {
    "quantize": "no GGUF below 16 bits",
    "server": "a GGUF cannot be served or measured here",
    "fit_params": "predicted memory is not checked against llama.cpp",
    "convert": "no GGUF from a checkpoint",
    "lib_dir": "a GGUF's fidelity cannot be measured",
}
_GGUF_ROAD = {"torch", "transformers", "safetensors", "tokenizers", "numpy", "gguf"} | {
    TOOL_NAMES[tool] for tool in ("quantize", "server", "convert", "lib_dir")
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for; ``cost`` is what does not work without it, empty where it is there."""

    kind: str
    name: str
    version: str = ""
    path: str = ""
    source: str = ""
    cost: str = ""

    @property
    def present(self) -> bool:
        return not self.cost


def _package(name: str, cost: str) -> Finding:
    try:
        return Finding("package", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding("package", name, cost=cost)


def examine() -> list[Finding]:
    """Everything that a build may need, in the order in which it needs it."""
    findings = [_package(name, cost) for name, cost in {**_PACKAGES, **_OPTIONAL_PACKAGES}.items()]
    tools = find_llamacpp()
    for tool, cost in _TOOL_COSTS.items():
        path: Path | None = getattr(tools, tool)
        if path is None:
            findings.append(Finding("llama.cpp", TOOL_NAMES[tool], cost=cost))
            continue
        version = tool_version(path) if tool in EXECUTABLES else ""
        findings.append(Finding("llama.cpp", TOOL_NAMES[tool], version, str(path), tools.sources[tool]))
    builders = {"C++ compiler": find_cxx_compiler(), **{name: find_build_tool(name) for name in ("cmake", "ninja")}}
    for name, path in builders.items():
        cost = "" if path else "llama.cpp cannot be built by reapc doctor --install"
        findings.append(Finding("build tool", name, path=str(path or ""), cost=cost))
    return findings


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@click.command(name="doctor")
@click.option("--install", is_flag=True, help="Build the pinned llama.cpp into the cache (5 to 10 minutes on 2 cores).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(install: bool, as_json: bool) -> None:
    """Show what is installed and what each missing thing costs; exit 0 when the GGUF road works."""
    if install:
        install_llamacpp(lambda line: click.echo(line, err=True))
    findings = examine()
    works = all(finding.present for finding in findings if finding.name in _GGUF_ROAD)
    free = _free_bytes(cache_root())
    if as_json:
        rows = [{**asdict(finding), "present": finding.present} for finding in findings]
        cache = {"folder": str(cache_root()), "free_bytes": free}
        click.echo(json.dumps({"gguf_road": works, "cache": cache, "findings": rows}, indent=2))
    else:
        for finding in findings:
            details = "  ".join(part for part in (finding.version, finding.path, finding.source) if part)
            mark, text = ("ok", details) if finding.present else ("--", f"missing: {finding.cost}")
            click.echo(f"{mark}  {finding.kind:<10}  {finding.name:<22}  {text}")
        click.echo(f"cache {cache_root()}: {format_bytes(free)} free")
        click.echo("the GGUF road works" if works else "the GGUF road does not work; try: reapc doctor --install")
    raise SystemExit(0 if works else 1)
