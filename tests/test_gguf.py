"""From a tiny checkpoint to GGUF and back to log-probabilities, with the real tools."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from reapc.errors import ReapcError
from reapc.quantize.gguf import convert, dry_run_bytes, quantize, write_imatrix
from reapc.toolchain import find_llamacpp
from reapc.verify.gguf_logits import gguf_log_probs

TOKENIZER = Path(__file__).parents[1] / "demo" / "model"
EXPERTS, HIDDEN = 12, 256
tools = find_llamacpp()
pytestmark = pytest.mark.skipif(
    None in (tools.quantize, tools.convert, tools.lib_dir), reason="no llama.cpp: reapc doctor --install"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=HIDDEN, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=2,
        tie_word_embeddings=True, norm_topk_prob=True, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@pytest.fixture(scope="module")
def source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "f32.gguf"
    convert(checkpoint, path, outtype="f32", pre_tokenizer="qwen2")
    return path


@pytest.fixture(scope="module")
def imatrix(source: Path) -> Path:
    """Random second moments for every linear layer; expert 3 saw no token."""
    random = np.random.default_rng(0)
    counts = np.full(EXPERTS, 100.0)
    counts[3] = 0
    entries = {}
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            sums = random.random(HIDDEN) * 500
            entries[f"blk.{layer}.{name}.weight"] = (sums, np.array([500]))
        for name in ("gate", "up", "down"):
            sums = random.random((EXPERTS, 256)) * counts[:, None]
            entries[f"blk.{layer}.ffn_{name}_exps.weight"] = (sums, counts)
    path = source.with_name("imatrix.gguf")
    write_imatrix(path, entries, chunk_count=1, chunk_size=500, datasets=["random"])
    return path


def test_log_probs_agree_with_transformers(checkpoint: Path, source: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 2048, (2, 300), dtype=np.int32)
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.log_softmax(-1).numpy()
    found = np.stack(list(gguf_log_probs(source, ids, threads=2, vocab_size=2048)))
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).mean() < 0.01
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.99
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-4)


def test_padding_is_not_computed(source: Path) -> None:
    ids = np.arange(20, dtype=np.int32).reshape(2, 10)
    mask = np.ones((2, 10), dtype=np.int64)
    mask[0, 6:] = 0
    rows = list(gguf_log_probs(source, ids, mask, threads=1))
    assert np.isnan(rows[0][6:]).all()
    assert np.isfinite(rows[0][:6]).all()
    assert np.isfinite(rows[1]).all()
    with pytest.raises(ReapcError, match="mask the end"):
        gguf_log_probs(source, ids, 1 - mask)


def test_worker_failures_say_why(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(ReapcError, match="could not load"):
        list(gguf_log_probs(broken, np.zeros((1, 4), dtype=np.int32)))
    with pytest.raises(ReapcError, match="vocabulary of 2048"):
        list(gguf_log_probs(source, np.full((1, 4), 5000, dtype=np.int32)))
    with pytest.raises(ReapcError, match="expected 7"):
        list(gguf_log_probs(source, np.zeros((1, 4), dtype=np.int32), vocab_size=7))


@pytest.mark.parametrize("ftype", ["Q8_0", "Q4_K_M", "IQ2_XS"])
def test_quantize_gives_the_predicted_bytes(source: Path, imatrix: Path, tmp_path: Path, ftype: str) -> None:
    matrix = imatrix if ftype.startswith("IQ") else None
    out = tmp_path / f"{ftype}.gguf"
    quantize(source, out, ftype, matrix, threads=2)
    reader = gguf.GGUFReader(out)
    assert sum(int(tensor.n_bytes) for tensor in reader.tensors) == dry_run_bytes(source, ftype, matrix)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if matrix:
        stored = reader.get_field("quantize.imatrix.file")
        assert stored is not None
        assert stored.contents() == "imatrix.gguf"
    (rows,) = gguf_log_probs(out, np.arange(8, dtype=np.int32)[None], threads=1)
    assert np.isfinite(rows).all()


def test_quantizing_without_the_matrix_says_so(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match="importance matrix"):
        quantize(source, tmp_path / "x.gguf", "IQ2_XS", threads=1)
    assert not list(tmp_path.iterdir())


def test_unknown_pre_tokenizer_names_the_recipe_key(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match=r"hash [0-9a-f]{64}(.|\n)*quantize\.pre_tokenizer") as caught:
        convert(checkpoint, tmp_path / "x.gguf")
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_imatrix_file_is_what_llama_imatrix_writes(imatrix: Path) -> None:
    reader = gguf.GGUFReader(imatrix)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down_exps.weight.in_sum2"] == [256, EXPERTS]
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == [1, EXPERTS]
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [HIDDEN, 1] or shapes["blk.0.attn_q.weight.in_sum2"] == [HIDDEN]
    assert reader.get_field("general.architecture") is None


def test_imatrix_refuses_what_the_quantizer_would(tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match="not finite"):
        write_imatrix(tmp_path / "x", {"a.weight": (np.array([np.nan]), np.array([1]))}, 1, 1, ["random"])
    with pytest.raises(ReapcError, match="2 rows"):
        write_imatrix(tmp_path / "x", {"a.weight": (np.ones((2, 4)), np.ones(3))}, 1, 1, ["random"])
