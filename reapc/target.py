"""What the hardware gives: a target is a list of devices, each with the bytes that a program can really use.

Known hardware is data: one TOML file per card in ``targets/``, whose ``counts`` make names like ``rtx3090x8``.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from reapc.errors import ReapcError
from reapc.schema import explain_validation, nearest
from reapc.units import parse_bytes

FOLDER = Path(__file__).parent / "targets"

# NVIDIA cards whose compute capability nobody stated: the oldest generation that serves every weight format.
ASSUMED_CAPABILITY = (8, 0)
# Bytes per second of a host's RAM that nobody stated: two channels of DDR5-5600, 89.6e9 at 0.67 efficiency
# (facts/hardware-targets.csv). A server with 8 or 12 channels has more.
ASSUMED_RAM_BANDWIDTH = 60e9

_SIZES = ("vram", "vram_total", "ram")


def _bytes(value: Any, info: ValidationInfo) -> Any:
    """Sizes in a file or on a command line need a unit; integers inside the program are bytes already."""
    if isinstance(value, int) and not isinstance(value, bool) and not (info.context or {}).get("as_written"):
        return value
    return parse_bytes(value)


Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]


class Device(BaseModel):
    """One memory that tensors live in: a card, or the machine's RAM (``kind = "cpu"``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str = Field(pattern="^(cuda|rocm|metal|cpu)$")
    capacity_bytes: int = Field(gt=0)
    bandwidth_bytes_per_second: float | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")


