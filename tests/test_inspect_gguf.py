"""``reapc inspect`` of GGUF files: against the checkpoint's numbers, the gguf package, and what is damaged.

The files are the real converter's: whole ones of a tiny model, and headers of real models (``fit_params``).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ROOT, make_model
from fit_params import published, write_models
from gguf_files import write_sparse
from test_inspect import inspect, run  # noqa: F401  (fixtures)

from reapc.arch import known
from reapc.checkpoint import gguf_header, gguf_model
from reapc.checkpoint.gguf_header import read_header
from reapc.quantize.gguf import convert
from reapc.toolchain import find_llamacpp

pytestmark = pytest.mark.skipif(find_llamacpp().convert is None, reason="no llama.cpp: reapc doctor --install")

FAMILIES = (
    "deepseek-v3", "deepseek-v3.2", "gemma-4-26b", "glm-4.5-air", "glm-5.2", "gpt-oss-20b", "granite-3.1-3b",
    "kimi-linear", "llama-4-scout", "minimax-m2", "minimax-m3", "mixtral-8x7b", "nemotron-3-nano", "phi-3.5-moe",
    "qwen3-next-80b-a3b-instruct", "qwen3.5-35b", "step-3.7",
)  # fmt: skip


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


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Headers of real models with the real converter's metadata."""
    models = {}
    for text in FAMILIES:
        name = known.find(text) or ""
        spec = known.spec(name)
        models[name] = (spec, published(name, spec), "BF16")
    return write_models(tmp_path_factory.mktemp("headers"), models)


def test_a_gguf_says_the_same_as_its_checkpoint(inspect: Any, run: Any, pair: tuple[Path, Path]) -> None:  # noqa: F811
    folder, file = pair
    ours, theirs = inspect(folder, "--format", "BF16"), inspect(file)
    assert theirs.keys() >= ours.keys()
    for key in ("parameters", "experts", "weights", "kv", "layers", "max_context"):
        assert theirs[key] == ours[key]
    assert theirs["model"] == str(file)
    for option in (("--experts", 4), ("--format", "bf16")):
        refused = run("inspect", file, *option)
        assert refused.code == 2
        assert "shown as it is" in refused.err
        assert "name the model that it was made of" in refused.err
    refused = run("inspect", file, "--context", 513)
    assert (refused.code, "knows 512 positions" in refused.err) == (2, True)
    assert inspect(file, "--context", 100)["kv"]["bytes"] == 3 * 2 * 2 * 16 * 2 * 100
    assert max(map(len, run("inspect", file).out.splitlines())) <= 100


@pytest.mark.parametrize("text", FAMILIES)
def test_headers_of_real_models(text: str, inspect: Any, headers: dict[str, Path]) -> None:  # noqa: F811
    name = known.find(text) or ""
    ours, theirs = inspect(name, "--format", "BF16", "--context", 4096), inspect(headers[name], "--context", 4096)
    expected = ours["parameters"] | {"mtp": 0, "vision": 0, "on_disk": ours["parameters"]["total"]}
    assert theirs["parameters"] == expected
    assert theirs["experts"] == ours["experts"]
    assert theirs["kv"] == ours["kv"]
    assert (theirs["weights"]["format"], theirs["weights"]["bytes"]) == ("BF16", ours["weights"]["bytes"])


def test_mtp_layers_stand_beside_the_total(inspect: Any, tmp_path: Path) -> None:  # noqa: F811
    spec, path = known.spec("zai-org/GLM-4.5-Air"), tmp_path / "air.gguf"
    write_sparse(path, spec, known.config("zai-org/GLM-4.5-Air"), mtp=True)
    data = inspect(path)
    assert data["parameters"]["total"] == spec.parameters
    assert data["parameters"]["mtp"] > 128 * 3 * 4096 * 1408  # its experts
    assert data["layers"] == 46
    assert data["experts"]["moe_layers"] == 45
    assert "MTP" in data["notes"][0]


