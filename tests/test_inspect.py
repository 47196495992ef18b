"""``reapc inspect``: published totals, the contract of its JSON, names and wrong requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_fit import Run, run  # noqa: F401  (a fixture)

from reapc.arch import known

PARTS = (
    "routed_experts", "shared_experts", "attention", "dense_mlp", "router", "embedding", "lm_head", "norm", "other",
)  # fmt: skip


@pytest.fixture
def inspect(run: Any) -> Any:  # noqa: F811
    def ask(*arguments: object) -> dict[str, Any]:
        found: Run = run("inspect", *arguments, "--json")
        assert found.code == 0, found.err
        data: dict[str, Any] = found.json
        return data

    return ask


@pytest.mark.parametrize("name", known.names())
def test_the_parts_add_up(name: str, inspect: Any) -> None:
    data = inspect(name)
    counts = data["parameters"]
    assert sum(counts[part] for part in PARTS) == counts["total"]
    assert counts["on_disk"] == counts["total"] + counts["mtp"] + counts["vision"]
    assert counts["active"] < counts["total"]
    assert set(data["experts"]) >= {"count", "kept", "top_k", "shared", "groups", "moe_layers"}
    assert data["experts"]["kept"] == data["experts"]["count"]
    assert set(data["weights"]) >= {"format", "bytes", "bits_per_weight"}
    assert set(data["kv"]) >= {"kind", "bytes_per_token", "bytes", "state_bytes_per_sequence"}


@pytest.mark.parametrize(
    ("name", "total", "on_disk"),
    [
        ("glm-5", 743.9e9, 753.864e9),  # facts/llamacpp-quantize-rules.md: 753.86B with MTP
        ("deepseek-v3", 671.03e9, 684.49e9),
        ("qwen3-30b-a3b", 30_532_122_624, 30_532_122_624),
        ("kimi-linear", 49_122_681_728, 49_122_681_728),
        ("gpt-oss-120b", 116_829_156_672, 116_829_156_672),
        ("kimi-k2-instruct", 1.0264e12, 1.0264e12),
    ],
)
def test_published_totals(name: str, total: float, on_disk: float, inspect: Any) -> None:
    counts = inspect(name)["parameters"]
    assert counts["total"] == pytest.approx(total, rel=1e-4)
    assert counts["on_disk"] == pytest.approx(on_disk, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "total_size"),
    [
        ("gpt-oss-20b", 13_761_264_768),  # model.safetensors.index.json
        ("gpt-oss-120b", 65_248_815_744),
    ],
)
def test_published_bytes(name: str, total_size: int, inspect: Any) -> None:
    assert inspect(name)["weights"]["bytes"] == total_size


def test_deepseek_v3_bytes_are_its_files_without_their_headers(inspect: Any) -> None:
    """688,586,727,753 bytes in 163 files; a tensor takes about 130 bytes of header. 62 layers: 3 dense with 10 linears,
    59 with 5 + 3 * 257; each linear has a weight and a scale."""
    headers = 688_586_727_753 - inspect("deepseek-v3", "--mtp", "keep")["weights"]["bytes"]
    tensors = 2 * (3 * 8 + 59 * (5 + 3 * 257))
    assert 110 < headers / tensors < 150


def test_kv_caches_by_hand(inspect: Any) -> None:
    """llmfit says 53 GiB for the first one (issue 3); 61 * 576 * 2 * 32768 bytes are 2.1."""
    kv = inspect("deepseek-v3", "--context", 32768)["kv"]
    assert (kv["kind"], kv["bytes"]) == ("mla", 61 * 576 * 2 * 32768)
    assert inspect("glm-5")["kv"]["bytes_per_token"] == 109_824
    assert inspect("glm-5.2")["kv"]["bytes_per_token"] == (78 * 576 + 21 * 128) * 2
    assert inspect("glm-5", "--kv-dtype", "q8_0")["kv"]["bytes_per_token"] == 109_824 * 17 // 32
    assert inspect("glm-5", "--kv-dtype", "fp8")["kv"]["bytes_per_token"] == 109_824 // 2
    assert inspect("qwen3-30b-a3b")["kv"]["bytes_per_token"] == 48 * 2 * 4 * 128 * 2
    following = inspect("qwen3-next-80b-a3b-instruct", "--context", 1000)["kv"]
    assert following["bytes"] == 12 * 2 * 2 * 256 * 2 * 1000  # full attention on one layer in four
    # 36 layers: 3 past tokens of q, k and v (2 * 16 * 128 + 32 * 128), 32 states of 128 x 128, float32
    assert following["state_bytes_per_sequence"] == 36 * 4 * (3 * 8192 + 32 * 128 * 128)
    sliding = inspect("gpt-oss-120b", "--context", 10_000)["kv"]
    assert sliding["bytes"] == 18 * 2 * 8 * 64 * 2 * (10_000 + 128)


def test_formats_cover_every_linear_and_experts_only_the_experts(inspect: Any) -> None:
    """Qwen3-30B in int8-per-channel: a byte a weight and a 16 bit scale a row, the rest in 16 bit; by hand."""
    counts = inspect("qwen3-30b-a3b")["parameters"]
    rows = 48 * (128 * (768 + 768 + 2048))
    kept = 2 * (counts["total"] - counts["routed_experts"])
    experts_only = inspect("qwen3-30b-a3b", "--format", "int8:experts")["weights"]
    assert experts_only["bytes"] == counts["routed_experts"] + 2 * rows + kept
    everything = inspect("qwen3-30b-a3b", "--format", "int8")["weights"]
    attention_rows = 48 * (4096 + 512 + 512 + 2048)
    assert everything["bytes"] == experts_only["bytes"] - counts["attention"] + 2 * attention_rows
    half = inspect("qwen3-30b-a3b", "--experts", 64, "--format", "int8:experts")
    assert half["experts"] == {**half["experts"], "count": 128, "kept": 64}
    router = counts["router"] // 2
    assert half["weights"]["bytes"] == (counts["routed_experts"] + 2 * rows) // 2 + kept - 2 * router


def test_mtp_is_dropped_unless_kept_and_pruned_alike(inspect: Any) -> None:
    drop, keep = (inspect("glm-5", "--format", "bf16", "--mtp", how) for how in ("drop", "keep"))
    assert keep["weights"]["bytes"] - drop["weights"]["bytes"] == pytest.approx(2 * 9_952_920_576, abs=2000)
    pruned = [inspect("glm-5", "--format", "bf16", "--mtp", how, "--experts", 128) for how in ("drop", "keep")]
    one_expert = 3 * 6144 * 2048
    halved = 9_952_920_576 - 128 * (one_expert + 6144 + 1)
    assert pruned[1]["weights"]["bytes"] - pruned[0]["weights"]["bytes"] == pytest.approx(2 * halved, abs=2000)
    assert inspect("qwen3-30b-a3b", "--mtp", "keep")["parameters"]["mtp"] == 0


def test_the_published_format_is_the_default(inspect: Any) -> None:
    assert inspect("glm-5-fp8")["weights"]["format"] == "fp8-block"
    assert inspect("gpt-oss-20b")["weights"]["format"] == "mxfp4:experts"
    assert inspect("kimi-k2.5")["weights"]["format"] == "ct-w4g32:experts"
    assert inspect("glm-5")["weights"]["format"] == "bf16"
    assert inspect("glm-4.5-fp8")["weights"]["format"] == "fp8"  # compressed-tensors, a scale for each channel
    flash = inspect("deepseek-v4-flash")
    assert flash["weights"]["format"] == "fp8-block"
    assert "4-bit experts" in flash["notes"][0]
    assert inspect("deepseek-v3")["notes"] == []


PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "strategy": "group"}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected", "noted"),
    [
        ("float16", None, "fp16", ""),
        ("float32", None, "bf16", "published in float32"),
        ("bfloat16", {"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq-w4g128", ""),
        ("bfloat16", {"quant_method": "auto-round", "bits": 3, "group_size": 64}, "auto-round-w3g64", ""),
        ("bfloat16", {"quant_method": "gptq", "bits": 5, "group_size": 128}, "bf16", "'gptq'"),
        ("bfloat16", {"quant_method": "awq", "bits": 4, "group_size": 128}, "bf16", "'awq'"),
        ("bfloat16", {"quant_method": "fp8"}, "fp8", ""),
        ("bfloat16", PACKED, "ct-w4g128", ""),
        ("bfloat16", PACKED | {"ignore": ["re:.*self_attn.*"]}, "ct-w4g128:experts", ""),
        ("bfloat16", {"quant_method": "compressed-tensors"}, "bf16", "'compressed-tensors'"),
    ],
)
def test_published_formats(
    dtype: str, quantization: Any, expected: str, noted: str, inspect: Any, tmp_path: Path
) -> None:
    config = json.loads((ROOT / "tests" / "data" / "Qwen__Qwen3-30B-A3B.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"torch_dtype": dtype, "quantization_config": quantization})
    )
    data = inspect(tmp_path)
    assert data["weights"]["format"] == expected
    assert len(data["notes"]) == bool(noted)
    assert noted in "".join(data["notes"])


def test_vision_is_in_the_checkpoint_and_in_another_gguf(inspect: Any) -> None:
    counts = inspect("qwen3-vl-30b")["parameters"]
    assert counts["vision"] > 4e8
    assert counts["on_disk"] == counts["total"] + counts["vision"]
    safetensors, gguf = (inspect("qwen3-vl-30b", "--format", fmt) for fmt in ("bf16", "BF16"))
    assert safetensors["weights"]["vision_bytes"] == 2 * counts["vision"]
    assert safetensors["weights"]["bytes"] == 2 * (counts["total"] + counts["vision"])
    assert gguf["weights"]["vision_bytes"] == 0
    assert gguf["weights"]["bytes"] < safetensors["weights"]["bytes"] - 2 * counts["vision"] + 2e8  # some in float32
    assert "mmproj" in gguf["notes"][0]


def test_block_types_round_up_to_whole_bytes(inspect: Any) -> None:
    """DeepSeek-V4's compressed entries add a fraction of a byte per token; a sequence is whole bytes."""
    kv = inspect("deepseek-v4-flash", "--kv-dtype", "q4_0", "--context", 1001)["kv"]
    assert isinstance(kv["bytes"], int)
    assert inspect("gpt-oss-20b", "--kv-dtype", "q4_0")["kv"]["bytes_per_token"] == 12 * 2 * 8 * 64 * 18 // 32


