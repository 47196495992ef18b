"""What this machine has. The drivers are faked (their modules, their files, their tools' output), nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from reapc.errors import ReapcError
from reapc.machine import Host, Machine, detect

MIB, GIB = 2**20, 2**30
MEMINFO = "MemTotal:       131072000 kB\nMemFree:        1000 kB\nMemAvailable:   104857600 kB\n"  # 100 GiB available


class NVMLError(Exception):
    """As in nvidia-ml-py: an error with NVML's number."""

    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


class FakeNvml:
    """The functions of nvidia-ml-py that are asked for, over a list of cards."""

    NVMLError = NVMLError
    NVML_CLOCK_MEM = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    nvmlMemory_v2 = 0x02000028

    def __init__(self, *cards: dict[str, Any], old: bool = False, start: Exception | None = None) -> None:
        self.cards, self.old, self.start, self.open = cards, old, start, False

    def nvmlInit(self) -> None:
        if self.start:
            raise self.start
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> bytes | str:
        return b"580.95.05" if self.old else "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        assert self.open
        return self.cards[index]

    def nvmlDeviceGetName(self, card: dict[str, Any]) -> bytes | str:
        name = str(card["name"])
        return name.encode() if self.old else name

    def nvmlDeviceGetMemoryInfo(self, card: dict[str, Any], version: int | None = None) -> SimpleNamespace:
        if "memory_error" in card:
            raise card["memory_error"]
        total, reserved, used = (card[key] * MIB for key in ("total", "reserved", "used"))
        free = total - reserved - used
        if version and self.old:
            raise NVMLError(13, "Function Not Found")
        if version == self.nvmlMemory_v2:
            return SimpleNamespace(total=total, reserved=reserved, free=free, used=used)
        return SimpleNamespace(total=total, free=free, used=used + reserved)

    def nvmlDeviceGetCudaComputeCapability(self, card: dict[str, Any]) -> tuple[int, int]:
        return card["capability"]  # type: ignore[no-any-return]

    def nvmlDeviceGetMigMode(self, card: dict[str, Any]) -> list[int]:
        if not card.get("mig"):
            raise NVMLError(3, "Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxClockInfo(self, card: dict[str, Any], kind: int) -> int:
        if "clock" not in card:
            raise NVMLError(3, "Not Supported")
        assert kind == self.NVML_CLOCK_MEM
        return card["clock"]  # type: ignore[no-any-return]

    def nvmlDeviceGetMemoryBusWidth(self, card: dict[str, Any]) -> int:
        if "bits" not in card:
            raise NVMLError(3, "Not Supported")
        return card["bits"]  # type: ignore[no-any-return]

    def nvmlDeviceGetNvLinkState(self, card: dict[str, Any], link: int) -> int:
        if not card.get("nvlink"):
            raise NVMLError(3, "Not Supported")
        return 1

    def nvmlDeviceGetUUID(self, card: dict[str, Any]) -> str:
        return card.get("uuid", "GPU-none")  # type: ignore[no-any-return]


def test_the_fake_has_the_names_of_the_real_package() -> None:
    real = pytest.importorskip("pynvml")
    for name, value in vars(FakeNvml).items():
        if not name.startswith("_"):
            assert hasattr(real, name), name
        if isinstance(value, int):
            assert getattr(real, name) == value
    assert issubclass(real.NVMLError, Exception)
    assert real.NVMLError(3).value == 3


# nvidia-smi calls a 3090's total 24576 MiB, CUDA 24123; its memory runs at 9751 MHz on 384 bits, 936 GB/s by its maker
RTX3090 = {
    "name": "NVIDIA GeForce RTX 3090", "total": 24576, "reserved": 453, "used": 0, "capability": (8, 6), "clock": 9751,
    "bits": 384,
}  # fmt: skip
RTX3060 = {
    "name": "NVIDIA GeForce RTX 3060", "total": 12288, "reserved": 382, "used": 0, "capability": (8, 6), "clock": 7501,
    "bits": 192,
}  # fmt: skip
H100 = {
    "name": "NVIDIA H100 80GB HBM3", "total": 81559, "reserved": 478, "used": 0, "capability": (9, 0), "clock": 2619,
    "bits": 5120, "nvlink": True,
}  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    """A machine with the given modules, tools' output and environment, and 100 GiB of RAM available."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)

    def make(
        nvml: Any = None, amdsmi: Any = None, output: dict[str, str] | None = None, system: str = "Linux", **env: str
    ) -> Machine:
        modules = {"pynvml": nvml, "amdsmi": amdsmi}

        def load(name: str) -> Any:
            if modules.get(name) is None:
                raise ImportError(name)
            return modules[name]

        def run(command: list[str]) -> str | None:
            return next((text for key, text in (output or {}).items() if " ".join(command).startswith(key)), None)

        host = Host(system=system, sysfs=tmp_path / "sys", proc=tmp_path / "proc", env=env, run=run, load=load)
        return detect(host)

    return make


def said(found: Machine, text: str) -> bool:
    return any(text in line for line in found.findings)


def test_nothing_but_ram(machine: Callable[..., Machine]) -> None:
    found = machine()
    assert (found.target.gpus, found.target.ram, found.cards) == (0, 100 * GIB, ())
    assert said(found, "nvidia-ml-py is not installed")
    assert said(found, "AMD: no card")
    assert said(found, f"{100 * GIB} of {131072000 * 1024} bytes available")


def test_the_real_machine_that_runs_this_test() -> None:
    found = detect()
    assert found.findings
    if not found.target.gpus:
        assert found.target.ram <= psutil.virtual_memory().total
        assert found.target.ram == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_two_cards_that_are_alike(machine: Callable[..., Machine]) -> None:
    nvml = FakeNvml(RTX3090, {**RTX3090, "used": 600})
    found = machine(nvml)
    target = found.target
    assert (target.gpus, target.card, target.kind, target.compute_capability) == (2, "RTX 3090", "cuda", "8.6")
    assert target.vram == (24123 - 600) * MIB
    assert target.vram_total == 24123 * MIB
    assert target.ram == 100 * GIB
    assert target.bandwidth == pytest.approx(936e9, rel=1e-3)
    assert target.geforce
    assert target.interconnect == "pcie"
    assert said(found, f"NVIDIA card 1: NVIDIA GeForce RTX 3090, {23523 * MIB} of {24123 * MIB} bytes free")
    assert said(found, "driver 580.95.05")
    assert not nvml.open


def test_an_old_driver_without_version_2(machine: Callable[..., Machine]) -> None:
    target = machine(FakeNvml(RTX3090, old=True)).target
    assert (target.card, target.vram, target.vram_total) == ("RTX 3090", 24123 * MIB, 24576 * MIB)


def test_data_centre_cards(machine: Callable[..., Machine]) -> None:
    target = machine(FakeNvml(*[H100] * 8)).target
    assert (target.gpus, target.vram, target.compute_capability) == (8, 81081 * MIB, "9.0")
    assert (target.interconnect, target.geforce, target.computes_fp8) == ("nvlink", False, True)
    assert target.bandwidth == pytest.approx(3350e9, rel=2e-3)


def test_a_busy_card_is_left_out_where_it_costs_more_than_it_gives(machine: Callable[..., Machine]) -> None:
    found = machine(FakeNvml(RTX3090, {**RTX3090, "used": 23000}, RTX3090))
    assert (found.target.gpus, found.target.vram) == (2, 24123 * MIB)
    assert len(found.cards) == 3
    assert said(found, "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,2")


def test_cards_of_different_kinds(machine: Callable[..., Machine]) -> None:
    found = machine(FakeNvml(RTX3060, RTX3090))
    # 2 x 11906 MiB is less than 1 x 24123 MiB
    assert (found.target.gpus, found.target.card, found.target.vram) == (1, "RTX 3090", 24123 * MIB)
    assert said(found, "left out")
    found = machine(FakeNvml(RTX3060, RTX3090, RTX3060))
    # 3 x 11906 MiB is more
    assert (found.target.gpus, found.target.card, found.target.vram) == (3, "mixed card", 11906 * MIB)
    assert found.target.vram_total == 24123 * MIB
    assert found.target.bandwidth == pytest.approx(360e9, rel=1e-3)
    assert said(found, "not the same: all are planned as the one with the least free memory")
    h100_and_3090 = machine(FakeNvml({**H100, "used": 60000}, RTX3090)).target
    assert (h100_and_3090.gpus, h100_and_3090.compute_capability) == (2, "8.6")


@pytest.mark.parametrize(
    ("value", "indices"),
    [("0,1", [0, 1]), ("1", [1]), ("GPU-b", [1]), ("", []), ("-1", []), ("0,9,1", [0]), ("NoDevFiles", [])],
)
def test_visible_devices(machine: Callable[..., Machine], value: str, indices: list[int]) -> None:
    cards = FakeNvml({**RTX3090, "uuid": "GPU-a1"}, {**RTX3090, "uuid": "GPU-b2"})
    found = machine(cards, CUDA_VISIBLE_DEVICES=value)
    assert [card.index for card in found.cards] == indices
    assert said(found, f"CUDA_VISIBLE_DEVICES={value!r}: {len(indices)} of 2")
    assert found.target.gpus == len(indices)


def test_cards_that_cannot_be_planned_for(machine: Callable[..., Machine]) -> None:
    assert said(machine(FakeNvml(start=NVMLError(12, "NVML Shared Library Not Found"))), "Library Not Found")
    assert said(machine(FakeNvml()), "the driver 580.95.05 is there, and no card")
    found = machine(FakeNvml({**H100, "mig": True}, {**H100, "memory_error": NVMLError(15, "GPU is lost")}))
    assert found.target.gpus == 0
    assert said(found, "MIG slices")
    assert said(found, "does not tell its memory (GPU is lost)")


def test_a_dgx_spark_shares_the_ram(machine: Callable[..., Machine]) -> None:
    gb10 = {"name": "NVIDIA GB10", "memory_error": NVMLError(3, "Not Supported"), "capability": (12, 1)}
    found = machine(FakeNvml(gb10))
    target = found.target
    assert (target.gpus, target.card, target.unified, target.compute_capability) == (1, "GB10", True, "12.1")
    assert (target.vram, target.ram) == (92 * GIB, 8 * GIB)
    assert target.vram_total == 131072000 * 1024
    assert target.bandwidth == 273e9  # not from the driver, from the known card


class FakeAmdSmi:
    """amdsmi with cards of (name, architecture, VRAM total, used, GTT total, used)."""

    AmdSmiMemoryType = SimpleNamespace(VRAM=0, GTT=2)

    def __init__(self, *cards: tuple[str, str, int, int, int, int]) -> None:
        self.cards = cards

    def amdsmi_init(self) -> None:
        if not self.cards:
            raise RuntimeError("no driver")

    def amdsmi_shut_down(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[Any]:
        return list(self.cards)

    def amdsmi_get_gpu_asic_info(self, card: Any) -> dict[str, str]:
        return {"market_name": card[0], "target_graphics_version": card[1]}

    def amdsmi_get_gpu_memory_total(self, card: Any, kind: int) -> int:
        return card[2 + kind]  # type: ignore[no-any-return]

    def amdsmi_get_gpu_memory_usage(self, card: Any, kind: int) -> int:
        return card[3 + kind]  # type: ignore[no-any-return]


def test_amd_cards_by_amdsmi(machine: Callable[..., Machine]) -> None:
    card = ("AMD Instinct MI300X", "gfx942", 192 * GIB, GIB, 500 * GIB, 0)
    found = machine(amdsmi=FakeAmdSmi(card, card))
    target = found.target
    assert (target.gpus, target.kind, target.arch, target.vram) == (2, "rocm", "gfx942", 191 * GIB)
    assert (target.card, target.bandwidth, target.unified, target.ram) == ("Instinct MI300X", 5300e9, False, 100 * GIB)
    assert (target.compute_capability, target.capability) == (None, None)
    assert said(found, "(amdsmi)")
    assert machine(amdsmi=FakeAmdSmi(card, card), HIP_VISIBLE_DEVICES="1").target.gpus == 1


def test_amd_cards_by_rocm_smi(machine: Callable[..., Machine]) -> None:
    text = json.dumps(
        {
            "card0": {
                "VRAM Total Memory (B)": str(192 * GIB),
                "VRAM Total Used Memory (B)": "297676800",
                "GTT Total Memory (B)": str(1000 * GIB),
                "GTT Total Used Memory (B)": "0",
                "Card Series": "AMD Instinct MI300X OAM",
                "GFX Version": "gfx942",
            },
            "system": {"Driver version": "6.10.5"},
        }
    )
    found = machine(amdsmi=FakeAmdSmi(), output={"rocm-smi": text})
    assert (found.target.gpus, found.target.vram, found.target.arch) == (1, 192 * GIB - 297676800, "gfx942")
    assert said(found, "(rocm-smi)")
    assert machine(output={"rocm-smi": "WARNING: no AMD GPU"}).target.gpus == 0


def amd_sysfs(root: Path, number: int, gfx: int, **files: int) -> None:
    device = root / f"sys/class/drm/card{number}/device"
    (device / f"drm/renderD{128 + number}").mkdir(parents=True)
    for name, value in files.items():
        (device / f"mem_info_{name}").write_text(f"{value}\n")
    node = root / f"sys/class/kfd/kfd/topology/nodes/{number + 1}"
    node.mkdir(parents=True)
    (node / "properties").write_text(f"simd_count 80\ngfx_target_version {gfx}\ndrm_render_minor {128 + number}\n")


def test_amd_cards_by_sysfs(machine: Callable[..., Machine], tmp_path: Path) -> None:
    amd_sysfs(tmp_path, 0, 90402, vram_total=192 * GIB, vram_used=GIB, gtt_total=500 * GIB, gtt_used=0)
    (tmp_path / "sys/class/drm/card0-DP-1/device").mkdir(parents=True)  # a connector, not a card
    (tmp_path / "sys/class/drm/card9/device").mkdir(parents=True)  # another maker's
    (tmp_path / "sys/class/drm/card0/device/product_name").write_text("AMD Instinct MI300X\n")
    found = machine()
    assert (found.target.gpus, found.target.vram, found.target.arch) == (1, 191 * GIB, "gfx942")
    assert found.target.bandwidth == 5300e9


def test_strix_halo_maps_the_ram(machine: Callable[..., Machine], tmp_path: Path) -> None:
    amd_sysfs(tmp_path, 1, 110501, vram_total=GIB // 2, vram_used=0, gtt_total=110 * GIB, gtt_used=GIB)
    target = machine().target
    assert (target.gpus, target.arch, target.unified) == (1, "gfx1151", True)
    assert (target.vram, target.ram) == (92 * GIB, 8 * GIB)  # of the 100 GiB that are available


def test_a_display_is_no_card(machine: Callable[..., Machine], tmp_path: Path) -> None:
    amd_sysfs(tmp_path, 0, 100306, vram_total=GIB // 2, vram_used=0, gtt_total=60 * GIB, gtt_used=0)
    found = machine()
    assert found.target.gpus == 0
    assert said(found, "not planned for")


def mac(memory_gib: int, chip: str = "Apple M4 Max", limit: str | None = "0", free_gib: int = 100) -> dict[str, str]:
    pages = free_gib * GIB // 16384
    vm_stat = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        f"Pages free:                          {pages - 3000}.\nPages active:                        999999.\n"
        "Pages inactive:                        1000.\nPages speculative:                     1000.\n"
        "Pages purgeable:                       1000.\n"
    )
    output = {
        "sysctl -n hw.memsize": f"{memory_gib * GIB}\n",
        "sysctl -n machdep.cpu.brand_string": f"{chip}\n",
        "vm_stat": vm_stat,
    }
    return {**output, "sysctl -n iogpu.wired_limit_mb": f"{limit}\n"} if limit is not None else output


def test_a_mac(machine: Callable[..., Machine]) -> None:
    found = machine(system="Darwin", output=mac(128, free_gib=120))
    target = found.target
    assert (target.gpus, target.kind, target.unified, target.bandwidth) == (1, "metal", True, 546e9)
    assert target.vram == 115_448_730_000  # macOS's default on this machine, below what is free
    assert target.ram == 120 * GIB - target.vram
    assert machine(system="Darwin", output=mac(128, free_gib=60)).target.vram == 52 * GIB
    raised = machine(system="Darwin", output=mac(128, limit="122880", free_gib=125))
    assert raised.target.vram == 117 * GIB
    assert said(raised, f"may hold {120 * GIB} of {128 * GIB} bytes (sysctl iogpu.wired_limit_mb)")
    # llama.cpp's logs show 11453.25 MB on a 16 GiB machine: two thirds
    small = machine(system="Darwin", output=mac(16, "Apple M1", limit=None, free_gib=15))
    assert small.cards[0].total_bytes == pytest.approx(11453.25e6, rel=1e-4)
    assert machine(system="Darwin", output=mac(64, "Apple M2 Max", free_gib=60)).cards[0].total_bytes == 48 * GIB
    intel = machine(system="Darwin", output=mac(32, "Intel(R) Core(TM) i9", limit=None, free_gib=20))
    assert (intel.target.gpus, intel.target.ram) == (0, 20 * GIB)


def test_a_container_has_less(machine: Callable[..., Machine], tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("123\n")
    assert machine().target.ram == 100 * GIB
    (group / "memory.max").write_text(f"{16 * GIB}\n")
    (group / "memory.current").write_text(f"{6 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {4 * GIB}\n")
    found = machine()
    assert found.target.ram == 14 * GIB
    assert said(found, "the container's limit")


def test_a_machine_of_which_nothing_is_known(machine: Callable[..., Machine], tmp_path: Path) -> None:
    (tmp_path / "proc/meminfo").unlink()
    with pytest.raises(ReapcError, match="nvidia-ml-py is not installed") as caught:
        machine()
    assert caught.value.exit_code == 2
    assert "--vram 24GB" in caught.value.hint
    assert machine(FakeNvml(RTX3090)).target.gpus == 1