def test_an_unknown_cache_is_said_and_not_guessed(inspect: Any, run: Any, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "v4.gguf"
    spec = known.spec("deepseek-ai/DeepSeek-V4-Flash")
    write_sparse(path, spec, known.config("deepseek-ai/DeepSeek-V4-Flash"))
    data = inspect(path)
    assert data["parameters"]["routed_experts"] == 43 * 256 * 3 * 4096 * 2048
    assert {data["kv"][key] for key in ("kind", "bytes_per_token", "bytes", "state_bytes_per_sequence")} == {None}
    assert "deepseek4" in data["notes"][0]
    assert "deepseek4 is not read" in run("inspect", path).out


def write(path: Path, arch: str = "qwen3moe", split: int = 0, **options: Any) -> Path:
    """A small file of the gguf package's, with a vocabulary; ``options`` change or (None) leave out metadata."""
    endian = options.pop("endian", gguf.GGUFEndian.LITTLE)
    writer = gguf.GGUFWriter(path, arch, endianess=endian, split_max_tensors=split)
    numbers = {
        "block_count": 1, "expert_count": 4, "expert_used_count": 2, "context_length": 64, "embedding_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1,
    }  # fmt: skip
    for key, value in (numbers | options).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_file_type(15)
    writer.add_token_list([f"word {i}" for i in range(9000)])
    writer.add_token_types([1] * 9000)
    writer.add_float32("general.some_float", 0.5)
    writer.add_bool("general.some_bool", True)
    writer.add_tensor("token_embd.weight", np.ones((9000, 32), np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((16, 32), np.float16))
    for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps"):
        blocks = np.zeros((4, 32, 34), np.uint8)
        writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = write(tmp_path / "small.gguf", endian=endian)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.type, t.data_bytes) for t in ours.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, int(t.n_bytes)) for t in theirs.tensors
    ]
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    for vocabulary in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        assert len(fields[vocabulary]) == 9000
        fields[vocabulary] = None
    assert ours.fields == fields


def test_the_tables_are_those_of_the_gguf_package() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert gguf_header._TYPE_NAMES[kind] == kind.name
        assert gguf_header._SIZES[kind.name] == gguf.GGML_QUANT_SIZES[kind]
    for ftype in gguf.LlamaFileType:
        if ftype != gguf.LlamaFileType.GUESSED:
            name = ftype.name.removeprefix("MOSTLY_").removeprefix("ALL_")
            assert gguf_model._FILE_TYPES[ftype] == name


def test_all_parts_of_a_split_file_are_read(inspect: Any, run: Any, tmp_path: Path) -> None:  # noqa: F811
    whole = inspect(write(tmp_path / "whole.gguf"))
    write(tmp_path / "cut.gguf", split=3)
    parts = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(parts) == 3
    for part in parts:
        found = inspect(part)
        assert {**found, "model": whole["model"], "parts": 1} == whole
        assert found["parts"] == 3
    assert whole["weights"]["format"] == "Q4_K_M"
    assert whole["weights"]["bytes"] == 9000 * 32 * 4 + 4 * 16 * 32 * 2 + 3 * 4 * 32 * 34
    parts[1].unlink()
    found = run("inspect", parts[0])
    assert (found.code, f"{parts[1].name}: this part" in found.err) == (2, True)
    shutil.copy(parts[0], parts[1])
    found = run("inspect", parts[0])
    assert (found.code, "8 different ones are expected" in found.err) == (2, True), found.err


@pytest.mark.parametrize("size", [0, 3, 10, 40, 1000, 100_000, -1])
def test_a_truncated_gguf(run: Any, pair: tuple[Path, Path], tmp_path: Path, size: int) -> None:  # noqa: F811
    path = tmp_path / "cut.gguf"
    path.write_bytes(pair[1].read_bytes()[:size])
    found = run("inspect", path)
    assert found.code == 2, found.err
    assert "cut.gguf: cut short" in found.err or "cut.gguf: not a readable GGUF" in found.err


def test_random_damage_is_never_a_traceback(tmp_path: Path, run: Any) -> None:  # noqa: F811
    whole = write(tmp_path / "whole.gguf").read_bytes()
    random, path = np.random.default_rng(0), tmp_path / "bad.gguf"
    codes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for place in random.integers(4, 1200, 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        codes.add(run("inspect", path, "--json").code)
    assert codes <= {0, 1, 2}
    assert 2 in codes


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"expert_count": None}, 1, "no experts to prune"),
        ({"expert_count": 0}, 1, "no experts to prune"),
        ({"expert_count": 8}, 2, "has 4 experts, and qwen3moe.expert_count = 8"),
        ({"expert_used_count": None}, 2, "'qwen3moe.expert_used_count' is missing"),
        ({"expert_used_count": 5}, 2, "expert_used_count = 5: 1 to 4"),
        ({"block_count": None}, 2, "'qwen3moe.block_count' is missing"),
        ({"block_count": 0}, 2, "block_count = 0"),
        ({"context_length": None}, 2, "'qwen3moe.context_length' is missing"),
        ({"attention.head_count": 0}, 2, "attention.head_count"),
        ({"arch": "clip"}, 2, "no language model"),
    ],
)
def test_metadata_that_cannot_be(
    options: dict[str, Any],
    code: int,
    message: str,
    run: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    found = run("inspect", write(tmp_path / "m.gguf", **options))
    assert (found.code, message in found.err) == (code, True), found.err


def test_a_folder_of_ggufs_names_them(run: Any, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "m.gguf")
    found = run("inspect", tmp_path)
    assert (found.code, "m.gguf" in found.err) == (2, True)
