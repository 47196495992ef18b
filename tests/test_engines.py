"""Placement, and launch scripts that are really run, with fake servers that record their arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from specs import demo_spec, qwen30b, recipe_of

from reapc.arch import ModelSpec
from reapc.engines import llamacpp, vllm
from reapc.plan import Plan
from reapc.planner.search import make_plan

HOSTILE = ["$(touch x)", "a'b\"c", "two words", "line\nbreak; touch x", "`touch x`", "-rf"]


def demo_plan(name: str = "demo", target: Any = None, spec: ModelSpec | None = None, **serve: Any) -> tuple[Plan, Any]:
    recipe = recipe_of(target or {"ram": "1GiB"}, serve={"context": 2000, **serve})
    return make_plan(recipe, spec or demo_spec(), name), recipe


def fake(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


RECORD = 'if [[ "$1" == --help ]]; then echo "--load-mode"; exit 0; fi\nprintf "%s\\0" "$@" > "$ARGV_FILE"'


def run(script: str, folder: Path, *arguments: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs ``script`` in ``folder`` with ``folder/bin`` first on PATH; returns the server's argv as well."""
    (folder / "serve.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(folder / "serve.sh")], check=False).returncode == 0
    argv = folder / "argv"
    full = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ARGV_FILE": str(argv), "HOME": str(folder), **env
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(folder / "serve.sh"), *arguments], capture_output=True, text=True, check=False, env=full, cwd="/"
    )
    return done, argv.read_text().split("\0")[:-1] if argv.exists() else []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_inert(name: str, tmp_path: Path) -> None:
    plan, recipe = demo_plan(name)
    folder = tmp_path / "a folder"
    folder.mkdir()
    model = f"{name.strip('-')}.gguf"
    (folder / model).write_text("")
    fake(folder / "bin", "llama-server", RECORD)
    done, argv = run(llamacpp.serve_script(plan, model, recipe), folder, "--metrics", "a b")
    assert done.returncode == 0, done.stderr
    assert argv[argv.index("-m") + 1] == str(folder / model)
    assert argv[-2:] == ["--metrics", "a b"]
    assert argv[argv.index("-c") + 1] == "2048"
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("-lm") + 1] == "none"
    assert {path.name for path in folder.iterdir()} == {model, "bin", "serve.sh", "argv"}
    assert not Path("/x").exists()


def test_context_is_the_total_over_slots(tmp_path: Path) -> None:
    plan, recipe = demo_plan(concurrency=3, kv_cache="q8_0")
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    _, argv = run(llamacpp.serve_script(plan, "m.gguf", recipe), tmp_path)
    assert [argv[argv.index(flag) + 1] for flag in ("-c", "-np", "-ctk", "-ctv")] == ["6144", "3", "q8_0", "q8_0"]


def test_cards_get_the_layers_that_were_counted(tmp_path: Path) -> None:
    plan, recipe = demo_plan(target={"gpus": 2, "vram": "8GiB"}, engine="llama.cpp")
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    fake(tmp_path / "bin", "nvidia-smi", "echo '0, 9000'; echo '1, 9000'")
    _, argv = run(llamacpp.serve_script(plan, "m.gguf", recipe), tmp_path)
    counts = plan.chosen.placement.layers_per_device
    assert argv[argv.index("-ts") + 1] == f"{counts[0]},{counts[1] + 1}"
    assert argv[argv.index("-ngl") + 1] == "5"


