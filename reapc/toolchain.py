"""Where llama.cpp's tools are, and how to build the pinned ones when they are missing.

Each tool is looked for in ``REAPC_LLAMA_CPP`` (a folder), on PATH, and in reapc's own cache, in this
order and separately: somebody with a llama-server on PATH still gets the converter from the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from reapc.errors import CannotBeDone

SDIST_VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
BUILD_DISK_BYTES = 600 * 2**20  # sdist, unpacked tree and object files; what stays is about 25 MiB
PROGRESS_SECONDS = 10.0

EXECUTABLES = {"quantize": "llama-quantize", "server": "llama-server", "fit_params": "llama-fit-params"}
TOOL_NAMES = {**EXECUTABLES, "convert": "convert_hf_to_gguf.py", "lib_dir": "llama.cpp's libraries"}

_CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=" + ("@loader_path" if sys.platform == "darwin" else "$ORIGIN"),
)
# The build is made for this processor (GGML_NATIVE): a home folder shared with an older machine must
# not offer it binaries that die of an illegal instruction.
_CPU_FEATURES = re.compile(r"\b(avx\w*|amx\w*|f16c|fma|bmi2|sve\w*|i8mm|asimddp|bf16)\b")


@dataclass(frozen=True)
class LlamaCpp:
    """The tools that were found; None for one that is nowhere.

    ``source`` and ``version`` are those of the quantizer, or of the server where there is no quantizer.
    ``lib_dir`` is always the cache's: the Python bindings in ``bindings`` fit those libraries and no others.
    """

    source: str
    quantize: Path | None
    server: Path | None
    fit_params: Path | None
    convert: Path | None
    lib_dir: Path | None
    version: str
    bindings: Path | None = None
    sources: dict[str, str] = field(default_factory=dict)


def cache_root() -> Path:
    """The folder that holds reapc's own builds of llama.cpp, one folder each."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reapc" / "llama.cpp"


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return " ".join(sorted(set(_CPU_FEATURES.findall(text))))


def cache_folder() -> Path:
    """Where the pinned build for this processor is, or would be."""
    recipe = "\n".join((SDIST_SHA256, *_CMAKE_FLAGS, platform.system(), platform.machine(), _cpu_features()))
    return cache_root() / f"{SDIST_VERSION}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def tool_version(executable: Path) -> str:
    """What ``--version`` says after "version:", or ``"unknown"``.

    llama-quantize has no ``--version``: the server or llama-fit-params in its folder is asked instead.
    """
    if executable.name == EXECUTABLES["quantize"]:
        others = (executable.with_name(EXECUTABLES[tool]) for tool in ("server", "fit_params"))
        executable = next((path for path in others if path.is_file()), executable)
    try:
        done = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(r"version:\s*(.+)", done.stdout + done.stderr)
    return match.group(1).strip() if match else "unknown"


