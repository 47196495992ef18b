"""Shards on a Ray cluster of two workers, and the scripts of docs/distributed.md."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_tokens, run_main
from ray_workers import SBATCH, Killer, Recorder
from safetensors.torch import load_file, save_file
from test_scores import close

from reapc import __version__
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe import distributed, distributed_worker
from reapc.observe.distributed import Shares, observe_on_ray, shares_of
from reapc.observe.observe import observe
from reapc.observe.scores import Scores, load_scores
from reapc.progress import Silent
from reapc.stream import run as run_module
from reapc.stream.tokens import Tokens, write_tokens

LENGTH, BATCHES, LAYERS, COMMIT = 32, 3, 4, "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Rows of many lengths, of two domains, in several batches of the size that workers use too."""
    random = np.random.default_rng(0)
    rows = BATCHES * run_module.TOKENS_PER_BATCH // LENGTH
    ids = random.integers(0, 256, (rows, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < random.integers(LENGTH // 2, LENGTH + 1, rows)[:, None]
    domain = np.arange(rows, dtype=np.int32) % 2
    return Tokens(np.where(mask, ids, 0).astype(np.int32), mask, domain, ("code", "chat"), "tokens")


@pytest.fixture(scope="module")
def file(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    write_tokens(path, tokens)
    return path


@pytest.fixture(scope="module")
def whole(model: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """The run that is not cut, on as many threads as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    name = str(model)
    result = observe(Checkpoint(model), tokens, folder / "w", Silent(), out=folder / "scores", model_name=name)
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module")
def hub(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, in which org/tiny was fetched."""
    home = tmp_path_factory.mktemp("hub")
    folder = home / "hub" / "models--org--tiny"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return home


@pytest.fixture(scope="module")
def cluster(hub: Path) -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each; this process is connected to it."""
    # Ray's sockets lie here, and their paths have at most 107 bytes: pytest's own folders are too deep for them
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        yield from _cluster(hub, short)


def _cluster(hub: Path, temporary: str) -> Iterator[str]:
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "TMPDIR": temporary,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}
        nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            nodes.add_node(**node)
            ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
            nodes.wait_for_nodes()
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()


def test_two_workers_give_the_scores_of_one_run(
    cluster: str, model: Path, file: Path, whole: Scores, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "scores"
    code, text, err = run_main(capsys, "observe", model, "--tokens", file, "--ray", cluster, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(text)["tokens"] == whole.header["tokens"]
    assert "observe in 2 shards" in err
    assert "2 of 2 shards done" in err
    found = load_scores(out)
    close(found, whole, rtol=1e-12)
    assert found.header == whole.header
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_worker_that_is_killed_is_replaced(
    cluster: str, hub: Path, tokens: Tokens, whole: Scores, tmp_path: Path
) -> None:
    """Its shard goes on at the layer that was done; the model is one that every worker fetches from the hub."""
    checkpoint = Checkpoint(hub / "hub" / "models--org--tiny" / "snapshots" / COMMIT)
    progress, killer = Recorder(), Killer(tmp_path / "w", "shard-2-of-2")
    killer.start()
    found = observe_on_ray(
        cluster, checkpoint, tokens, tmp_path / "w", progress, out=tmp_path / "s", model_name="org/tiny"
    )
    killer.join()
    assert 1 <= len(killer.layers) < LAYERS
    (again,) = progress.said("begun again")
    assert again.startswith("shard 2/2: its worker died; begun again on ")
    assert progress.said(f"shard 2/2: observe: {len(killer.layers)} of {LAYERS} layers were done before; going on")
    close(found, whole, rtol=1e-12)
    assert found.header == {**whole.header, "model": "org/tiny"}
    assert progress.totals == [progress.done]
    assert not (tmp_path / "w").exists()


def test_shards_that_are_done_are_kept(
    cluster: str, model: Path, tokens: Tokens, whole: Scores, tmp_path: Path
) -> None:
    """The driver is interrupted after the first of three; the cluster's own two are no reason to begin anew."""
    work, name = tmp_path / "w", str(model)

    def interrupt(line: str) -> None:
        if "1 of 3 shards done" in line:
            raise KeyboardInterrupt

    first = Recorder(interrupt)
    arguments = {"out": tmp_path / "s", "model_name": name}
    with pytest.raises(KeyboardInterrupt):
        observe_on_ray(cluster, Checkpoint(model), tokens, work, first, shards=3, **arguments)
    (kept,) = work.glob("shard-*")
    before = kept.stat()
    unchanged = []
    second = Recorder(lambda line: unchanged.append(kept.stat() == before) if "shards done" in line else None)
    found = observe_on_ray(cluster, Checkpoint(model), tokens, work, second, **arguments)
    assert second.said("1 of 3 shards were done before; going on")
    assert unchanged == [True, True]
    assert second.totals[0] < first.totals[0]
    close(found, whole, rtol=1e-12)
    assert found.header == whole.header


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_what_is_done(model: Path, file: Path, whole: Scores, tmp_path: Path) -> None:
    """Its own Ray ends with it; the same command goes on in another."""
    pytest.importorskip("ray")
    command = [
        sys.executable,
        "-m",
        "reapc",
        "observe",
        str(model),
        "--tokens",
        str(file),
        "--ray",
        "local",
        "--out",
        "s",
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        driver = subprocess.Popen([*command, "--shards", "3"], cwd=tmp_path, stdout=out, stderr=out)
    deadline = time.monotonic() + 200
    while "1 of 3 shards done" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 shards were done before; going on" in done.stderr
    # it has as many threads as the machine has cores
    close(load_scores(tmp_path / "s"), whole, rtol=1e-5)


def test_a_shard_is_given_up_when_its_workers_die(
    cluster: str, model: Path, tokens: Tokens, tmp_path: Path, monkeypatch
) -> None:
    for module in (distributed, distributed_worker):
        monkeypatch.setattr(module, "RETRIES", 0)
    killer = Killer(tmp_path / "w", "shard-1-of-2")
    killer.start()
    with pytest.raises(CannotBeDone, match=r"shard 1/2: its worker died 1 times.*\n.*the same command goes on"):
        observe_on_ray(
            cluster, Checkpoint(model), tokens, tmp_path / "w", Silent(), out=tmp_path / "s", model_name=str(model)
        )
    assert killer.layers
    assert not (tmp_path / "s").exists()


def test_an_error_of_the_user_is_told_and_not_tried_again(
    cluster: str, model: Path, file: Path, tmp_path: Path, capsys
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors, name = load_file(broken / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    common = ("--tokens", file, "--ray", cluster, "--out", tmp_path / "s")
    code, _, err = run_main(capsys, "observe", broken, *common)
    with pytest.raises(ReapcError) as told:
        Checkpoint(broken).checked_tensor(name)
    assert code == 2
    assert err.endswith(f"\nerror: {told.value}\n")
    # a bound is of the worker's memory: it was told to it, and is too small
    code, _, err = run_main(capsys, "observe", model, *common, "--memory", "1MB")
    assert (code, "a bound of 976.6 KiB of memory is less than" in err) == (1, True), err
    assert "begun again" not in err
    assert not (tmp_path / "s").exists()


def test_a_node_with_another_model_or_none_or_another_reapc(
    cluster: str, model: Path, tokens: Tokens, tmp_path: Path, monkeypatch
) -> None:
    """What the driver has read is not what the workers find: here because it changes in between."""
    folder, host = shutil.copytree(model, tmp_path / "m"), socket.gethostname()
    checkpoint = Checkpoint(folder)
    digest = checkpoint.digest

    def refused() -> str:
        with pytest.raises(ReapcError) as error:
            observe_on_ray(
                cluster, checkpoint, tokens, tmp_path / "w", Silent(), out=tmp_path / "s", model_name=str(folder)
            )
        return str(error.value)

    make_model(folder, seed=1, num_hidden_layers=LAYERS)
    found = Checkpoint(folder).digest[:12]
    assert f"{folder} on {host} is another checkpoint than on the driver: digest {found}, {digest[:12]}" in refused()

    def vanish(*arguments: object) -> None:
        folder.rename(tmp_path / "elsewhere")
        distributed_claim(*arguments)

    distributed_claim = distributed.claim_folder
    monkeypatch.setattr(distributed, "claim_folder", vanish)
    assert f"{folder}: no such folder on {host}" in refused()
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(folder)
    monkeypatch.setattr(distributed, "Job", functools.partial(distributed.Job, version="0.0.0"))
    assert f"{host} has reapc {__version__}, the driver 0.0.0" in refused()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:1", "nothing answers at ray://127.0.0.1:1: Connection refused"),
        ("no-such-host.invalid:6379", "nothing answers at no-such-host.invalid:6379: "),
        ("auto", "--ray auto: nothing answers at 127.0.0.1:1: Connection refused"),
        ("somewhere", "local, auto, HOST:PORT or ray://HOST:PORT is expected"),
        ("127.0.0.1:99999", "local, auto, HOST:PORT or ray://HOST:PORT is expected"),
    ],
)
def test_addresses_where_no_ray_is(address: str, message: str, tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    write_tokens(tmp_path / "t", make_tokens(2, 8))
    code, _, err = run_main(
        capsys, "observe", tiny, "--tokens", tmp_path / "t", "--ray", address, "--out", tmp_path / "s"
    )
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "s.work").exists()


def test_without_ray_installed(tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    write_tokens(tmp_path / "t", make_tokens(2, 8))
    code, _, err = run_main(
        capsys, "observe", tiny, "--tokens", tmp_path / "t", "--ray", "auto", "--out", tmp_path / "s"
    )
    assert code == 1
    assert "the package ray is not installed here" in err
    assert "'reapc[ray]'" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--shards", 2), 2, "--shards is for --ray"),
        (("--ray", "auto", "--shard", "1/2"), 2, "--shard and --ray are both given"),
        (("--ray", "auto", "--shards", 900), 2, "at most 1 shards"),
        (("--ray", "auto", "--device", "cuda"), 1, "no node of the Ray cluster has a GPU"),
        (("--ray", "auto", "--device", "cuda:1"), 2, "with --ray, auto, cpu or cuda"),
    ],
)
def test_options_that_cannot_be(
    cluster: str, options: tuple, code: int, message: str, tiny: Path, tmp_path: Path, capsys
) -> None:
    write_tokens(tmp_path / "t", make_tokens(2, 8))
    found, _, err = run_main(capsys, "observe", tiny, "--tokens", tmp_path / "t", "--out", tmp_path / "s", *options)
    assert (found, message in err) == (code, True), err


@pytest.mark.parametrize(
    ("nodes", "device", "shares"),
    [
        ([{"CPU": 8.0}], "auto", Shares("cpu", 8, 1, 1)),
        ([{"CPU": 8.0}, {"CPU": 64.0}, {"memory": 1.0}], "auto", Shares("cpu", 8, 9, 8)),
        ([{"CPU": 8.0}, {"CPU": 90.0, "GPU": 8.0}], "auto", Shares("cuda", 11, 8, 8)),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}], "cuda", Shares("cuda", 4, 3, 2)),
        ([{"CPU": 2.0, "GPU": 4.0}], "cuda", Shares("cuda", 0.5, 4, 4)),
        ([{"CPU": 16.0, "GPU": 2.0}], "cpu", Shares("cpu", 16, 1, 1)),
    ],
)
def test_a_task_for_a_gpu_or_for_a_node(nodes: list, device: str, shares: Shares) -> None:
    assert shares_of(nodes, device) == shares


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the scripts of docs/distributed.md, and a stand-in for sbatch."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    for script, name in re.findall(r"```bash\n(#!/bin/bash\n# ([\w.]+).*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(script)
    assert {path.name for path in tmp_path.iterdir()} == {"submit.sh", "observe.sbatch", "merge.sbatch"}
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable))
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def bash(folder: Path, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_slurm_scripts_of_the_documentation(slurm: Path, model: Path, file: Path, whole: Scores) -> None:
    out = slurm / "a folder"
    code, text = bash(slurm, "submit.sh", model, file, out, 2)
    assert code == 0, text
    scores = load_scores(out / "scores.safetensors")
    close(scores, whole, rtol=1e-12)
    assert scores.header == {**whole.header, "calibration": scores.header["calibration"]}
    parts = sorted(out.glob("part-*"))
    assert [path.name for path in parts] == ["part-1-of-2.safetensors", "part-2-of-2.safetensors"]
    before = [path.stat() for path in parts]
    code, text = bash(slurm, "submit.sh", model, file, out, 2)  # and again: nothing is left to do
    assert (code, "tokens x layers" in text, "scores.safetensors: exists already" in text) == (0, False, True), text
    assert [path.stat() for path in parts] == before


def test_the_slurm_scripts_when_a_shard_fails(slurm: Path, tmp_path: Path) -> None:
    code, text = bash(slurm, "submit.sh", tmp_path / "no-model", tmp_path / "t", tmp_path / "out", 1)
    assert (code, "no such folder" in text, "DependencyNeverSatisfied" in text) == (1, True, True), text
    merge = (slurm / "merge.sbatch").read_text()
    (slurm / "merge.sbatch").write_text(f"export FOLDER={tmp_path / 'out'} SHARDS=2\n{merge}")
    (tmp_path / "out" / "part-1-of-2.safetensors").touch()
    assert bash(slurm, "merge.sbatch") == (1, f"1 of 2 shards are in {tmp_path / 'out'}\n")


def test_shards_of_different_tokens_are_refused(tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Each machine has packed for itself, with another seed: the name is the same, and so is the model."""
    monkeypatch.setattr(run_module, "TOKENS_PER_BATCH", 100)
    for k in (1, 2):
        tokens = dataclasses.replace(make_tokens(12, 24, seed=k), source="tokens")
        observe(Checkpoint(tiny), tokens, tmp_path / "w", Silent(), shard=(k, 2), out=tmp_path / f"{k}")
    code, _, err = run_main(capsys, "scores", "merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "s")
    assert code == 2
    assert f"{tmp_path / '1'} and {tmp_path / '2'} hold shards of different tokens, both called tokens" in err
    assert not (tmp_path / "s").exists()