def test_memory_check_names_card_and_amount(tmp_path: Path) -> None:
    plan, recipe = demo_plan(target={"gpus": 2, "vram": "8GiB"}, engine="llama.cpp")
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    fake(tmp_path / "bin", "nvidia-smi", "echo '0, 9000'; echo '1, 100'")
    script = llamacpp.serve_script(plan, "m.gguf", recipe)
    needed = -(-plan.chosen.placement.devices[1].used_bytes // 2**20)
    done, argv = run(script, tmp_path)
    assert done.returncode == 1
    assert f"card 1 has 100 MiB free and {needed} MiB are needed: {needed - 100} MiB are missing" in done.stderr
    assert "card 0" not in done.stderr
    assert not argv
    done, argv = run(script, tmp_path, REAPC_SKIP_MEMORY_CHECK="1")
    assert done.returncode == 0
    assert argv


def test_memory_check_of_ram(tmp_path: Path) -> None:
    plan, recipe = demo_plan(target={"ram": "100000GiB"}, spec=demo_spec(num_hidden_layers=40, vocab_size=10**8))
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    done, _ = run(llamacpp.serve_script(plan, "m.gguf", recipe), tmp_path)
    assert done.returncode == 1
    assert "RAM has" in done.stderr


def test_help_overrides_and_outside_addresses(tmp_path: Path) -> None:
    plan, recipe = demo_plan()
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    script = llamacpp.serve_script(plan, "m.gguf", recipe)
    done, argv = run(script, tmp_path, "--help")
    assert done.returncode == 0
    assert not argv
    for word in ("HOST", "PORT", "LLAMA_API_KEY", "REAPC_LLAMA_CPP", "REAPC_SKIP_MEMORY_CHECK"):
        assert word in done.stdout
    done, argv = run(script, tmp_path, HOST="0.0.0.0")
    assert done.returncode == 1
    assert "LLAMA_API_KEY" in done.stderr
    _, argv = run(script, tmp_path, HOST="0.0.0.0", LLAMA_API_KEY="k", PORT="9")
    assert [argv[argv.index(flag) + 1] for flag in ("--host", "--port")] == ["0.0.0.0", "9"]


def test_python_bindings_when_there_is_no_server(tmp_path: Path) -> None:
    plan, recipe = demo_plan()
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path, "my python", '[[ "$1" == -c ]] && exit 0\nprintf "%s\\0" "$@" > "$ARGV_FILE"')
    script = llamacpp.serve_script(plan, "m.gguf", recipe, python_hint=str(tmp_path / "my python"))
    _, argv = run(script, tmp_path, PATH="/usr/bin:/bin")
    assert argv[:2] == ["-m", "llama_cpp.server"]
    assert argv[argv.index("--n_ctx") + 1] == "2048"
    script = llamacpp.serve_script(plan, "m.gguf", recipe, python_hint="/nowhere/python")
    done, _ = run(script, tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert "doctor --install" in done.stderr


def test_vllm_script(tmp_path: Path) -> None:
    cards = {"gpus": 2, "vram": "40GiB", "card": "RTX 4090", "compute_capability": "8.9"}
    plan, recipe = demo_plan("it's", target=cards, spec=qwen30b(), engine="vllm", kv_cache="fp8")
    (tmp_path / "model").mkdir()
    fake(tmp_path / "bin", "vllm", RECORD)
    fake(tmp_path / "bin", "nvidia-smi", "echo '0, 99999'; echo '1, 99999'")
    done, argv = run(vllm.serve_script(plan, "model", recipe), tmp_path, "--extra")
    assert done.returncode == 0, done.stderr
    assert argv[:2] == ["serve", str(tmp_path / "model")]
    assert argv[argv.index("--kv-cache-dtype") + 1] == "fp8"
    assert argv[-1] == "--extra"
    assert ("--disable-custom-all-reduce" in argv) == (plan.chosen.placement.tensor_parallel > 1)


def test_vllm_legality() -> None:
    spec, fmt = qwen30b(), "bf16"

    def reason(target: Any, **serve: Any) -> str | None:
        recipe = recipe_of(target, serve=serve)
        return vllm.legal(spec, fmt, recipe.target, recipe)

    assert reason("h100x8") is None
    assert "compute capability 8.9" in (reason("rtx3090x1", kv_cache="fp8") or "")
    assert "q8_0" in (reason("h100x1", kv_cache="q8_0") or "")
    assert "bfloat16 needs" in (reason({"gpus": 1, "vram": "16GiB", "compute_capability": "7.5"}) or "")
    assert vllm.legal(demo_spec(), fmt, recipe_of({"gpus": 7, "vram": "1GiB"}).target, recipe_of("h100x1"))


def test_vllm_bytes_add_up_over_cards() -> None:
    """Weights over 4 tensor-parallel cards: the experts once, norms and routers four times."""
    spec = qwen30b()
    recipe = recipe_of({"gpus": 4, "vram": "40GiB", "compute_capability": "8.0"})
    placement = vllm._layout(spec, recipe.target, recipe, 4, 1)
    roles = spec.parameters_by_role()
    replicated = roles["norm"] + roles["router"]
    assert sum(d.weights_bytes for d in placement.devices) == 2 * (spec.parameters + 3 * replicated)
    assert vllm.stage_layers(48, 5) == [9, 10, 10, 10, 9]


def test_llamacpp_kv_and_layers() -> None:
    spec = demo_spec()
    assert llamacpp.kv_layer_bytes(spec, 0, 2048, 1, "f16") * 4 == 4 * 2**20  # printed by llama-server
    assert llamacpp.kv_layer_bytes(spec, 0, 2001, 2, "q8_0") == 2 * 2048 * 256 // 32 * 34
    assert llamacpp.split_layers([1] * 10, 3, 2) == [4, 4, 2]
    assert llamacpp.split_layers([5, 1, 1, 1], 2, 0) == [1, 3]
