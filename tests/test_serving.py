"""`reapc serve` and `reapc targets calibrate`: real llama-servers, and small scripts where a server must misbehave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from serving_fixtures import free_port, run, stand_in

from reapc.errors import CannotBeDone
from reapc.plan import DeviceBytes
from reapc.probes import Host
from reapc.serving import calibrate, records
from reapc.serving.engine_log import GIB, read_llama_log, read_vllm_log
from reapc.serving.memory import Cards, process_tree, ram_use
from reapc.serving.metrics import read_metrics
from reapc.serving.process import Server, last_lines
from reapc.serving.records import MeasuredDevice, Record
from reapc.serving.watch import environment_for
from reapc.target import load_target

pytest_plugins = ["serving_fixtures"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state folder is the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "reapc"


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """The command line as a user starts it."""
    command = [sys.executable, "-m", "reapc", "serve", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, **variables}
    )


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Its output up to a line with ``word``."""
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if word in line:
            return "".join(seen)
    raise AssertionError(f"ended without {word!r}: {''.join(seen)}")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_from_start_to_stop(built, state, tmp_path, number: signal.Signals) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    port, log = free_port(), tmp_path / "engine.log"
    process = start(built, "--port", port, "--log", log, "--interval", 0.2, "--", "--no-slots")
    try:
        text = read_until(process, "running")
        assert "ready after" in text
        assert f"http://127.0.0.1:{port}/v1, model 'model'" in text
        assert "RAM: " in text
        assert "taken (/proc, pss)" in text
        tree = process_tree(process.pid)
        assert len(tree) >= 2
        assert listens(port)
    finally:
        process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "stopped" in rest
    assert not listens(port)
    assert not any(lives(pid) for pid in tree)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert "KV buffer size" in log.read_text()
    (record,) = records.read_records()
    (device,) = record.devices
    assert record.engine == "llama.cpp"
    assert record.engine_version
    assert record.target["ram"] == 90_000_000
    assert device.predicted.name == "RAM"
    # what llama.cpp printed against the plan: exact but for the two decimals that it prints
    for part in ("weights_bytes", "kv_bytes"):
        assert device.parts[part] == pytest.approx(getattr(device.predicted, part), abs=2**14)
    known = sum(device.parts.values())
    assert known < device.total_bytes < known + device.predicted.overhead_bytes + 2**20
    assert 0 < device.overhead_bytes < device.total_bytes


def test_serve_shows_tokens_per_second(built, tmp_path) -> None:
    import urllib.request

    port = free_port()
    process = start(built, "--port", port, "--interval", 0.3, "--log", tmp_path / "log")
    try:
        read_until(process, "0.0 tokens/s made")
        body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 150, "ignore_eos": True}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).read()
        assert process.stdout
        line = next(line for line in process.stdout if "made" in line and not line.startswith("0.0 "))
        assert float(line.split()[0]) > 10
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_server_that_cannot_load_its_model(copy, tmp_path, capsys, state) -> None:
    (copy / "model.gguf").write_bytes(b"GGUF, but no more than that")
    code, _, err = run(capsys, "serve", copy, "--port", free_port())
    assert code == 1
    assert "the server ended with exit code" in err
    assert "model.gguf" in err  # in its own last words
    assert f"all of its log: {state / 'logs'}" in err
    assert not (state / "measured.jsonl").exists()


