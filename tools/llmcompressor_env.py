"""Makes the environments that benchmarks/llm_compressor.py runs llm-compressor in, in reapc's cache (1.5 GB each).

    python tools/llmcompressor_env.py [RELEASE]          make what is missing, print each one's Python
    python tools/llmcompressor_env.py --path [RELEASE]   print each one's Python; exit 1 where one is not made

Its releases pin transformers below reapc's, so they cannot live beside it. pip takes a CPU build of torch where its
settings (find-links) offer one; elsewhere PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu keeps CUDA out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# The first release with REAPPruningModifier, and the newest one.
RELEASES = {
    "0.13.0": (
        "transformers==5.14.1",
        "compressed-tensors==0.18.0",
        "auto-round==0.14.2",
        "accelerate==1.14.0",
        "datasets==5.0.1",
        "tokenizers==0.22.2",
    ),
    "0.14.0.1": (
        "transformers==5.17.0",
        "compressed-tensors==0.19.0",
        "auto-round==0.15.1",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "tokenizers==0.23.3",
    ),
}
# torch is reapc's own: all run the same matrix kernels
COMMON = ("torch==2.13.0", "huggingface_hub==1.33.0", "safetensors==0.8.0", "numpy==2.4.6")
STAMP = "reapc-complete.json"
DISK_BYTES = 3 * 10**9  # one environment and the wheels while they are unpacked
CHECK = "from llmcompressor.modifiers.pruning import REAPPruningModifier"


class Failed(Exception):
    """Something went wrong; the message says what and what to do."""


def requirements(release: str) -> tuple[str, ...]:
    """What pip is asked for."""
    return (f"llmcompressor=={release}", *RELEASES[release], *COMMON)


def folder(release: str) -> Path:
    """Where the environment is or would be, under XDG_CACHE_HOME (default ~/.cache): other pins, another folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(repr((requirements(release), sys.version, sys.base_prefix)).encode()).hexdigest()[:8]
    return Path(base) / "reapc" / "llmcompressor" / f"{release}-{digest}"


def find(release: str) -> Path | None:
    """The Python of the finished environment, or None."""
    place = folder(release)
    return place / "bin" / "python" if (place / STAMP).is_file() else None


def _run(command: list[str | Path], what: str) -> None:
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-25:])
        raise Failed(f"{what} failed (exit {done.returncode}): {' '.join(map(str, command))}\n{tail}")


def make(release: str) -> Path:
    """The environment's Python; a half-made one is removed first."""
    if found := find(release):
        return found
    place = folder(release)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < DISK_BYTES:
        raise Failed(f"{place.parent}: {free / 1e9:.1f} GB free, about {DISK_BYTES / 1e9:.0f} GB are needed")
    print(f"making {place}", file=sys.stderr, flush=True)
    python = place / "bin" / "python"
    _run([sys.executable, "-m", "venv", place], "venv")
    _run([python, "-m", "pip", "install", "--quiet", *requirements(release)], f"installing llm-compressor {release}")
    _run([python, "-c", CHECK], "importing REAPPruningModifier")
    partial = place / f"{STAMP}.partial"
    partial.write_text(json.dumps({"requirements": requirements(release)}) + "\n")
    partial.rename(place / STAMP)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", choices=RELEASES, help="only this one")
    parser.add_argument("--path", action="store_true", help="make nothing")
    asked = parser.parse_args()
    for release in [asked.release] if asked.release else RELEASES:
        try:
            python = find(release) if asked.path else make(release)
        except Failed as error:
            print(f"llmcompressor_env.py: {error}", file=sys.stderr)
            return 1
        if python is None:
            print(f"{folder(release)} is not made: python tools/llmcompressor_env.py {release}", file=sys.stderr)
            return 1
        print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
