"""``reapc fit``, ``formats`` and ``plan`` as scripts see them: keys, exit codes, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from reapc.arch import known
from reapc.cli.main import main

GIB = 2**30


class Run:
    """One command in this process: its exit code, its output and its error."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        self.code = stop.value.code
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: Run(capsys, *arguments)


RESULT_KEYS = {
    "model", "fits", "experts_kept", "prune_ratio", "format", "engine", "parallel", "context", "kv_dtype",
    "weights_bytes", "kv_bytes", "per_device", "predicted_loss", "decode_tokens_per_second_ceiling", "refused",
}  # fmt: skip
DEVICE_KEYS = {
    "name", "capacity_bytes", "weights_bytes", "kv_bytes", "state_bytes", "workspace_bytes", "overhead_bytes",
    "free_bytes",
}  # fmt: skip


def test_the_whole_catalogue(run: Any) -> None:
    found = run("fit", "--vram", "24GB", "--json")
    assert found.code == 0
    data = found.json
    assert data["target"]["vram_bytes"] == 24 * 10**9
    assert {row["card"] for row in data["target"]["cards_sold_as"]} >= {"RTX 3090", "RTX 4090", "L4"}
    results = data["results"]
    assert len(results) > 20
    assert [row["predicted_loss"] for row in results] == sorted(row["predicted_loss"] for row in results)
    for row in results:
        assert set(row) >= RESULT_KEYS
        assert row["fits"]
        assert set(row["parallel"]) == {"tp", "pp", "ep"}
        assert row["per_device"][0]["name"] == "GPU 0"
        for device in row["per_device"]:
            assert set(device) >= DEVICE_KEYS
        assert all({"engine", "format", "reason"} <= set(refusal) for refusal in row["refused"])
    every = run("fit", "--vram", "24GB", "--all", "--json").json["results"]
    assert [row["model"] for row in every][: len(results)] == [row["model"] for row in results]
    assert {row["model"] for row in every} == set(known.names())
    for row in every[len(results) :]:
        assert not row["fits"]
        assert row["per_device"] == [] or min(d["free_bytes"] for d in row["per_device"]) < 0
    assert len(run("fit", "--vram", "24GB", "--limit", 3, "--json").json["results"]) == 3


def test_glm5_fits_eight_3090s_on_the_sum_and_not_on_the_fullest(run: Any) -> None:
    asked = ("fit", "--target", "rtx3090x8", "--model", "glm-5", "--format", "Q3_K_M", "--context", 32768, "--json")
    found = run(*asked, "--experts", 128)
    assert found.code == 1
    [row] = found.json["results"]
    assert not row["fits"]
    cards = [device for device in row["per_device"] if device["name"] != "host"]
    used = [device["capacity_bytes"] - device["free_bytes"] for device in cards]
    assert sum(used) < sum(device["capacity_bytes"] for device in cards)
    assert max(used) > cards[0]["capacity_bytes"]
    # facts/glm5-on-ampere.md: 169.5 GiB at 128 experts, 149.5 at 112
    assert row["weights_bytes"] / GIB == pytest.approx(169.5, abs=0.05)
    smaller = run(*asked, "--experts", 112)
    assert smaller.code == 0
    assert smaller.json["results"][0]["weights_bytes"] / GIB == pytest.approx(149.5, abs=0.05)
    assert "it would fit with" in found.err


def test_a_fixed_configuration_is_not_searched(run: Any) -> None:
    found = run(
        "fit", "--vram", "80GB", "--model", "qwen3-30b-a3b", "--experts", 96, "--format", "gptq-w4g64", "--json"
    )
    [row] = found.json["results"]
    assert (row["experts_kept"], row["format"], row["engine"]) == (96, "gptq-w4g64", "vllm")
    for fmt in ("Q8_0", "bf16", "auto-round-w3g128:experts", "ct-w4g32", "fp8-block"):
        assert (
            run("fit", "--vram", "80GB", "--model", "qwen3-30b-a3b", "--format", fmt, "--json")
            .json["results"][0]["format"]
            .lower()
            == fmt.lower()
        )


