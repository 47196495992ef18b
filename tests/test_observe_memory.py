"""Observing in a stated memory: counted, kept, refused; prefetching, several devices, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens, run_main
from family_checks import tokens_of
from family_models import make
from quantized_models import quantized
from safetensors.torch import load_file, save_file
from test_mxfp4 import Twins, twins  # noqa: F401 - a fixture

from reapc.checkpoint import atomic
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe import observe as observe_module
from reapc.observe import reference as reference_module
from reapc.observe.observe import observe
from reapc.observe.reference import head_parts, read_reference, write_reference
from reapc.observe.scores import Scores
from reapc.progress import Silent
from reapc.stream import StreamedModel, run_layers, states_of
from reapc.stream import budget as budget_module
from reapc.stream import memory as memory_module
from reapc.stream import run as run_module
from reapc.stream.budget import MemoryPlan
from reapc.stream.devices import compute_settings, devices_of
from reapc.stream.memory import Memory, anonymous_bytes
from reapc.stream.needs import LayerNeed, LiveBytes, count_layer
from reapc.stream.tokens import Batch, Tokens

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reapc-")]


def same(a: Scores, b: Scores) -> None:
    assert set(a.arrays) == set(b.arrays)
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


# What is measured


@linux
def test_the_peak_is_that_of_anonymous_memory(tmp_path: Path) -> None:
    size = 96 << 20
    (tmp_path / "file").write_bytes(b"\1" * size)
    with Memory() as memory:
        before = memory.peak_bytes
        mapped = np.memmap(tmp_path / "file", np.uint8, "r")
        assert int(mapped[::4096].sum()) == size // 4096
        assert memory.peak_bytes - before < size // 4  # what a file stands behind does not count
        held = np.ones(size, np.uint8)
        time.sleep(0.1)
        del held
    assert before + 0.95 * size < memory.peak_bytes < before + 1.5 * size
    assert not workers()


def test_without_proc_the_resident_peak_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = anonymous_bytes()
    monkeypatch.setattr(memory_module, "_STATUS", tmp_path / "none")
    assert memory_module.anonymous_bytes() >= exact / 2
    assert Memory().to_json()["measured"] == "resident"


# What is counted: against the bytes that are alive when a real batch runs


FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    "llama4",
    "qwen3next",
    "kimi-linear",
    "nemotron_h_moe",
    "glm_moe_dsa",
    "deepseek_v4",
    "gemma4",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_counted_needs_cover_real_batches(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    tokens = tokens_of(checkpoint.spec.vocab_size, rows=5)
    model = StreamedModel(checkpoint)
    states = states_of(model, tokens, tmp_path, "test")
    (batch,) = tokens.batches(8192)
    masked = not tokens.mask.all()
    seen: dict[int, LiveBytes] = {}

    @contextmanager
    def watched(layer: object) -> Iterator[object]:
        with real(layer) as forward, LiveBytes() as live:
            seen[layer.index] = live  # type: ignore[attr-defined]
            yield forward

    real = model.computing
    needs = {}
    for index in range(checkpoint.spec.num_layers):
        ids = torch.from_numpy(tokens.input_ids[:2].astype(np.int64))
        needs[index] = count_layer(model, index, ids, masked, None)["cpu"]
    model.computing = watched  # type: ignore[method-assign, assignment]
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, Silent())
    for index, live in seen.items():
        need = needs[index]
        predicted = need.activations(batch) + need.decoding
        assert live.now["cpu"] < 64  # a scalar that stands at the place of the embedding
        assert live.most["cpu"] <= predicted < 4 * live.most["cpu"], (index, live.most["cpu"], predicted)
        module = model.load(index).module
        held = sum(p.nbytes for p in module.state_dict().values() if not p.is_meta)
        assert need.outside <= held <= need.loading + held  # mapped ones cost nothing


def test_shorter_sequences_need_no_more_than_their_share() -> None:
    need = count_of(sequence=1000, length=64)
    assert need.activations(Batch(slice(0, 3), 64)) == 3000
    assert need.activations(Batch(slice(2, 4), 32)) == 1000
    chunked = count_of(sequence=1000, length=512, chunk=256)
    assert chunked.activations(Batch(slice(0, 1), 257)) == 1000
    assert chunked.activations(Batch(slice(0, 1), 10)) == 500


def count_of(**changes: int) -> LayerNeed:
    return LayerNeed(
        **{**dict(outside=0, loading=0, expert=0, decoding=0, sequence=0, sums=0, length=1, chunk=1), **changes}
    )


# What is done about it changes nothing


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, twins: Twins) -> dict[str, Path]:  # noqa: F811
    root = tmp_path_factory.mktemp("sources")
    shape = dict(num_hidden_layers=3, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[1])
    half = make_model(root / "half", dtype=torch.bfloat16, tie_word_embeddings=False, **shape)
    make("llama4", root / "llama4")
    return {
        "bf16": half,
        "fp8": quantized(half, root / "fp8", "fp8"),
        "mxfp4": twins.packed,
        "fused": twins.plain,
        "scaled inputs": root / "llama4",
    }


@pytest.mark.parametrize("kind", ["bf16", "fp8", "mxfp4", "fused", "scaled inputs"])
def test_experts_kept_and_layers_ahead_change_no_bit(
    kind: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(sources[kind])
    spec = checkpoint.spec
    tokens = tokens_of(spec.vocab_size)
    monkeypatch.setattr(run_module, "TOKENS_PER_BATCH", 2 * tokens.length)

    def run(name: str, keep: int, ahead: bool, device: str = "cpu") -> Scores:
        def plan(models, batches, observer_of, memory, at_most=None):
            assert len(batches) > 1
            return MemoryPlan(2 * tokens.length, (keep,) * spec.num_layers, ahead)

        monkeypatch.setattr(observe_module, "plan_pass", plan)
        return observe(checkpoint, tokens, tmp_path / name, Silent(), device=device)

    plain = run("plain", 0, False)
    same(plain, run("some", 2, False))
    same(plain, run("ahead", spec.num_experts, True))
    same(plain, run("two", 0, True, "cpu,cpu"))
    same(plain, run("three", 3, True, "cpu,cpu,cpu"))
    assert not workers()


def test_loading_ahead_leaves_the_threads_to_the_layer_that_is_computed(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second team of OpenMP threads makes the first one sleep between operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: dict[str, set[int]] = {}
    load = StreamedModel.load

    def watched(model: StreamedModel, index: int):
        here = threading.current_thread()
        seen.setdefault("main" if here is threading.main_thread() else here.name, set()).add(torch.get_num_threads())
        return load(model, index)

    monkeypatch.setattr(StreamedModel, "load", watched)
    checkpoint = Checkpoint(sources["bf16"])
    try:
        observe(checkpoint, tokens_of(checkpoint.spec.vocab_size), tmp_path / "work", Silent())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen.pop("main") == {2}
    assert list(seen.values()) == [{1}]


def test_kept_experts_are_decoded_once(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reapc.checkpoint import decode

    checkpoint = Checkpoint(sources["fp8"])
    tokens = make_tokens(6, 32)
    monkeypatch.setattr(run_module, "TOKENS_PER_BATCH", 64)
    count = 0
    real = decode.decode

    def counted(*args):
        nonlocal count
        count += 1
        return real(*args)

    monkeypatch.setattr(decode, "decode", counted)
    found = []
    for keep in (0, 4, 6):
        model = StreamedModel(checkpoint)
        states = states_of(model, tokens, tmp_path, f"keep-{'abcdefg'[keep]}")
        count = 0
        plan = MemoryPlan(64, (keep,) * 3, False)
        run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, Silent(), plan=plan)
        found.append(count)
    once = found[2]
    experts = 2 * 6 * 3  # two layers of six, three matrices each
    assert found[0] - once == 2 * experts  # three batches, each expert in every one
    assert found[1] - once == 2 * experts // 3  # two of six again


# The bound


def observe_command(folder: Path, tokens: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "reapc", "observe", str(folder), "--tokens", str(tokens), "--out", str(out), "--json",
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose batches of 8192 tokens need far more than its sequences of 512."""
    root = tmp_path_factory.mktemp("wide")
    folder = make_model(
        root / "model", dtype=torch.bfloat16, hidden_size=512, moe_intermediate_size=256, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_hidden_layers=4, num_experts=16, num_experts_per_tok=2,
        mlp_only_layers=[], max_position_embeddings=1024,
    )  # fmt: skip
    save_file({"input_ids": torch.from_numpy(make_tokens(8, 512).input_ids)}, root / "tokens.safetensors")
    return folder, root / "tokens.safetensors"