def _in_folders(name: str, folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        path = folder / name
        if path.is_file() and (name.endswith(".py") or os.access(path, os.X_OK)):
            return path
    return None


def _has_conversion_package(script: Path | None) -> bool:
    """True for a converter of the pinned layout: the package ``conversion`` lies beside the script."""
    return script is not None and (script.parent / "conversion" / "__init__.py").is_file()


def find_llamacpp() -> LlamaCpp:
    """Looks for every tool; nothing is built and nothing missing is an error."""
    cache = cache_folder()
    places: list[tuple[str, list[Path]]] = []
    if named := os.environ.get("REAPC_LLAMA_CPP"):
        folder = Path(named).expanduser()
        places.append(("REAPC_LLAMA_CPP", [folder, folder / "bin", folder / "build" / "bin"]))
    on_path = [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    places += [("PATH", on_path), ("cache", [cache, cache / "bin"])]

    found: dict[str, Path] = {}
    sources: dict[str, str] = {}
    for tool in (*EXECUTABLES, "convert"):
        for source, folders in places:
            path = _in_folders(TOOL_NAMES[tool], folders)
            if path is None or (tool == "convert" and not _has_conversion_package(path)):
                continue
            found[tool], sources[tool] = path, source
            break
    bindings = cache / "python"
    has_libraries = (bindings / "llama_cpp" / "__init__.py").is_file()
    if has_libraries:
        sources["lib_dir"] = "cache"
    leading = next((tool for tool in EXECUTABLES if tool in found), "")
    return LlamaCpp(
        source=sources.get(leading, ""),
        quantize=found.get("quantize"),
        server=found.get("server"),
        fit_params=found.get("fit_params"),
        convert=found.get("convert"),
        lib_dir=cache / "bin" if has_libraries else None,
        version=tool_version(found[leading]) if leading else "",
        bindings=bindings if has_libraries else None,
        sources=sources,
    )


def require(tool_name: str) -> Path:
    """The path of ``quantize``, ``server``, ``fit_params``, ``convert`` or ``lib_dir``, or an error."""
    path: Path | None = getattr(find_llamacpp(), tool_name)
    if path is None:
        raise CannotBeDone(
            f"{TOOL_NAMES[tool_name]} is not installed: looked in REAPC_LLAMA_CPP, on PATH and in {cache_folder()}",
            hint="build llama.cpp once (5 to 10 minutes on 2 cores): reapc doctor --install",
        )
    return path


def find_build_tool(name: str) -> Path | None:
    """``cmake`` or ``ninja`` from this Python's scripts folder, else from PATH."""
    own = Path(sysconfig.get_path("scripts")) / name
    if own.is_file():
        return own
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def find_cxx_compiler() -> Path | None:
    """The C++ compiler that cmake would take: ``$CXX``, c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return Path(path)
    return None


def run_logged(
    command: Sequence[str | Path],
    what: str,
    log: Callable[[str], None],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    keep_lines: int = 200,
    progress: Callable[[str], str | None] = lambda line: None,
) -> str:
    """Runs ``command``; at most every 10 s logs what ``progress`` makes of a line of its output.

    Returns the last ``keep_lines`` lines of stdout and stderr together; a failure is an error with the last 15.
    """
    tail: deque[str] = deque(maxlen=keep_lines)
    told = time.monotonic()
    with subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        cwd=cwd,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail.append(line.rstrip())
                message = progress(tail[-1])
                if message and time.monotonic() - told >= PROGRESS_SECONDS:
                    told = time.monotonic()
                    log(message)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = "\n    ".join(line for line in list(tail)[-15:] if line.strip())
        raise CannotBeDone(f"{what} failed (exit {process.returncode}); its last lines:\n    {last}")
    return "\n".join(tail)


def install_llamacpp(log: Callable[[str], None]) -> LlamaCpp:
    """Downloads the pinned llama.cpp from PyPI and builds it into the cache (5 to 10 minutes on 2 cores).

    The final folder appears by one rename: an interrupted install leaves nothing under its name.
    """
    final = cache_folder()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock_path = final.parent / ".lock"
        lock_path.touch()
    except OSError as error:
        raise CannotBeDone(
            f"cannot write to the cache folder {final.parent}: {error.strerror or error}",
            hint="set XDG_CACHE_HOME to a folder that you can write to",
        ) from error
    with _lock(lock_path, log):
        if final.exists():
            log(f"llama.cpp is already in {final}")
            return find_llamacpp()
        cmake, ninja = _check_build_tools(final.parent)
        partial = final.with_name(f"{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            source = _download(partial, log)
            _build(cmake, ninja, source / "vendor" / "llama.cpp", partial / "build", log)
            assemble(source, partial / "build", partial / "installed")
            os.replace(partial / "installed", final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        log(f"llama.cpp {tool_version(final / 'bin' / 'llama-quantize')} is in {final}")
    return find_llamacpp()


@contextmanager
def _lock(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the install lock; the system frees it when the process ends, however it ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another install is under way; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _check_build_tools(root: Path) -> tuple[Path, Path]:
    if find_cxx_compiler() is None:
        raise CannotBeDone(
            "building llama.cpp needs a C++ compiler and none was found (c++, g++, clang++ or $CXX)",
            hint="Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install",
        )
    cmake, ninja = find_build_tool("cmake"), find_build_tool("ninja")
    if cmake is None or ninja is None:
        missing = " and ".join(name for name, path in (("cmake", cmake), ("ninja", ninja)) if path is None)
        raise CannotBeDone(f"building llama.cpp needs {missing}", hint=f"{sys.executable} -m pip install cmake ninja")
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < BUILD_DISK_BYTES:
        raise CannotBeDone(
            f"building llama.cpp needs {BUILD_DISK_BYTES >> 20} MiB in {root} and {free_bytes >> 20} MiB are free",
            hint="free some space, or set XDG_CACHE_HOME to a folder on another disk",
        )
    return cmake, ninja


def _download(partial: Path, log: Callable[[str], None]) -> Path:
    """The unpacked sdist, its checksum checked."""
    log(f"downloading llama-cpp-python {SDIST_VERSION} (sources of llama.cpp) from PyPI")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    package = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={SDIST_VERSION}"]
    run_logged([*pip, *package, "--dest", partial], "pip download", log)
    archive = partial / f"llama_cpp_python-{SDIST_VERSION}.tar.gz"
    with archive.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != SDIST_SHA256:
        raise CannotBeDone(
            f"{archive.name} has sha256 {digest}, expected {SDIST_SHA256}",
            hint="the package index served something else than PyPI does; check pip's index-url",
        )
    with tarfile.open(archive) as tar:
        tar.extractall(partial / "source", filter="data")
    return partial / "source" / f"llama_cpp_python-{SDIST_VERSION}"


def _build(cmake: Path, ninja: Path, tree: Path, build: Path, log: Callable[[str], None]) -> None:
    jobs = os.cpu_count() or 1
    log(f"configuring and building llama.cpp with {jobs} jobs")
    configure: list[str | Path] = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *_CMAKE_FLAGS]
    configure += ["-S", tree, "-B", build]
    run_logged(configure, "cmake", log)

    def steps(line: str) -> str | None:
        match = re.match(r"\[\d+/\d+\]", line)
        return f"building llama.cpp {match.group(0)}" if match else None

    targets = sorted(EXECUTABLES.values())
    run_logged([ninja, "-C", build, "-j", str(jobs), *targets], "the build of llama.cpp", log, progress=steps)


def assemble(source: Path, build: Path, out: Path) -> None:
    """Lays out an install in ``out`` from the unpacked sdist and its build tree.

    bin/ holds tools and libraries (they find each other by a relative rpath), python/ the bindings.
    """
    tree = source / "vendor" / "llama.cpp"
    (out / "bin").mkdir(parents=True)
    for path in sorted((build / "bin").iterdir()):
        if path.name in EXECUTABLES.values() or re.search(r"\.(so|dylib)(\.|$)", path.name):
            shutil.copy2(path, out / "bin" / path.name, follow_symlinks=False)
    shutil.copy2(tree / "convert_hf_to_gguf.py", out)
    no_bytecode = shutil.ignore_patterns("__pycache__")
    for folder in ("conversion", "gguf-py"):
        shutil.copytree(tree / folder, out / folder, ignore=no_bytecode)
    shutil.copytree(source / "llama_cpp", out / "python" / "llama_cpp", ignore=no_bytecode)
    shutil.copy2(tree / "LICENSE", out / "LICENSE.llama.cpp")
    shutil.copy2(source / "LICENSE.md", out / "LICENSE.llama-cpp-python.md")
    facts = {"sdist": f"llama-cpp-python=={SDIST_VERSION}", "sha256": SDIST_SHA256, "cmake_flags": _CMAKE_FLAGS}
    (out / "install.json").write_text(json.dumps(facts, indent=2) + "\n")
