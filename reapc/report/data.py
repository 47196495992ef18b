"""What a build's folder says, read for its report: every part by itself, so that one that lacks leaves the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from reapc.plan import Plan

if TYPE_CHECKING:
    from reapc.observe.scores import Scores

REPORT = "report.html"
FIDELITY = "fidelity.json"
FRONTIER = "frontier.json"


class Missing(Exception):
    """A part of the report that cannot be shown; the message is the sentence that says so."""


@dataclass(frozen=True)
class BuildData:
    """The output folder of a build. ``siblings``: the folder that it lies in, or will."""

    folder: Path
    manifest: dict[str, Any]
    siblings: Path

    @staticmethod
    def read(folder: Path, siblings: Path | None = None) -> BuildData:
        """OSError or ValueError where there is no manifest that can be read."""
        manifest = json.loads((folder / "manifest.json").read_text())
        if not isinstance(manifest, dict):
            raise ValueError(f"{folder / 'manifest.json'}: an object is expected")
        return BuildData(folder, manifest, siblings or folder.absolute().parent)

    def get(self, key: str, what: str) -> Any:
        """An entry of the manifest; Missing says that it lacks ``what``."""
        if not (found := self.manifest.get(key)):
            raise Missing(f"This build's manifest says nothing of {what}.")
        return found

    @property
    def name(self) -> str:
        return str(self.manifest.get("recipe_name") or self.folder.name)

    @property
    def model(self) -> str:
        source = self.manifest.get("model")
        return str(source.get("source", "")) if isinstance(source, dict) else ""

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """``from_scores``, which was carried out, and ``from_prior``."""
        try:
            stored = json.loads((self.folder / "plan.json").read_text())
            return {name: Plan.model_validate(plan) for name, plan in stored.items()}
        except FileNotFoundError:
            raise Missing("plan.json is not there: nothing can be said of the decision.") from None
        except (OSError, ValueError, ValidationError, AttributeError) as error:
            raise Missing(f"plan.json cannot be read ({type(error).__name__}), or is of another version.") from error

    @property
    def plan(self) -> Plan:
        try:
            return self.plans["from_scores"]
        except KeyError:
            raise Missing("plan.json does not hold the plan that was carried out.") from None

    @cached_property
    def scores(self) -> Scores:
        from reapc.errors import ReapcError
        from reapc.observe.scores import load_scores

        path = self.folder / "scores.safetensors"
        if not path.is_file():
            raise Missing("scores.safetensors is not there.")
        try:
            return load_scores(path)
        except (ReapcError, OSError, ValueError, KeyError) as error:
            raise Missing(f"scores.safetensors cannot be read: {error}") from error

    @cached_property
    def kept(self) -> dict[int, list[int]]:
        """Experts that stay, by layer."""
        found = self.get("kept", "which experts were kept")
        return {int(layer): [int(expert) for expert in experts] for layer, experts in found.items()}

    @cached_property
    def detail(self) -> dict[str, Any]:
        """fidelity.json"""
        try:
            found = json.loads((self.folder / FIDELITY).read_text())
        except FileNotFoundError:
            raise Missing(f"{FIDELITY} is not there: figures by sequence and position were not stored.") from None
        except (OSError, ValueError) as error:
            raise Missing(f"{FIDELITY} cannot be read ({type(error).__name__}).") from error
        from reapc.verify.detail import FORMAT

        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise Missing(f"{FIDELITY} is of another version.")
        return found

    @property
    def held_out_digest(self) -> str | None:
        """Identity of the held-out tokens, where anything in the folder tells."""
        held_out = self.manifest.get("held_out")
        if isinstance(held_out, dict) and held_out.get("digest"):
            return str(held_out["digest"])
        path = self.folder / "held_out.safetensors"
        if not path.is_file():
            return None
        import sys

        from reapc.errors import ReapcError
        from reapc.stream.tokens import read_tokens

        try:
            return read_tokens(path, sys.maxsize).digest
        except (ReapcError, OSError, ValueError):
            return None
