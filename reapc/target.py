"""What the hardware gives: a target is a list of devices, each with the bytes that a program can really use."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from reapc.errors import ReapcError
from reapc.schema import explain_validation, nearest
from reapc.units import parse_bytes

Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Device(BaseModel):
    """One memory that tensors live in: a card, or the machine's RAM (``kind = "cpu"``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str = Field(pattern="^(cuda|rocm|metal|cpu)$")
    capacity_bytes: int = Field(gt=0)
    bandwidth_bytes_per_second: float | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")


class Target(BaseModel):
    """A hardware budget. ``gpus`` cards of ``vram`` usable bytes each, and ``ram`` for the host."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = "inline"
    description: str = ""
    gpus: int = Field(default=0, ge=0, le=1024)
    card: str = "GPU"
    kind: str = Field(default="cuda", pattern="^(cuda|rocm|metal)$")
    vram: Bytes = 0
    ram: Bytes = 0
    bandwidth: float | None = Field(default=None, gt=0, description="bytes per second of one card (or of RAM)")
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    source: str = ""

    @property
    def devices(self) -> tuple[Device, ...]:
        """The memories that a budget is checked against, one by one (never on their sum)."""
        if self.gpus:
            return tuple(
                Device(
                    name=f"{self.card} {i}",
                    kind=self.kind,
                    capacity_bytes=self.vram,
                    bandwidth_bytes_per_second=self.bandwidth,
                    compute_capability=self.compute_capability,
                )
                for i in range(self.gpus)
            )
        return (
            Device(
                name="RAM",
                kind="cpu",
                capacity_bytes=self.ram,
                bandwidth_bytes_per_second=self.bandwidth,
            ),
        )


def known_targets() -> dict[str, Path]:
    """Names and files of the targets that come with reapc."""
    folder = Path(str(resources.files("reapc"))) / "targets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_target(name: str) -> Target:
    """The target called ``name`` (or the TOML file at that path)."""
    path = Path(name) if name.endswith(".toml") else known_targets().get(name)
    if path is None or not path.is_file():
        raise ReapcError(
            f"unknown target {name!r}",
            hint=f"{nearest(name, known_targets())}known targets: {', '.join(known_targets())}; "
            "`reapc targets` describes them, or write gpus, vram and ram in [target]",
        )
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ReapcError(f"{path}: not valid TOML: {error}") from error
    return make_target({"name": path.stem, **data}, where=str(path))


def make_target(data: dict[str, Any], where: str) -> Target:
    """A Target from parsed keys; ``where`` names the file in errors."""
    try:
        target = Target(**data)
    except ValidationError as error:
        raise ReapcError(explain_validation(error, Target, where, prefix="target.")) from error
    if target.gpus and not target.vram:
        raise ReapcError(
            f"{where}: [target] gpus = {target.gpus} but vram is not given",
            hint='write the usable memory of one card, for example vram = "24123MiB"',
        )
    if not target.gpus and not target.ram:
        raise ReapcError(
            f"{where}: [target] has neither gpus and vram nor ram",
            hint='write for example gpus = 8, vram = "24123MiB", or ram = "16GB", or a name from `reapc targets`',
        )
    return target