def test_names_win_in_any_case_and_paths_first(inspect: Any, tmp_path: Path) -> None:
    assert inspect("GLM-5")["model"] == inspect("zai-org/glm-5")["model"] == "zai-org/GLM-5"
    shutil.copy(ROOT / "tests" / "data" / "Qwen__Qwen3-30B-A3B.json", tmp_path / "config.json")
    for text in (tmp_path, tmp_path / "config.json"):
        assert inspect(text)["parameters"]["total"] == 30_532_122_624


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("glm",), 2, "matches several models"),
        (("glm-5x",), 2, "did you mean zai-org/GLM-5"),
        (("",), 2, "no model ''"),
        (("x" * 5000,), 2, "no model"),
        (("~nobody-of-this-name/model",), 2, "no such folder or file"),
        (("./nowhere",), 2, "no such folder or file"),
        (("nowhere.gguf",), 2, "no such folder or file"),
        (("glm-5", "--experts", "4"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "0"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "-1"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "300"), 2, "the model has 256 experts"),
        (("deepseek-v3", "--experts", "100"), 2, "8 groups"),
        (("deepseek-v3", "--experts", "2"), 2, "8 to 256 experts can be kept in steps of 8"),
        (("glm-5", "--format", "Q4_KM"), 2, "did you mean 'Q4_K_M'"),
        (("glm-5", "--format", "bf16:experts"), 2, "nothing to limit"),
        (("gpt-oss-20b", "--format", "gptq-w4g128"), 1, "do not divide into groups of 128"),
        (("olmoe", "--context", "100000"), 2, "knows 4096 positions"),
        (("glm-5", "--context", "0"), 2, "0"),
        (("glm-5", "--kv-dtype", "q5_0"), 2, "q5_0"),
        (("glm-5", "--mtp", "maybe"), 2, "maybe"),
    ],
)
def test_wrong_requests(run: Any, arguments: tuple[str, ...], code: int, message: str) -> None:  # noqa: F811
    found = run("inspect", *arguments)
    assert (found.code, message in found.err) == (code, True), found.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"hidden_size": None}, 2, "key 'hidden_size' is missing"),
        ({"hidden_size": "big"}, 2, "hidden_size = 'big'"),
        ({"num_hidden_layers": 0}, 2, "num_hidden_layers = 0"),
        ({"num_experts_per_tok": 300}, 2, "num_experts_per_tok = 300 with 128 experts"),
        ({"model_type": "llama"}, 1, "not supported yet"),
    ],
)
def test_broken_configs(run: Any, tmp_path: Path, change: dict[str, Any], code: int, message: str) -> None:  # noqa: F811
    config = json.loads((ROOT / "tests" / "data" / "Qwen__Qwen3-30B-A3B.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    found = run("inspect", tmp_path)
    assert (found.code, message in found.err) == (code, True), found.err


def test_a_dense_model_and_broken_json(run: Any, tmp_path: Path) -> None:  # noqa: F811
    for text, code, message in (
        ('{"model_type": "llama", "hidden_size": 64}', 1, "no experts to prune"),
        ("{", 2, "not readable as JSON"),
        ("[]", 2, "a JSON object is expected"),
    ):
        (tmp_path / "config.json").write_text(text)
        found = run("inspect", tmp_path)
        assert (found.code, message in found.err) == (code, True), found.err


def test_tables_fit_100_columns_and_nothing_heavy_is_imported(run: Any) -> None:  # noqa: F811
    assert max(map(len, run("inspect", "glm-5").out.splitlines())) <= 100
    code = (
        "import sys\nfrom reapc.cli.main import main\ntry:\n    main(['inspect', 'glm-5', '--json'])\n"
        "except SystemExit:\n    pass\nheavy = {'torch', 'transformers', 'numpy', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
