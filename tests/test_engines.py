"""Placement, and launch scripts that are really run, with fake servers that record their arguments."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from specs import DATA, demo_spec, qwen30b, recipe_of

from reapc.arch import ModelSpec, known
from reapc.engines import llamacpp, vllm, vllm_launch, vllm_rules
from reapc.formats import weights
from reapc.plan import Plan
from reapc.planner.search import make_plan

TP_LEGALITY = DATA / "tp_legality.csv"
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
    done, argv = run(vllm_launch.serve_script(plan, "model", recipe), tmp_path, "--extra")
    assert done.returncode == 0, done.stderr
    assert argv[:2] == ["serve", str(tmp_path / "model")]
    assert argv[argv.index("--kv-cache-dtype") + 1] == "fp8"
    assert argv[-1] == "--extra"
    assert ("--disable-custom-all-reduce" in argv) == (plan.chosen.placement.tensor_parallel > 1)


def vllm_layouts(spec: ModelSpec, fmt: str, target: Any, kv: str = "auto", **serve: Any) -> vllm.Layouts:
    parsed = weights.parse(fmt)
    assert parsed is not None
    recipe = recipe_of(target, serve=serve)
    return vllm.Layouts(spec, parsed, kv, recipe.target, recipe.serve)


def vllm_refusal(spec: ModelSpec, fmt: str, target: Any, kv: str = "auto", **serve: Any) -> str:
    """Why vLLM refuses, "" where it does not."""
    parsed = weights.parse(fmt)
    assert parsed is not None
    recipe = recipe_of(target, serve=serve)
    return vllm_rules.refusal(spec, parsed, recipe.target, recipe.serve, kv) or ""


def test_vllm_legality() -> None:
    spec = qwen30b()
    assert vllm_refusal(spec, "bf16", "h100x8") == ""
    assert "compute capability 8.9" in vllm_refusal(spec, "bf16", "rtx3090x1", kv="fp8")
    assert vllm_refusal(spec, "bf16", "rtx4090x1", kv="fp8") == ""
    assert "q8_0" in vllm_refusal(spec, "bf16", "h100x1", kv="q8_0")
    old = {"gpus": 1, "vram": "16GiB", "compute_capability": "7.0"}
    assert "bf16 needs compute capability 8.0" in vllm_refusal(spec, "bf16", old)
    assert "gptq-w4g128 needs compute capability 7.5" in vllm_refusal(spec, "gptq-w4g128", old)
    assert "CUDA cards only" in vllm_refusal(spec, "bf16", "mi300x-192gx8")
    assert "needs a GPU" in vllm_refusal(spec, "bf16", "ram64")


def test_sparse_attention_needs_hopper_or_a_named_road() -> None:
    for name in ("zai-org/GLM-5", "deepseek-ai/DeepSeek-V3.2"):
        spec = known.spec(name)
        reason = vllm_refusal(spec, "auto-round-w3g128", "rtx3090x8")
        assert "compute capability" in reason
        assert "8.6" in reason
        assert "9.0" in vllm_refusal(spec, "auto-round-w3g128", "l40sx8")
        assert vllm_refusal(spec, "fp8-block", "h100x8") == ""
        assert vllm_refusal(spec, "auto-round-w3g128", "rtx3090x8", experimental=["triton-mla-sparse"]) == ""
        assert "KV cache of auto only" in vllm_refusal(
            spec, "fp8-block", "h100x8", kv="fp8", experimental=["triton-mla-sparse"]
        )
    assert vllm_refusal(known.spec("deepseek-ai/DeepSeek-V3"), "auto-round-w4g128", "rtx3090x8") == ""


MODELS = {
    "GLM-5/5.1/5.2": "zai-org/GLM-5", "GLM-4.5/4.6/4.7": "zai-org/GLM-4.5", "GLM-4.5-Air": "zai-org/GLM-4.5-Air",
    "GLM-4.7-Flash": "zai-org/GLM-4.7-Flash", "Qwen3-Coder-480B": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
}  # fmt: skip


@pytest.mark.parametrize("row", [r for r in csv.DictReader(TP_LEGALITY.open()) if r["family"] in MODELS], ids=str)
def test_tensor_parallel_and_int4_groups_against_the_table_read_from_vllm(row: dict[str, str]) -> None:
    """facts/tp-legality-check-me.csv: which degrees of tensor parallelism and which groups Marlin takes."""
    spec, tp = known.spec(MODELS[row["family"]]), int(row["tp"])
    layout = vllm_rules.Layout(tp, 1, 1)
    legal = vllm_rules.layout_refusal(spec, layout) is None
    assert legal == (row["verdict"] != "ILLEGAL"), vllm_rules.layout_refusal(spec, layout)
    if not legal:
        return
    marlin = []
    for group in (32, 64, 128):
        fmt = weights.parse(f"ct-w4g{group}:experts")
        assert fmt is not None
        reason, slow = vllm_rules.format_refusal(spec, fmt, layout)
        if reason is None and not slow:
            marlin.append(str(group))
    assert " ".join(marlin) == row["legal_group_sizes(int4 g)"].strip()


def test_glm_air_over_eight_cards_has_no_int4_group_but_expert_parallelism_has() -> None:
    spec = known.spec("zai-org/GLM-4.5-Air")
    for group in (32, 64, 128):
        fmt = weights.parse(f"gptq-w4g{group}:experts")
        assert fmt is not None
        reason, _ = vllm_rules.format_refusal(spec, fmt, vllm_rules.Layout(8, 1, 1))
        assert reason is not None
        assert "176 per card over 8 cards" in reason
        assert vllm_rules.format_refusal(spec, fmt, vllm_rules.Layout(8, 1, 8)) == (None, False)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "cards", "named"),
    [(2, 64, 1, ""), (2, 64, 2, "k_proj: 64 rows"), (4, 128, 4, ""), (4, 128, 8, ""), (1, 64, 1, "k_proj: 64 rows")],
)
def test_fp8_tiles_are_not_cut_between_cards_or_between_q_k_and_v(
    kv_heads: int, head_dim: int, cards: int, named: str
) -> None:
    """Found by vLLM's own loader (test_vllm_kernels.py)."""
    spec = demo_spec(
        num_key_value_heads=kv_heads, head_dim=head_dim, num_attention_heads=16, moe_intermediate_size=1024
    )
    fmt = weights.parse("fp8-block")
    assert fmt is not None
    reason, _ = vllm_rules.format_refusal(spec, fmt, vllm_rules.Layout(cards, 1, 1))
    assert (named in (reason or "")) if named else reason is None, reason


