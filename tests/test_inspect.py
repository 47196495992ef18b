"""``reapc inspect``: published totals, the contract of its JSON, GGUF files, and wrong requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_model
from test_fit import Run, run  # noqa: F401  (a fixture)

from reapc.arch import known
from reapc.quantize.gguf import convert

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


def test_names_win_in_any_case_and_paths_first(inspect: Any, tmp_path: Path) -> None:
    assert inspect("GLM-5")["model"] == inspect("zai-org/glm-5")["model"] == "zai-org/GLM-5"
    shutil.copy(ROOT / "tests" / "data" / "Qwen__Qwen3-30B-A3B.json", tmp_path / "config.json")
    for text in (tmp_path, tmp_path / "config.json"):
        assert inspect(text)["parameters"]["total"] == 30_532_122_624


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("glm",), 2, "matches several models"),
        (("glm-5x",), 2, "did you mean"),
        (("./nowhere",), 2, "no such folder or file"),
        (("nowhere.gguf",), 2, "no such folder or file"),
        (("glm-5", "--experts", "4"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "0"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "-1"), 2, "every token is sent to 8"),
        (("glm-5", "--experts", "300"), 2, "the model has 256 experts"),
        (("deepseek-v3", "--experts", "100"), 2, "8 groups"),
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
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert "no experts to prune" in run("inspect", tmp_path).err
    (tmp_path / "config.json").write_text("{")
    assert "not readable as JSON" in run("inspect", tmp_path).err


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and the GGUF that llama.cpp's converter makes of it."""
    folder = make_model(
        tmp_path_factory.mktemp("inspect"), vocab_size=2048, tie_word_embeddings=False, mlp_only_layers=[]
    )
    for path in (ROOT / "demo" / "model").glob("*token*"):
        shutil.copy(path, folder)
    out = folder.parent / "model.gguf"
    convert(folder, out, "bf16", "qwen2")
    return folder, out


def test_a_gguf_says_the_same_as_its_checkpoint(inspect: Any, run: Any, pair: tuple[Path, Path]) -> None:  # noqa: F811
    folder, gguf = pair
    ours, theirs = inspect(folder, "--format", "BF16"), inspect(gguf)
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["weights"] == {
        **ours["weights"],
        "bits_per_weight": pytest.approx(ours["weights"]["bits_per_weight"]),
    }
    assert theirs["kv"]["bytes_per_token"] == ours["kv"]["bytes_per_token"]
    assert {k: theirs["experts"][k] for k in ("count", "kept", "top_k", "moe_layers")} == {
        k: ours["experts"][k] for k in ("count", "kept", "top_k", "moe_layers")
    }
    refused = run("inspect", gguf, "--experts", 4)
    assert refused.code == 2
    assert "shown as it is" in refused.err


def test_a_truncated_gguf(run: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    for size in (0, 10, 1000):
        path = tmp_path / f"cut{size}.gguf"
        path.write_bytes(pair[1].read_bytes()[:size])
        found = run("inspect", path)
        assert found.code == 2, found.err
        assert "not a readable GGUF" in found.err
    missing = tmp_path / "m-00001-of-00002.gguf"
    missing.write_bytes(pair[1].read_bytes())
    assert "m-00002-of-00002.gguf: this part" in run("inspect", missing).err


def test_tables_fit_100_columns_and_nothing_heavy_is_imported(run: Any) -> None:  # noqa: F811
    assert max(map(len, run("inspect", "glm-5").out.splitlines())) <= 100
    code = (
        "import sys\nfrom reapc.cli.main import main\ntry:\n    main(['inspect', 'glm-5', '--json'])\n"
        "except SystemExit:\n    pass\nheavy = {'torch', 'transformers', 'numpy', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