def test_refusals_have_reasons(run: Any) -> None:
    row = run("fit", "--target", "rtx3090x8", "--model", "glm-5", "--max-ratio", 0.6, "--json").json["results"][0]
    assert row["engine"] == "llama.cpp"
    vllm = [refusal["reason"] for refusal in row["refused"] if refusal["engine"] == "vllm"]
    assert vllm
    assert all("compute capability" in reason for reason in vllm)
    road = ("fit", "--target", "rtx3090x8", "--model", "glm-5", "--max-ratio", 0.6, "--engine", "vllm", "--json")
    assert run(*road).code == 1
    opted = run(*road, "--experimental", "triton-mla-sparse")
    assert opted.code == 0
    assert opted.json["results"][0]["engine"] == "vllm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram", "24"), "24 has no unit"),
        (("--vram", "-24GB"), "-24GB"),
        (("--vram", "0GB"), "0"),
        (("--vram", "24GB", "--gpus", "0"), "--gpus 0"),
        (("--vram", "24GB", "--gpus", "-1"), "--gpus -1"),
        (("--gpus", "2"), "without --vram"),
        (("--target", "rtx3090x9"), "did you mean"),
        (("--target", "rtx3090x8", "--vram", "24GB"), "both given"),
        (("--vram", "24GB", "--model", "glm"), "matches several models"),
        (("--vram", "24GB", "--model", "qwen3-30b-a3x"), "Qwen3-30B-A3B"),
        (("--vram", "24GB", "--model", "glm-5", "--experts", "4"), "every token is sent to 8"),
        (("--vram", "24GB", "--model", "glm-5", "--experts", "257"), "the model has 256 experts"),
        (("--vram", "24GB", "--model", "glm-5", "--experts", "-3"), "-3"),
        (("--vram", "24GB", "--format", "Q4_KM"), "did you mean 'Q4_K_M'"),
        (("--vram", "24GB", "--format", "gptq-w3g128"), "4, 8 bits"),
        (("--vram", "24GB", "--context", "0"), "0 is not in the range"),
        (("--vram", "24GB", "--model", "olmoe", "--context", "1000000"), "positions"),
        (("--vram", "24GB", "--experimental", "magic"), "unknown experimental road"),
        (("--vram", "24GB", "--kv-dtype", "q5"), "q5"),
        (("--vram", "24GB", "--max-ratio", "1"), "1"),
    ],
)
def test_wrong_requests_exit_with_2(run: Any, arguments: tuple[str, ...], message: str) -> None:
    found = run("fit", *arguments)
    assert found.code == 2, found.err
    assert message in found.err
    assert "Traceback" not in found.err


def test_nothing_fits_exits_with_1_and_says_the_smallest_change(run: Any) -> None:
    found = run("fit", "--vram", "1GB", "--model", "glm-5")
    assert found.code == 1
    assert "it would fit with --vram" in found.err
    need = found.err.split("--vram ")[1].split("B")[0] + "B"
    assert run("fit", "--vram", need, "--model", "glm-5").code == 0
    assert run("fit", "--vram", f"{int(need[:-1]) - 1}B", "--model", "glm-5").code == 1
    everything = run("fit", "--vram", "100MB")
    assert everything.code == 1
    assert "it would fit with" in everything.err


def test_engine_and_format_that_do_not_go_together(run: Any) -> None:
    found = run("fit", "--vram", "24GB", "--engine", "vllm", "--format", "Q4_K_M")
    assert found.code == 1
    assert "served by llama.cpp" in found.err


def test_a_tensor_parallel_degree_that_does_not_divide(run: Any) -> None:
    asked = ("fit", "--target", "h100x8", "--model", "qwen3-235b-a22b", "--json", "--tp")
    for degree, reason in ((3, "64 attention heads do not divide over 3 cards"), (16, "the target has 8")):
        found = run(*asked, degree)
        assert found.code == 1
        assert reason in found.err
    row = run(*asked, 4).json["results"][0]
    assert row["engine"] == "vllm"
    assert row["parallel"]["tp"] == 4
    assert run(*asked, 0).code == 2


def test_ram_takes_the_experts_that_do_not_fit(run: Any) -> None:
    alone = run("fit", "--vram", "24GB", "--model", "glm-4.5-air", "--engine", "llama.cpp", "--json")
    beside = run("fit", "--vram", "24GB", "--ram", "64GB", "--model", "glm-4.5-air", "--engine", "llama.cpp", "--json")
    assert alone.code == 1
    [row] = beside.json["results"]
    assert row["offloaded_layers"] > 0
    host = next(device for device in row["per_device"] if device["name"] == "host")
    assert host["capacity_bytes"] == 64 * 10**9
    assert host["weights_bytes"] > 10 * 10**9


def test_without_a_budget_this_machine_is_asked(run: Any) -> None:
    found = run("fit", "--model", "olmoe", "--json")
    assert found.code in (0, 1)
    target = found.json["target"]
    assert target["findings"]
    assert target["ram_bytes"] > 0 or target["vram_bytes"] > 0