def test_a_group_that_marlin_refuses_is_served_slowly() -> None:
    """1408 / 4 = 352 columns: not a multiple of 64 or 128, but of 32, which moe_wna16 falls back to."""
    fmt = weights.parse("gptq-w4g128:experts")
    assert fmt is not None
    assert vllm_rules.format_refusal(known.spec("zai-org/GLM-4.5-Air"), fmt, vllm_rules.Layout(4, 1, 1)) == (None, True)


def test_vllm_bytes_add_up_over_cards() -> None:
    """Weights over 4 tensor-parallel cards: the experts once, norms and routers four times."""
    spec = qwen30b()
    sizes = vllm_layouts(spec, "bf16", {"gpus": 4, "vram": "40GiB", "compute_capability": "8.0"})
    placement = sizes._placement(vllm_rules.Layout(4, 1, 1), 128, False)
    roles = spec.parameters_by_role()
    replicated = roles["norm"] + roles["router"]
    assert sum(d.weights_bytes for d in placement.devices) == 2 * (spec.parameters + 3 * replicated)
    assert vllm.stage_layers(48, 5) == [9, 10, 10, 10, 9]


def test_expert_parallel_ranks_hold_whole_experts_rounded_up() -> None:
    """126 experts over 4 ranks: 32 of them on the fullest."""
    spec = qwen30b()
    sizes = vllm_layouts(spec, "bf16", {"gpus": 4, "vram": "40GiB", "compute_capability": "8.0"})
    dealt = sizes._placement(vllm_rules.Layout(4, 1, 4), 126, False).devices[0].weights_bytes
    whole = sizes._placement(vllm_rules.Layout(4, 1, 4), 128, False).devices[0].weights_bytes
    assert whole - dealt == 48 * 2 * 2048 * 2  # two router rows a layer, and no expert


def test_mla_latents_lie_whole_on_every_rank_and_kv_heads_do_not() -> None:
    """DeepSeek-V3: 576 elements a token and layer on each of 8 ranks; Qwen3-30B: 4 KV heads over 8 ranks keep one."""
    cards = {"gpus": 8, "vram": "192GB", "compute_capability": "9.0"}
    sizes = vllm_layouts(known.spec("deepseek-ai/DeepSeek-V3"), "bf16", cards, context=32768)
    latent = sizes._placement(vllm_rules.Layout(8, 1, 1), 256, False).devices[7].kv_bytes
    assert latent == 61 * 576 * 2 * (32768 + 16)
    sizes = vllm_layouts(qwen30b(), "bf16", cards, context=4096)
    for tp, elements in ((8, 2 * 128), (2, 2 * 2 * 128)):
        place = sizes._placement(vllm_rules.Layout(tp, 1, 1), 128, False)
        assert place.devices[0].kv_bytes == 48 * elements * 2 * (4096 + 16)


