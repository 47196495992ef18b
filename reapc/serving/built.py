"""What a build folder says of itself, read for the commands that come after the launch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reapc import __version__
from reapc.errors import CannotBeDone, ReapcError
from reapc.plan import Plan

REFERENCE = "reference.safetensors"
HELD_OUT = "held_out.safetensors"
_REBUILD = "build again with this reapc: reapc build RECIPE"


@dataclass(frozen=True)
class Built:
    """A build folder. ``warnings`` are for the user; ``plan`` is the second plan, the one that was carried out."""

    folder: Path
    manifest: dict[str, Any]
    plan: Plan
    warnings: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        return self.plan.chosen.engine

    @property
    def artifact(self) -> Path:
        """The GGUF file, or the folder of the checkpoint."""
        return self.folder / str(self.manifest["artifact"])

    @property
    def script(self) -> Path:
        return self.folder / "serve.sh"

    @property
    def key_variable(self) -> str:
        """The variable that serve.sh takes its API key from."""
        return "VLLM_API_KEY" if self.engine == "vllm" else "LLAMA_API_KEY"

    @property
    def tensor_bytes(self) -> int | None:
        """Bytes of the artifact's tensors, as the build counted them."""
        rows = {row.get("name"): row.get("actual_bytes") for row in self.manifest.get("fit", [])}
        return rows.get("weights")

    def need(self, name: str) -> Path:
        """The path of a file of the build; exit 2 with what to do when it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise ReapcError(f"{path}: no such file; reapc {version_of(self.manifest)} wrote this build", hint=_REBUILD)
        return path


def version_of(manifest: dict[str, Any]) -> str:
    """The reapc that wrote a manifest."""
    versions = manifest.get("versions")
    return (
        str(versions.get("reapc", "of an unknown version")) if isinstance(versions, dict) else "of an unknown version"
    )


def read_built(folder: Path) -> Built:
    """The build in ``folder``. ReapcError: no build, or one that cannot be read. Another version is a warning as long
    as what is needed can be read."""
    if not folder.is_dir():
        raise ReapcError(f"{folder}: no such folder", hint="give the output folder of a `reapc build`")
    manifest = _json(folder / "manifest.json", folder)
    warnings = []
    if (found := version_of(manifest)) != __version__:
        warnings.append(f"{folder} was written by reapc {found}; this is {__version__}")
    plans = _json(folder / "plan.json", folder)
    try:
        if not isinstance(manifest["artifact"], str) or not isinstance(manifest["files"], dict):
            raise TypeError
        plan = Plan.model_validate(plans["from_scores"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ReapcError(
            f"{folder}: manifest.json and plan.json are not those of reapc {__version__} (written by reapc {found})",
            hint=_REBUILD,
        ) from error
    return Built(folder, manifest, plan, tuple(warnings))


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ReapcError(
            f"{folder}: has no {path.name}, so it is no build folder", hint="give the output folder of a `reapc build`"
        ) from error
    except (OSError, ValueError) as error:
        raise ReapcError(f"{path}: cannot be read: {error}", hint=_REBUILD) from error
    if not isinstance(data, dict):
        raise ReapcError(f"{path}: an object is expected", hint=_REBUILD)
    return data


def check_files(built: Built) -> int:
    """Compares the sizes of all files with the manifest; their number. CannotBeDone names the first that differ."""
    wrong = []
    for name, size in built.manifest["files"].items():
        path = built.folder / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name}: {path.stat().st_size} bytes, the manifest says {size}")
    known = {*built.manifest["files"], "manifest.json"}
    extra = sorted(
        str(p.relative_to(built.folder)) for p in built.folder.rglob("*")
        if p.is_file() and str(p.relative_to(built.folder)) not in known
    )  # fmt: skip
    wrong += [f"{name}: not in the manifest" for name in extra]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CannotBeDone(
            f"{built.folder}: {len(wrong)} of its files are not as they were built:\n  "
            + "\n  ".join(wrong[:8])
            + more,
            hint="copy the folder again, or build again",
        )
    return len(built.manifest["files"])