class Target(BaseModel):
    """A hardware budget: ``gpus`` cards of ``vram`` usable bytes each (all machines together), ``ram`` for the host.

    Where the GPU's memory is the RAM (``unified``), ``vram`` and ``ram`` are disjoint shares of it: what the GPU may
    hold, and what is left for the host beside the system. So their sum never counts a byte twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = "this budget"
    description: str = ""
    gpus: int = Field(default=0, ge=0, le=1024, description="cards in all machines together; 0 plans for RAM alone")
    card: str = "GPU"
    kind: str = Field(default="cuda", pattern="^(cuda|rocm|metal)$")
    marketed: str = Field(default="", description='the size that the card is sold as, "24 GB"')
    vram: Bytes = Field(default=0, description="usable bytes of one card, as CUDA shows them")
    vram_total: Bytes = Field(
        default=0,
        description="what the driver calls the card's total where not all of it is free; vLLM's "
        "--gpu-memory-utilization is a fraction of this. 0: the same as vram",
    )
    ram: Bytes = 0
    bandwidth: float | None = Field(default=None, gt=0, description="bytes per second of one card (or of RAM)")
    ram_bandwidth: float | None = Field(default=None, gt=0, description="bytes per second of the host's RAM")
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    arch: str = Field(default="", description='AMD\'s name of the architecture, "gfx942"')
    fp8: bool | None = Field(default=None, description="computes in FP8; not needed where compute_capability says it")
    interconnect: Literal["", "pcie", "nvlink", "xgmi", "unified", "network"] = ""
    unified: bool = False
    geforce: bool = Field(default=False, description="PCIe cards without peer-to-peer: no custom all-reduce")
    nodes: int = Field(default=1, ge=1, description="machines that the cards are spread over evenly")
    assumptions: str = ""
    source: str = ""

    @property
    def capability(self) -> tuple[int, int] | None:
        """The CUDA compute capability to plan with; ``ASSUMED_CAPABILITY`` when not stated, None off CUDA."""
        if not self.gpus or self.kind != "cuda":
            return None
        if self.compute_capability is None:
            return ASSUMED_CAPABILITY
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def computes_fp8(self) -> bool:
        """FP8 matrix products in hardware: NVIDIA from 8.9 on (facts/hardware-targets.csv), else as stated."""
        if self.fp8 is not None:
            return self.fp8
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def host_bandwidth(self) -> float:
        """Bytes per second of the memory that holds what is not on a card; assumed when nobody said."""
        own = self.bandwidth if self.unified or not self.gpus else None
        return self.ram_bandwidth or own or ASSUMED_RAM_BANDWIDTH

    @property
    def total_bytes(self) -> int:
        """What the driver calls one card's total memory, at least ``vram``."""
        return max(self.vram, self.vram_total)

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
                bandwidth_bytes_per_second=self.bandwidth or self.ram_bandwidth,
            ),
        )


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a target file; ReapcError when it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ReapcError(f"{path}: cannot read the target: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ReapcError(f"{path}: not valid TOML: {error}") from error


def _names(path: Path, data: dict[str, Any]) -> list[str]:
    """The targets that a file stands for: its own name, or one per count of the card."""
    return [f"{path.stem}x{count}" for count in data["counts"]] if "counts" in data else [path.stem]


def known_targets() -> dict[str, Path]:
    """Names and files of all targets that come with reapc, in the files' order. Parses every file."""
    return {name: path for path in sorted(FOLDER.glob("*.toml")) for name in _names(path, read_toml(path))}


def all_targets() -> Iterator[Target]:
    """Every known target, one file read once."""
    for path in sorted(FOLDER.glob("*.toml")):
        data = read_toml(path)
        for name in _names(path, data):
            yield _from_file(path, data, name)


def _locate(name: str) -> tuple[Path, dict[str, Any], str] | None:
    """File, its keys and the full name of a known target, reading that one file; None when not known."""
    name = name.lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        return None
    path = FOLDER / f"{name}.toml"
    if path.is_file():
        data = read_toml(path)
        return path, data, _names(path, data)[0]  # the bare name of a card is one card
    stem = re.sub(r"x[0-9]+$", "", name)
    path = FOLDER / f"{stem}.toml"
    if stem == name or not path.is_file():
        return None
    data = read_toml(path)
    return (path, data, name) if "counts" in data and name in _names(path, data) else None


def is_target(name: str) -> bool:
    """Whether ``load_target`` knows this name (a path to a TOML file is none)."""
    return _locate(name) is not None


def load_target(name: str) -> Target:
    """The target called ``name``, in any case, or the TOML file at that path. Reads that one file."""
    if name.endswith(".toml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ReapcError(f"unknown target {name!r}: there is no such file", hint=_suggest(path.stem))
        data = read_toml(path)
        return _from_file(path, data, _names(path, data)[0] if "counts" in data else path.stem)
    found = _locate(name)
    if found is None:
        raise ReapcError(f"unknown target {name!r}", hint=_suggest(name))
    return _from_file(*found)


def _suggest(name: str) -> str:
    known = known_targets()
    near = difflib.get_close_matches(name.lower(), known, n=6, cutoff=0.5)
    others = f"Near it: {', '.join(sorted(near))}. " if len(near) > 1 else ""
    return (
        f"{nearest(name.lower(), known)}{others}`reapc targets` lists all {len(known)} targets; for other hardware "
        "write gpus, vram and ram in [target], or use --vram, --gpus and --ram"
    )


def _from_file(path: Path, data: dict[str, Any], name: str) -> Target:
    """The target ``name`` out of the file's keys; a file of one card (``counts``) stands for several."""
    card = {key: value for key, value in data.items() if key not in ("counts", "driver_names")}
    if "counts" not in data:
        return make_target({"name": path.stem, **card}, where=str(path))
    count = int(name.rpartition("x")[2])
    description = f"{count} x {card.get('description', '')}"
    return make_target({**card, "name": name, "description": description, "gpus": count}, where=str(path))


def make_target(data: dict[str, Any], where: str, base: Target | None = None) -> Target:
    """A Target from keys as a user wrote them (sizes need a unit); ``where`` names the file in errors.

    ``base`` is what the keys change; the key ``base`` names one: ``base = "rtx3090"``, ``gpus = 6``. vram without
    gpus is one card.
    """
    data = dict(data)
    named = data.pop("base", None)
    if named is not None:
        if not isinstance(named, str):
            raise ReapcError(f"{where}: target.base = {named!r}: the name of a target is expected")
        base = load_target(named)
    merged = {**_changed(base, data), **data} if base else dict(data)
    if "gpus" not in merged and "vram" in merged:
        merged["gpus"] = 1
    try:
        target = Target.model_validate(merged, context={"as_written": True})
    except ValidationError as error:
        raise ReapcError(explain_validation(error, Target, where, prefix="target.")) from error
    _check(target, where)
    return target


def _changed(base: Target, changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` as written keys, without what ``changes`` makes untrue of it."""
    keys = base.model_dump()
    for key in _SIZES:
        keys[key] = f"{keys[key]}B"
    if "vram" in changes:
        del keys["vram_total"]
    if "gpus" in changes:
        keys["description"] = re.sub(r"^\d+ x ", f"{changes['gpus']} x ", base.description)
    return keys


def _check(target: Target, where: str) -> None:
    if target.gpus and not target.vram:
        raise ReapcError(
            f"{where}: [target] gpus = {target.gpus} but vram is not given",
            hint='write the usable memory of one card, for example vram = "24123MiB"',
        )
    if target.vram and not target.gpus:
        raise ReapcError(
            f"{where}: [target] gpus = 0 but vram = {target.vram} bytes is given",
            hint="write how many cards there are, or remove vram to plan for RAM alone",
        )
    if not target.gpus and not target.ram:
        raise ReapcError(
            f"{where}: [target] has neither gpus and vram nor ram",
            hint='write for example gpus = 8, vram = "24123MiB", or ram = "16GB", or a name from `reapc targets`',
        )
    if target.vram_total and target.vram_total < target.vram:
        raise ReapcError(
            f"{where}: target.vram_total = {target.vram_total} bytes is less than vram = {target.vram} bytes",
            hint="vram is the usable part of vram_total",
        )
    if target.gpus % target.nodes:
        raise ReapcError(
            f"{where}: target.nodes = {target.nodes} does not divide gpus = {target.gpus}",
            hint="gpus counts the cards of all machines together, spread evenly",
        )


def bare_target(
    vram_bytes: int = 0, gpus: int = 1, ram_bytes: int = 0, compute_capability: str | None = None
) -> Target:
    """What ``--vram``, ``--gpus`` and ``--ram`` mean: exactly these bytes per card, nothing known of the cards.

    ``assumptions`` says how that is read. The capability that is read does not depend on the size, so that more memory
    never takes a configuration away (the cards sold as 48 GB have 8.9, an A100 of 80 GB has 8.0). ReapcError: no
    memory, or no card.
    """
    if vram_bytes < 0 or ram_bytes < 0:
        raise ReapcError("a size is zero or more bytes", hint="write for example --vram 24GB --ram 64GB")
    if not vram_bytes:
        if not ram_bytes:
            raise ReapcError("the budget is zero bytes", hint="write for example --vram 24GB, or --ram 64GB")
        return Target(
            name=f"{_short(ram_bytes)} of RAM",
            description=f"RAM alone, {ram_bytes} bytes",
            ram=ram_bytes,
            assumptions=f"exactly {ram_bytes} bytes of RAM, its bandwidth not stated",
            source="the command line",
        )
    if not 1 <= gpus <= 1024:
        raise ReapcError(f"--gpus {gpus}: from 1 to 1024 cards", hint="leave --vram out to plan for RAM alone")
    each = f"{gpus} x {_short(vram_bytes)}" if gpus > 1 else _short(vram_bytes)
    cards = f"each of {gpus} cards" if gpus > 1 else "one card"
    major, minor = ASSUMED_CAPABILITY
    reading = (
        f"compute capability {compute_capability}"
        if compute_capability
        else f"compute capability read as {major}.{minor}, so nothing that needs more (in vLLM an fp8 KV cache or "
        "sparse attention) is proposed"
    )
    return make_target(
        {
            "name": each,
            "description": f"{gpus} x a card of {vram_bytes} bytes",
            "gpus": gpus,
            "vram": f"{vram_bytes}B",
            "ram": f"{ram_bytes}B",
            "compute_capability": compute_capability,
            "interconnect": "pcie",
            "geforce": True,
            "assumptions": f"exactly {vram_bytes} bytes on {cards}; NVIDIA on PCIe without peer-to-peer; {reading}; "
            "the bandwidth is not known",
            "source": "the command line",
        },
        where="the command line",
    )


def _short(count: int) -> str:
    """``count`` bytes as a user would write them: ``24GB``, ``24GiB``, else ``23.6GB``."""
    for unit, factor in (("GB", 10**9), ("GiB", 2**30), ("MB", 10**6), ("MiB", 2**20)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return f"{count / 1e9:.1f}GB" if count >= 10**9 else f"{count}B"


def cards_sold_as(vram_bytes: int) -> list[tuple[str, int]]:
    """Known cards sold as that many GB, with the bytes that one really shows to a program, the most first.

    A card sold as N GB answers to any size from N * 10**9 to N * 2**30 bytes. Cards that share the RAM are left out.
    """
    found = {}
    for path in FOLDER.glob("*.toml"):
        data = read_toml(path)
        size = re.fullmatch(r"(\d+) GB", data.get("marketed", ""))
        if not size or "card" not in data or data.get("unified"):
            continue
        if int(size[1]) * 10**9 <= vram_bytes <= int(size[1]) * 2**30:
            found[data["card"]] = parse_bytes(data["vram"])
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))