@linux
def test_the_smallest_bound_is_named_and_kept(wide: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    refused = subprocess.run(
        observe_command(*wide, tmp_path / "a", "--memory", "100MB"), capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 1, refused.stderr
    assert "Traceback" not in refused.stderr
    assert "95.4 MiB" in refused.stderr
    least = refused.stderr.split("--memory ")[1].split()[0]
    found = {}
    for bound in (least, "3GB"):
        done = subprocess.run(
            observe_command(*wide, tmp_path / bound, "--memory", bound), capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        said = json.loads(done.stdout)["memory"]
        assert said["peak_bytes"] <= said["predicted_bytes"] <= said["bound_bytes"]
        assert said["measured"] == "anonymous"
        found[bound] = load_file(tmp_path / bound), said, done.stderr
    small, large = found[least], found["3GB"]
    assert small[1]["peak_bytes"] < large[1]["peak_bytes"] - (20 << 20)
    assert "do not fit in the memory" in small[2]
    assert "do not fit" not in large[2]
    for name, values in large[0].items():
        np.testing.assert_allclose(small[0][name].numpy(), values.numpy(), rtol=1e-5, atol=1e-9, err_msg=name)


def test_a_bound_that_was_not_kept_is_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"input_ids": torch.from_numpy(make_tokens(2, 16).input_ids)}, tmp_path / "ids.safetensors")
    monkeypatch.setattr(Memory, "peak_bytes", property(lambda self: 5_000_000_000))
    command = ("observe", tiny, "--tokens", tmp_path / "ids.safetensors")
    code, out, err = run_main(capsys, *command, "--out", tmp_path / "a", "--memory", "4GB")
    assert code == 0
    assert "warning: more than --memory 4GB was used: peak of anonymous memory: 4.7 GiB" in err
    assert "4.7 GiB" in out
    code, _, err = run_main(capsys, *command, "--out", tmp_path / "b")
    assert code == 0
    assert "warning" not in err


@pytest.mark.parametrize("given", ["2", "2 parsecs", "-1GB", "0GB"])
def test_a_bound_that_is_no_size(given: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_main(capsys, "observe", tiny, "--out", tmp_path / "a", "--memory", given)
    assert code == 2
    assert "--memory" in err


def test_without_a_bound_a_pass_that_does_not_fit_is_tried(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the free RAM is a default, not a promise: the smallest batches are taken."""
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 1 << 20)
    monkeypatch.setattr(budget_module, "_COUNTING_PART", 0)
    lines: list[str] = []

    class Log(Silent):
        def log(self, line: str) -> None:
            lines.append(line)

    observe(Checkpoint(tiny), make_tokens(3, 16), tmp_path / "w", Log())
    assert any("batches of 1 tokens" in line for line in lines)


# Prefetching fails as loading does


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.experts.3.up_proj.weight"])
def test_errors_of_the_background_are_those_of_the_layer(
    tmp_path: Path, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "m", mlp_only_layers=[])
    arrays = load_file(folder / "model.safetensors")
    arrays[f"model.layers.2.{name}"][1, 2] = float("nan")
    save_file(arrays, folder / "model.safetensors")
    done: list[int] = []
    real = observe_module.run_layers

    def noted(models, sets, observer_of, layer_done, *rest, **more):
        def note(index, observer):
            done.append(index)
            layer_done(index, observer)

        assert more["plan"].ahead
        real(models, sets, observer_of, note, *rest, **more)

    # every layer is of one kind, so that only the first was read before
    monkeypatch.setattr(observe_module, "run_layers", noted)
    with pytest.raises(ReapcError, match=re.escape(f"'model.layers.2.{name}' holds NaN")):
        observe(Checkpoint(folder), make_tokens(4, 16), tmp_path / "w", Silent(), device=device)
    assert done == [0, 1]
    assert not workers()


def test_an_expert_that_nothing_is_sent_to_is_checked_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", num_experts=24, num_experts_per_tok=2)
    arrays = load_file(folder / "model.safetensors")
    tokens = make_tokens(1, 3)
    never = observe(Checkpoint(folder), tokens, tmp_path / "w", Silent()).never_routed()[2]
    arrays[f"model.layers.2.mlp.experts.{never[-1]}.down_proj.weight"][0, 0] = float("inf")
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ReapcError, match=rf"experts\.{never[-1]}\.down_proj"):
        observe(Checkpoint(folder), tokens, tmp_path / "w", Silent())


# Devices


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("gpu", ReapcError, "'gpu' is not one of cpu, cuda"),
        ("cpu:0", ReapcError, "'cpu:0' is not one of"),
        ("cuda:x", ReapcError, "'cuda:x' is not one of"),
        ("cpu,", ReapcError, "'' is not one of"),
    ],
)
def test_devices_that_are_not_understood(text: str, error: type[ReapcError], said: str) -> None:
    with pytest.raises(error, match=said):
        devices_of(text)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cpu, cpu") == [torch.device("cpu")] * 2
    with pytest.raises(ReapcError, match="one device"):
        compute_settings("cpu,cpu")
    assert compute_settings("cpu,cpu", several=True) == ("cpu,cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotBeDone, match="sees no GPU"):
        devices_of("cuda:0,cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda,cuda:1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert compute_settings("cuda:0,cuda:1", "auto", "float16", several=True)[1] == torch.float16
    with pytest.raises(CannotBeDone, match="cuda:2 is not there; torch sees cuda:0 to cuda:1"):
        devices_of("cuda:0,cuda:2")
    with pytest.raises(ReapcError, match="of one kind"):
        devices_of("cuda:0,cpu")


def test_a_list_of_devices_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.from_numpy(make_tokens(3, 16).input_ids)}, tmp_path / "ids.safetensors")
    files = []
    for device in ("cpu", "cpu,cpu"):
        out = tmp_path / device.replace(",", "-")
        command = ("observe", tiny, "--tokens", tmp_path / "ids.safetensors", "--device", device, "--out", out)
        code, said, _ = run_main(capsys, *command, "--json")
        assert code == 0
        assert json.loads(said)["memory"]["bound_bytes"] is None
        files.append(out.read_bytes())
    assert files[0] == files[1]


# Killed


@linux
def test_killed_at_a_random_layer_and_gone_on_with(wide: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    settings = ("--memory", "600MB", "--device", "cpu,cpu")
    whole = subprocess.run(
        observe_command(*wide, tmp_path / "whole", *settings), capture_output=True, text=True, env=environment
    )
    assert whole.returncode == 0, whole.stderr
    layer = random.randrange(3)
    command = observe_command(*wide, tmp_path / "killed", *settings)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    left = tmp_path / "killed.work" / f"layer-{layer}.safetensors"
    deadline = time.monotonic() + 120
    while not left.is_file():
        assert process.poll() is None, (layer, process.communicate()[1].decode())
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert " of 4 layers were done before; going on" in resumed.stderr
    assert f"{layer + 1} of 4" in resumed.stderr or f"{layer + 2} of 4" in resumed.stderr
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "killed.work").exists()


def test_going_on_takes_batches_of_the_same_size(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another bound, or other programs beside it, must not change the batches of the layers that are left."""
    tokens = make_tokens(6, 16)
    limits: list[int | None] = []
    real = observe_module.plan_pass

    def cut(models, batches, observer_of, memory, at_most=None):
        limits.append(at_most)
        return real(models, batches, observer_of, memory, 32 if at_most is None else at_most)

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(observe_module, "plan_pass", cut)
    whole = observe(Checkpoint(tiny), tokens, tmp_path / "a", Silent())
    with monkeypatch.context() as patch:
        patch.setattr(observe_module, "run_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            observe(Checkpoint(tiny), tokens, tmp_path / "b", Silent())
    same(whole, observe(Checkpoint(tiny), tokens, tmp_path / "b", Silent()))
    assert limits == [None, None, 32]


# Disk


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "glm_moe_dsa"])
def test_the_disk_that_is_asked_for_is_what_is_taken(
    name: str, moments: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(name, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    plain = tokens_of(checkpoint.spec.vocab_size)
    tokens = Tokens(plain.input_ids, plain.mask, np.arange(6, dtype=np.int32) % 3, ("a", "b", "c"), "random")
    asked: list[int] = []
    taken: list[int] = []
    monkeypatch.setattr(observe_module, "require_room", lambda path, size, what: asked.append(size))

    def measured(path: Path) -> None:
        if path == tmp_path / "w" and path.is_dir() and (tmp_path / "out").is_file():
            taken.append(sum(file.stat().st_blocks * 512 for file in path.iterdir()))
        real(path)

    real = observe_module.remove
    monkeypatch.setattr(observe_module, "remove", measured)
    out = tmp_path / "out"
    observe(checkpoint, tokens, tmp_path / "w", Silent(), held_out=tokens, moments=moments, out=out)
    (needed,), (used,) = asked, taken
    used += out.stat().st_blocks * 512
    files = 2 * 4 + checkpoint.spec.num_layers + 4
    assert used - files * 4096 <= needed < 2.5 * used


def test_too_small_a_disk_is_refused_before_anything_is_computed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 10_000)
    with pytest.raises(CannotBeDone, match="hidden states and sums"):
        observe(Checkpoint(tiny), make_tokens(4, 32), tmp_path / "w", Silent(), out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["identity"]


# The head


def test_the_head_in_parts_gives_the_same_reference(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "m", dtype=torch.bfloat16))
    tokens = make_tokens(2, 40)
    model = StreamedModel(checkpoint)
    states = states_of(model, tokens, tmp_path, "test")
    run_layers(model, [(states, False)], lambda i: None, lambda i, o: None, Silent())
    monkeypatch.setattr(reference_module, "TOP", 16)
    for limit in (1 << 30, 0):  # exact, then the top ones and the tail
        monkeypatch.setattr(reference_module, "EXACT_LIMIT_BYTES", limit)
        monkeypatch.setattr(reference_module, "head_parts", lambda *_: (2048, None))
        write_reference(tmp_path / "whole", model, states)
        monkeypatch.setattr(reference_module, "head_parts", lambda *_: (16, 100))
        write_reference(tmp_path / "parts", model, states)
        pairs = zip(read_reference(tmp_path / "whole"), read_reference(tmp_path / "parts"), strict=True)
        for whole, parts in pairs:
            assert (whole.top is None) == (limit > 0)
            np.testing.assert_allclose(parts.next_log_prob, whole.next_log_prob, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(np.sort(parts.log_probs), np.sort(whole.log_probs), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(parts.best, whole.best)
            if whole.tail is not None and parts.tail is not None:
                np.testing.assert_allclose(parts.tail, whole.tail, rtol=1e-4, atol=1e-5)


def test_how_much_of_the_head_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(Checkpoint(make_model(tmp_path / "m", dtype=torch.bfloat16, vocab_size=4096)))
    assert head_parts(model) == (2048, None)
    matrix = 4096 * 64 * 4
    for room, expected in (
        (1 << 30, (2048, None)),
        (20 * 4096 * 1024 + matrix, (1024, None)),
        (20 * 4096 * 16 + matrix, (16, None)),
        (20 * 4096 * 16 + matrix // 2, (16, 2048)),
        (0, (16, 1024)),
    ):
        monkeypatch.setattr(Memory, "room_bytes", lambda self, room=room: room)
        assert head_parts(model, Memory(1)) == expected, room