def test_a_server_that_is_killed_while_it_runs(built, tmp_path) -> None:
    process = start(built, "--port", free_port(), "--interval", 0.2, "--log", tmp_path / "log")
    try:
        read_until(process, "running")
        (server,) = process_tree(process.pid) - {process.pid}
        os.kill(server, signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "ended by signal 9 (SIGKILL); its last words:" in rest
    assert "Traceback" not in rest


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv")
def test_the_server_ends_when_reapc_is_killed(built, tmp_path) -> None:
    process = start(built, "--port", free_port(), "--interval", 0.2, "--log", tmp_path / "log")
    read_until(process, "running")
    (server,) = process_tree(process.pid) - {process.pid}
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while lives(server) and time.monotonic() < end:
        time.sleep(0.05)
    assert not lives(server)


def test_a_port_that_is_taken(built, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, "serve", built, "--port", taken.getsockname()[1])
    assert code == 1
    assert "is taken" in err
    assert "--port" in err


def test_an_address_that_is_reachable_from_outside_needs_a_key(built, capsys, monkeypatch) -> None:
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    code, _, err = run(capsys, "serve", built, "--host", "0.0.0.0", "--port", free_port())
    assert code == 1
    assert "set LLAMA_API_KEY" in err


def test_a_folder_without_a_script(copy, capsys) -> None:
    (copy / "serve.sh").unlink()
    code, _, err = run(capsys, "serve", copy)
    assert code == 2
    assert "serve.sh: no such file" in err


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.sh"
    path.write_text(text)
    return ["bash", str(path)]


STUBBORN = """
trap '' TERM
setsid sleep 300 &
echo "child $!"
sleep 300 &
echo started
while true; do sleep 0.1; done
"""


def test_what_does_not_stop_is_killed_with_all_that_it_started(tmp_path) -> None:
    server = Server(script(tmp_path, STUBBORN), dict(os.environ), tmp_path / "log")
    while "started" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    tree = server.pids
    assert len(tree) >= 3  # a child in a session of its own is among them
    assert server.stop(grace_seconds=0.5) is False
    assert not any(lives(pid) for pid in tree)


def test_a_server_that_is_never_ready(tmp_path) -> None:
    told: list[str] = []
    url = f"http://127.0.0.1:{free_port()}"
    with Server(script(tmp_path, "echo reading tensors; sleep 300"), dict(os.environ), tmp_path / "log") as server:
        with pytest.raises(CannotBeDone, match=r"(?s)not ready after 1 s.*reading tensors") as found:
            server.wait_ready(url, 1, lambda seconds, line: told.append(line), 0.05)
        tree = server.pids
        assert tree
    assert "--timeout" in found.value.hint
    assert told[-1] == "reading tensors"
    assert not any(lives(pid) for pid in tree)


def test_readiness_of_a_server_without_health(tmp_path) -> None:
    """llama_cpp.server has no /health; vLLM behind a key answers 401 to /v1/models."""
    for status in (200, 401):

        def answer(method: str, path: str, body: Any, status: int = status) -> tuple[int, Any]:
            return (404, {}) if path == "/health" else (status, {})

        with (
            stand_in(answer) as url,
            Server(script(tmp_path, "sleep 300"), dict(os.environ), tmp_path / "log") as server,
        ):
            assert server.wait_ready(url, 5, lambda seconds, line: None, 0.05) < 5


def test_the_users_own_settings_win(built) -> None:
    from reapc.serving.built import read_built

    found = environment_for(read_built(built), "::1", 81, {"LLAMA_ARG_LOG_VERBOSITY": "2", "PORT": "9", "X": "y"})
    assert found == {
        "LLAMA_ARG_ENDPOINT_METRICS": "1", "LLAMA_ARG_LOG_VERBOSITY": "2", "HOST": "::1", "PORT": "81", "X": "y",
    }  # fmt: skip


def test_last_lines_of_a_long_log(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {i}" for i in range(50_000)) + "\n\n\n")
    assert last_lines(log, 2) == ["line 49998", "line 49999"]
    assert last_lines(tmp_path / "none") == []


# -- what engines say of themselves


def test_llamacpps_log_with_cards() -> None:
    found = read_llama_log(
        [
            "load_tensors:   CPU_Mapped model buffer size =   100.50 MiB",
            "load_tensors:        CUDA0 model buffer size =  1000.00 MiB",
            "load_tensors:        CUDA1 model buffer size =  2000.00 MiB",
            "llama_kv_cache:      CUDA1 KV buffer size =    64.00 MiB",
            "llama_memory_recurrent:      CUDA0 RS buffer size =     8.00 MiB",
            "llama_context:  CUDA_Host  output buffer size =     1.00 MiB",
            "sched_reserve:      CUDA0 compute buffer size =   300.00 MiB",
            "sched_reserve:  CUDA_Host compute buffer size =    20.00 MiB",
            "print_info: file size   = 8.46 MiB (4.36 BPW)",
        ]
    )
    mib = 2**20
    assert found.devices == {
        "RAM": {"weights_bytes": round(100.5 * mib), "workspace_bytes": 21 * mib},
        "0": {"weights_bytes": 1000 * mib, "state_bytes": 8 * mib, "workspace_bytes": 300 * mib},
        "1": {"weights_bytes": 2000 * mib, "kv_bytes": 64 * mib},
    }


def test_vllms_log_with_workers() -> None:
    found = read_vllm_log(
        [
            "(Worker_TP0 pid=7) INFO 11-24 10:00:00 Model loading took 10.5 GiB memory and 3 seconds",
            "(Worker_TP1 pid=8) INFO 11-24 10:00:00 Model loading took 10.25 GiB memory and 3 seconds",
            "(Worker_TP0 pid=7) INFO 11-24 10:00:01 [gpu_worker.py:1] Available KV cache memory: 7.5 GiB",
            "(Worker_TP0 pid=7) INFO 11-24 10:00:02 Graph capturing finished in 12 secs, took 0.50 GiB",
            "(EngineCore_DP0 pid=6) INFO 11-24 10:00:02 [kv_cache_utils.py:1] GPU KV cache size: 123,456 tokens",
        ]
    )
    assert found.devices["0"] == {
        "weights_bytes": round(10.5 * GIB), "available_kv_bytes": round(7.5 * GIB), "graph_bytes": GIB // 2,
    }  # fmt: skip
    assert found.devices["1"] == {"weights_bytes": round(10.25 * GIB)}
    assert found.kv_tokens == 123456


def test_counters_of_both_engines() -> None:
    vllm = read_metrics(
        "# HELP vllm:num_requests_running Number of requests.\n# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="a b"} 2.0\n'
        'vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+02\n'
        'vllm:generation_tokens_total{engine="1",model_name="m"} 50.0\n'
        'vllm:prompt_tokens_total{engine="0",model_name="m"} 7.0\n'
    )
    assert (vllm.made, vllm.read, vllm.running, vllm.waiting) == (200, 7, 2, 0)
    llama = read_metrics("llamacpp:tokens_predicted_total 12\nllamacpp:requests_processing 1\n")
    assert (llama.made, llama.running) == (12, 1)
    assert read_metrics("<html>").made == 0


# -- memory


def test_the_ram_of_a_process_tree() -> None:
    code = "import subprocess, sys\nx = bytearray(60 << 20)\nprint('x', flush=True)\nsys.stdin.read()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout
        process.stdout.read(1)
        tree = process_tree(process.pid)
        assert len(tree) == 2
        use = ram_use(tree)
        assert use is not None
        assert 60 << 20 <= use.anonymous_bytes <= use.total_bytes < 150 << 20
        assert use.total_bytes == pytest.approx(use.anonymous_bytes + use.file_bytes, abs=1 << 16)
    finally:
        process.communicate(b"")
    assert ram_use(tree) is None


def test_rss_where_the_kernel_shows_no_pss(tmp_path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("VmRSS:\t  300 kB\nRssAnon:\t 200 kB\nRssFile:\t 90 kB\nRssShmem:\t 10 kB\n")
    use = ram_use([7], tmp_path)
    assert use is not None
    assert (use.total_bytes, use.anonymous_bytes, use.file_bytes) == (300 << 10, 210 << 10, 90 << 10)
    assert use.source == "/proc, rss"


class Nvml:
    """The calls of nvidia-ml-py that are made, for two cards; there are none here."""

    class NVMLError(Exception):
        value = 0

    NVML_ERROR_NOT_SUPPORTED, NVML_CLOCK_MEM, nvmlMemory_v2 = 3, 2, 2

    def __init__(self) -> None:
        self.used = {0: 1 * GIB, 1: 2 * GIB}
        self.processes: dict[int, list[SimpleNamespace]] = {0: [], 1: []}

    def __getattr__(self, name: str) -> Any:
        if name in ("nvmlInit", "nvmlShutdown"):
            return lambda: None
        if name.startswith("nvml"):
            raise AttributeError(name)  # as an old driver: this card does not tell
        raise AttributeError(name)

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlSystemGetDriverVersion(self) -> str:
        return "595"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA GeForce RTX 3090"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> SimpleNamespace:
        total = 24 * GIB
        return SimpleNamespace(total=total, free=total - self.used[handle], used=self.used[handle], reserved=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return self.processes[handle]


def test_the_memory_of_the_engine_on_every_card(monkeypatch) -> None:
    nvml = Nvml()
    host = Host(system="Linux", env={}, load=lambda name: nvml)
    cards = Cards(host)
    nvml.used = {0: 11 * GIB, 1: 7 * GIB}
    nvml.processes[0] = [
        SimpleNamespace(pid=5, usedGpuMemory=9 * GIB), SimpleNamespace(pid=99, usedGpuMemory=GIB),
    ]  # fmt: skip
    nvml.processes[1] = [SimpleNamespace(pid=5, usedGpuMemory=None)]  # as in a container
    first, second = cards.use({5})
    assert (first.used_bytes, first.source) == (9 * GIB, "NVML, the engine's processes")
    assert second.used_bytes == 5 * GIB
    assert "less that before the start" in second.source


# -- records and corrections

CARD = DeviceBytes(
    name="RTX 3090 0", capacity_bytes=24 * GIB, weights_bytes=16 * GIB, kv_bytes=4 * GIB, workspace_bytes=GIB,
    overhead_bytes=GIB,
)  # fmt: skip


def record(
    run: str, *devices: MeasuredDevice, target: dict[str, Any] | None = None, engine: str = "llama.cpp"
) -> Record:
    return Record(
        run=run, date="2026-11-24", reapc="0", engine=engine, model="m", format="Q4_K_M", context=1, concurrency=1,
        target=target or {"name": 'my "box"', "gpus": 1, "card": "RTX 3090", "kind": "cuda", "vram": 24 * GIB,
                          "vram_total": 24 * GIB, "ram": 0, "geforce": True, "bandwidth": 936e9, "source": "mine"},
        devices=devices,
    )  # fmt: skip


def write(*found: Record) -> None:
    for item in found:
        records.append(item)


def test_a_later_record_of_a_run_replaces_the_earlier() -> None:
    assert records.read_records() == []
    write(record("a", MeasuredDevice(predicted=CARD, total_bytes=1)), record("b"))
    write(record("a", MeasuredDevice(predicted=CARD, total_bytes=2)))
    assert [(r.run, len(r.devices)) for r in records.read_records()] == [("a", 1), ("b", 0)]
    assert records.read_records()[0].devices[0].total_bytes == 2


def test_a_damaged_records_file(state, capsys) -> None:
    write(record("a"))
    with (state / "measured.jsonl").open("a") as file:
        file.write('{"run": "b"\n')
    code, _, err = run(capsys, "targets", "calibrate")
    assert code == 2
    assert "measured.jsonl:2: not a record" in err


def test_calibrate_without_records(capsys) -> None:
    code, _, err = run(capsys, "targets", "calibrate")
    assert code == 1
    assert "no record" in err
    assert "reapc serve OUT" in err


def test_an_engine_that_took_more_corrects_the_target(tmp_path, capsys) -> None:
    parts = {"weights_bytes": 16 * GIB, "kv_bytes": 4 * GIB, "workspace_bytes": GIB}
    write(
        record("a", MeasuredDevice(predicted=CARD, total_bytes=22 * GIB + 2**28, source="NVML", parts=parts)),
        record("b", MeasuredDevice(predicted=CARD, total_bytes=22 * GIB + 2**29, source="NVML", parts=parts)),
    )
    before = (ROOT / "reapc" / "targets" / "rtx3090.toml").read_bytes()
    file = tmp_path / "box.toml"
    code, out, err = run(capsys, "targets", "calibrate", "--apply", file)
    assert code == 0
    assert "2 measured runs" in out
    assert "vram: an engine took 512.0 MiB more than planned (2 runs): 24.0 GiB -> 23.5 GiB" in out
    assert "overhead 1.0 GiB predicted, at most 1.5 GiB measured" in out
    assert str(file) in err
    target = load_target(str(file))
    assert target.vram == 24 * GIB - 2**29
    assert target.vram_total == 24 * GIB
    assert target.name == 'my "box"-calibrated'
    assert (target.gpus, target.card, target.geforce, target.bandwidth) == (1, "RTX 3090", True, 936e9)
    assert "from 2 measured runs" in target.source
    assert (ROOT / "reapc" / "targets" / "rtx3090.toml").read_bytes() == before
    code, _, err = run(capsys, "targets", "calibrate", "--apply", file)
    assert code == 2
    assert "left untouched" in err


def test_an_engine_that_took_less_corrects_nothing(tmp_path, capsys) -> None:
    write(record("a", MeasuredDevice(predicted=CARD, total_bytes=21 * GIB, source="NVML")))
    code, out, err = run(capsys, "targets", "calibrate", "--apply", tmp_path / "x.toml")
    assert code == 1
    assert "the nearest left 1.0 GiB of what was counted (1 run): 24.0 GiB stays" in out
    assert "nothing to correct" in err
    assert not (tmp_path / "x.toml").exists()


def test_vllm_is_judged_by_what_it_left_for_the_cache() -> None:
    # the plan left 6 GiB for the cache (4 planned, 2 free); vLLM holds its whole share of the card whatever happens
    parts = {"weights_bytes": 16 * GIB, "available_kv_bytes": 5 * GIB}
    device = MeasuredDevice(predicted=CARD, total_bytes=23 * GIB, parts=parts)
    assert calibrate.excess_bytes(device) == GIB
    (found,) = calibrate.corrections([record("a", device, engine="vllm")])
    assert (found.key, found.corrected_bytes) == ("vram", 23 * GIB)


def test_devices_that_nothing_was_planned_on_or_measured_say_nothing() -> None:
    idle = MeasuredDevice(predicted=DeviceBytes(name="RTX 3090 1", capacity_bytes=24 * GIB), total_bytes=2 * GIB)
    unmeasured = MeasuredDevice(predicted=CARD)
    host = DeviceBytes(name="host", capacity_bytes=GIB, weights_bytes=GIB, given=False)
    assert (
        calibrate.corrections([record("a", idle, unmeasured, MeasuredDevice(predicted=host, total_bytes=3 * GIB))])
        == []
    )


def test_records_of_several_targets(tmp_path, capsys) -> None:
    ram = DeviceBytes(name="RAM", capacity_bytes=GIB, weights_bytes=GIB // 2)
    over = MeasuredDevice(predicted=ram, total_bytes=GIB // 2 + 2**20)
    write(
        record("a", over, target={"name": "laptop", "ram": GIB}),
        record("b", over, target={"name": "laptop", "ram": 2 * GIB}),
        record("c", over, target={"name": "other", "ram": GIB}),
    )
    code, _, err = run(capsys, "targets", "calibrate", "--apply", tmp_path / "x.toml")
    assert code == 2
    assert "laptop, laptop (2), other" in err
    code, _, _ = run(capsys, "targets", "calibrate", "--target", "laptop (2)", "--apply", tmp_path / "x.toml")
    assert code == 0
    assert load_target(str(tmp_path / "x.toml")).ram == 2 * GIB - 2**20
    code, out, _ = run(capsys, "targets", "calibrate", "--target", "other", "--json")
    assert json.loads(out)["other"]["corrections"][0]["corrected_bytes"] == GIB - 2**20
    assert run(capsys, "targets", "calibrate", "--target", "nothing")[0] == 1


def test_the_file_of_a_correction_ends_in_toml(tmp_path, capsys) -> None:
    write(record("a", MeasuredDevice(predicted=CARD, total_bytes=24 * GIB)))
    code, _, err = run(capsys, "targets", "calibrate", "--apply", tmp_path / "x")
    assert code == 2
    assert "ends in .toml" in err


def test_targets_still_lists_and_describes(capsys) -> None:
    code, out, _ = run(capsys, "targets", "rtx3090x8")
    assert code == 0
    assert "RTX 3090" in out
    assert run(capsys, "targets", "calibrat")[0] == 2
    code, _, err = run(capsys, "targets", "calibrate", "--records", "nowhere")
    assert code == 2
    assert "nowhere: no such file" in err