def test_tables_fit_100_columns(run: Any) -> None:
    for arguments in (("--vram", "24GB"), ("--target", "rtx3090x8", "--limit", 5, "--all"), ("--ram", "64GB")):
        found = run("fit", *arguments)
        assert max(map(len, found.out.splitlines())) <= 100
        assert "workspace and overhead" in found.out
    formats = run("formats")
    assert max(map(len, formats.out.splitlines())) <= 100


def test_formats(run: Any) -> None:
    rows = {row["name"]: row for row in run("formats", "--json").json["formats"]}
    assert rows["bf16"]["bits_per_weight"] == 16
    assert rows["Q4_K_M"]["engines"] == ["llama.cpp"]
    assert rows["gptq-w4g128"]["engines"] == ["vllm"]
    # 4 bits, a 16 bit scale and a 4 bit zero point per 128 weights, 32 bits of g_idx per row of 8192
    assert rows["gptq-w4g128"]["bits_per_weight"] == pytest.approx(4 + 20 / 128 + 32 / 8192)
    assert rows["auto-round-w3g128"]["bits_per_weight"] == pytest.approx(3 + 19 / 128)
    assert rows["fp8-block"]["bits_per_weight"] == pytest.approx(8 + 32 / 128**2)
    assert rows["mxfp4"]["bits_per_weight"] == pytest.approx(4.25)
    assert rows["nvfp4"]["bits_per_weight"] == pytest.approx(4.5, abs=1e-4)
    assert rows["mxfp4"]["min_capability"] == "8.0"
    assert {"auto-round-w2g32", "auto-round-w8g64", "ct-w4g128", "IQ3_XXS", "int8", "fp8"} <= set(rows)


@pytest.mark.parametrize("arguments", [("fit", "--vram", "24GB", "--json"), ("formats", "--json")])
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom reapc.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", recipes(), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_plans_and_says_how_to_run_it(run: Any, recipe: Path) -> None:
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"reapc build recipes/{recipe.name}" in line for line in head)
    found = run("plan", recipe, "--json")
    assert found.code == 0, found.err
    plan = found.json["plan"]
    assert plan["fits"]
    assert set(plan) >= (RESULT_KEYS - {"refused"}) | {"experts", "tensors"}
    assert sum(row["bytes"] for row in plan["tensors"]) == plan["weights_bytes"]
    assert plan["prune_ratio"] <= 0.6
    text = run("plan", recipe, "--explain").out
    assert max(map(len, text.splitlines())) <= 130  # the head comment may be wider than the tables


def test_the_named_recipe(run: Any) -> None:
    recipe = ROOT / "recipes" / "glm5_3090x8.toml"
    data = run("plan", recipe, "--json").json
    plan = data["plan"]
    assert plan["engine"] == "llama.cpp"
    assert plan["context"] == 32768
    cards = [device for device in plan["per_device"] if device["name"] != "host"]
    assert [device["capacity_bytes"] for device in cards] == [24123 * 2**20] * 8
    assert min(device["free_bytes"] for device in cards) >= 0
    sizes = {(row["format"], row["experts"]): row["bytes"] for row in plan["sizes"]}
    assert 142 * GIB < sizes["auto-round-w3g128", 128] < 151 * GIB
    assert "143-151 GiB, not the 110-120 GB" in run("plan", recipe).out  # the recipe's head comment
    # With --set the head comment, which speaks of the recipe as written, is left out: the planner's own words.
    text = " ".join(run("plan", recipe, "--set", "serve.context=32768").out.split())
    assert "Stock vLLM" not in text
    assert f"{sizes['auto-round-w3g128', 128] / GIB:.1f} GiB" in text
    assert "vllm cannot serve it here: its sparse attention (DSA) has kernels from compute capability 9.0" in text
    assert "the target's compute capability is 8.6" in text
    assert "The fullest device" in text
    assert "With 25% pruned (192 of 256 experts)" in text


@pytest.mark.parametrize("model", ["Qwen/Qwen3.5-35B-A3B", "glm-4.7-flash", "openai/gpt-oss-20b"])
def test_a_recipe_takes_any_model_of_the_catalogue(run: Any, model: str) -> None:
    recipe = ROOT / "recipes" / "qwen3_30b_rtx3090.toml"
    found = run("plan", recipe, "--set", f"model.source={model}", "--json")
    assert found.code == 0, found.err
    assert found.json["plan"]["fits"]