def test_idle_cards_are_listed_and_uneven_stages_are_emitted(tmp_path: Path) -> None:
    """96 heads over 3 cards: 8 KV heads do not divide, so stages of a pipeline; the fourth card helps."""
    plan, recipe = demo_plan(
        "m", target={"gpus": 3, "vram": "36GB", "compute_capability": "8.6"}, spec=qwen30b(), engine="vllm"
    )
    place = plan.chosen.placement
    assert len(place.devices) == 3
    assert place.tensor_parallel * place.pipeline_parallel <= 3
    assert sum(place.layers_per_device) == 48
    for device in place.devices:
        assert device.free_bytes >= 0
    script = vllm_launch.serve_script(plan, "model", recipe)
    if list(place.layers_per_device) != vllm.stage_layers(48, place.pipeline_parallel):
        assert f"VLLM_PP_LAYER_PARTITION={','.join(map(str, place.layers_per_device))}" in script


def test_llamacpp_kv_and_layers() -> None:
    kind = demo_spec().layers[0].kind
    assert llamacpp.kv_layer_bytes(kind, 2048, 1, "f16") * 4 == 4 * 2**20  # printed by llama-server
    assert llamacpp.kv_layer_bytes(kind, 2001, 2, "q8_0") == 2 * 2048 * 256 // 32 * 34
    assert llamacpp.split_layers([1] * 10, 3, 2) == [4, 4, 2]
    assert llamacpp.split_layers([5, 1, 1, 1], 2, 0) == [1, 3]


def test_llamacpp_kv_of_glm5_at_32k_is_what_llama_cpp_prints() -> None:
    """78 * (576 + 128) * 2 bytes a token (facts/llamacpp-memory.md: 3.35 GiB at 32k)."""
    spec = known.spec("zai-org/GLM-5")
    assert sum(llamacpp.kv_layer_bytes(layer.kind, 32768, 1, "f16") for layer in spec.layers) == 109_824 * 32768
    flash = known.spec("zai-org/GLM-5.2")
    per_token = (78 * 576 + 21 * 128) * 2
    assert sum(llamacpp.kv_layer_bytes(layer.kind, 32768, 1, "f16") for layer in flash.layers) == per_token * 32768


def test_experts_go_to_ram_only_as_far_as_needed(tmp_path: Path) -> None:
    cards = {"gpus": 1, "vram": "8GiB", "ram": "64GiB", "compute_capability": "8.6"}
    recipe = recipe_of(cards, serve={"engine": "llama.cpp", "context": 4096}, quantize={"format": "Q4_K_M"})
    plan = make_plan(recipe, qwen30b(), "m")
    place = plan.chosen.placement
    assert 0 < place.offloaded_layers < 48
    sizes = llamacpp.Layouts(qwen30b(), "Q4_K_M", "f16", recipe.target, recipe.serve, True)
    one_less = sizes._on_cards(sizes._layers(128), 128, 1, place.offloaded_layers - 1)
    assert not one_less.fits
    assert sum(d.weights_bytes for d in place.devices) == sizes.weights_bytes(128)
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    fake(tmp_path / "bin", "nvidia-smi", "echo '0, 9000'")
    _, argv = run(llamacpp.serve_script(plan, "m.gguf", recipe), tmp_path)
    assert argv[argv.index("-ncmoe") + 1] == str(place.offloaded_layers)
    assert argv[argv.index("-ngl") + 1] == "49"


def test_too_small_cards_leave_the_model_in_ram(tmp_path: Path) -> None:
    cards = {"gpus": 1, "vram": "1200MiB", "ram": "64GiB", "compute_capability": "8.6"}
    recipe = recipe_of(cards, serve={"engine": "llama.cpp", "context": 4096}, quantize={"format": "Q4_K_M"})
    plan = make_plan(recipe, qwen30b(), "m")
    card, host = plan.chosen.placement.devices
    assert (card.used_bytes, host.name) == (0, "host")
    (tmp_path / "m.gguf").write_text("")
    fake(tmp_path / "bin", "llama-server", RECORD)
    _, argv = run(llamacpp.serve_script(plan, "m.gguf", recipe), tmp_path, REAPC_SKIP_MEMORY_CHECK="1")
    assert argv[argv.index("-dev") + 1] == "none"
    assert argv[argv.index("-ngl") + 1] == "0"
