"""Allocations with the real tools: ggml's rounding through ctypes, types and bytes of the file that llama-quantize
writes, probes measured in llama.cpp, and the commands."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import quants
from test_gguf import TOKENIZER, tools
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from reapc.allocate.allocation import (
    Measurement,
    budget_bytes,
    correction,
    decide,
    measured,
    prior_only,
    prober_of,
    stored_types,
)
from reapc.allocate.record import check_allocation, read_allocation
from reapc.allocate.rounding import measure_errors
from reapc.checkpoint.reader import Checkpoint
from reapc.cli.main import cli
from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.observe import observe
from reapc.observe.scores import Scores
from reapc.planner.tensor_groups import LADDER, WEIGHTED
from reapc.progress import Silent
from reapc.quantize.ggml import quantized, rounded
from reapc.quantize.gguf import check_types, convert, quantize, type_patterns
from reapc.quantize.imatrix import entries_of, kept_entries, write_from_scores
from reapc.stream.tokens import Tokens, write_tokens

pytestmark = pytest.mark.skipif(
    None in (tools.quantize, tools.convert, tools.lib_dir), reason="no llama.cpp: reapc doctor --install"
)
COUNTS = (8 - 1, 6, 5, 4)  # of 7 experts: 8 has rules of its own


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model whose down rows (128) take fallback types."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=7, num_experts_per_tok=2,
        tie_word_embeddings=True, norm_topk_prob=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokens]:
    ids = np.random.default_rng(0).integers(3, 2048, (4, 40)).astype(np.int32)
    made = Tokens(ids, np.ones_like(ids, dtype=bool), np.zeros(4, np.int64), ("all",), "random")
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    write_tokens(path, made)
    return path, made


@pytest.fixture(scope="module")
def base(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    convert(checkpoint.folder, path, "bf16", "qwen2")
    return path


@pytest.fixture(scope="module")
def scores(checkpoint: Checkpoint, tokens: tuple[Path, Tokens], tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return observe(checkpoint, tokens[1], tmp_path_factory.mktemp("observe") / "work", Silent())


def test_rounding_is_that_of_ggml_and_its_decoding() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)
    for kind in ("Q8_0", "Q4_0"):  # whose rounding gguf-py has too
        number = gguf.GGMLQuantizationType[kind]
        np.testing.assert_array_equal(quantized(rows, kind), quants.quantize(rows, number))
    weights = np.random.default_rng(1).random(512).astype(np.float32)
    errors = [float(np.square(rows - rounded(rows, kind, weights)).mean()) for kind in LADDER]
    assert 0 < errors[0] < 1e-4
    assert errors[-1] < 0.4
    by_bits = {kind: error for kind, error in zip(LADDER, errors, strict=True)}
    assert by_bits["Q8_0"] < by_bits["Q6_K"] < by_bits["Q5_K"] < by_bits["Q4_K"] < by_bits["Q3_K"] < by_bits["Q2_K"]
    # weighing columns makes the weighted error smaller
    heavy = np.where(np.arange(512) % 8 == 0, 100, 0.1).astype(np.float32)
    plain, weighed = rounded(rows, "Q2_K"), rounded(rows, "Q2_K", heavy)
    assert (np.square(rows - weighed) @ heavy).sum() < (np.square(rows - plain) @ heavy).sum()


def test_rounding_refuses_what_ggml_would_abort_at() -> None:
    rows = np.zeros((2, 256), np.float32)
    with pytest.raises(ReapcError, match="IQ2_XXS cannot be written without an importance matrix"):
        quantized(rows, "IQ2_XXS")
    with pytest.raises(ReapcError, match="Q4_K has blocks of 256"):
        quantized(rows[:, :128], "Q4_K")
    with pytest.raises(ReapcError, match="weights for rows"):
        quantized(rows, "Q4_K", np.ones(5, np.float32))


def random_choice(checkpoint: Checkpoint, seed: int) -> tuple[dict[str, str], dict[str, str], int]:
    """Types by group and by tensor, and the predicted bytes of the tensor data."""
    parts = prior_only(checkpoint.spec, COUNTS).parts
    random = np.random.default_rng(seed)
    groups = {group.name: str(random.choice(group.types)) for group in parts.groups}
    types = {name: kind for group in parts.groups for name, kind in group.stored(groups[group.name]).items()}
    return groups, types, parts.bytes_of(groups, checkpoint.spec.num_experts)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_file_has_the_types_and_the_bytes(
    checkpoint: Checkpoint, tokens: tuple[Path, Tokens], base: Path, scores: Scores, tmp_path: Path, seed: int
) -> None:
    groups, types, predicted = random_choice(checkpoint, seed)
    matrix = tmp_path / "imatrix.gguf"
    write_from_scores(matrix, scores, tokens[1], checkpoint.spec)
    quantize(base, tmp_path / "mix.gguf", "Q8_0", matrix, threads=1, types=types)
    reader = gguf.GGUFReader(str(tmp_path / "mix.gguf"))
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name: found[name] for name in types} == types
    assert {kind for name, kind in found.items() if name not in types} == {"F32"}
    assert (tmp_path / "mix.gguf").stat().st_size == reader.data_offset + predicted
    assert len(set(groups.values())) > 3
    down = types["blk.0.ffn_down_exps.weight"]  # rows of 128: no block of 256
    assert down in ("Q8_0", "Q5_1", "Q5_0", "Q4_0", "IQ4_NL")
    with pytest.raises(CannotBeDone, match=r"token_embd\.weight is"):
        check_types(tmp_path / "mix.gguf", {"token_embd.weight": "F16"})


def test_names_are_not_taken_for_patterns() -> None:
    assert type_patterns({"blk.1.attn_q.weight": "Q4_K"}) == "^blk\\.1\\.attn_q\\.weight$=q4_k\n"
    with pytest.raises(ReapcError, match="without spaces"):
        type_patterns({"a=b": "Q4_K"})


def test_errors_are_those_of_the_file(
    checkpoint: Checkpoint, tokens: tuple[Path, Tokens], base: Path, scores: Scores, tmp_path: Path
) -> None:
    """The relative error of an expert's matrix, computed from what llama-quantize wrote."""
    entries, types = entries_of(scores, checkpoint.spec), ("Q4_K", "IQ3_XXS")
    parts = prior_only(checkpoint.spec, COUNTS, types).parts
    errors = measure_errors(base, parts, scores, entries, types, Silent(), sample_rows=10_000)
    matrix = tmp_path / "imatrix.gguf"
    write_from_scores(matrix, scores, tokens[1], checkpoint.spec)
    name = "blk.1.ffn_gate_exps.weight"
    quantize(base, tmp_path / "mix.gguf", "Q8_0", matrix, threads=1, types={name: "IQ3_XXS"})
    before, after = (
        next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == name) for path in (base, tmp_path / "mix.gguf")
    )
    w, q = (quants.dequantize(np.array(t.data), t.tensor_type).astype(np.float64) for t in (before, after))
    sums, counts = entries[name]
    moments = sums / np.maximum(counts, 1)[:, None]
    for expert in np.flatnonzero(counts):
        expected = (np.square(w - q)[expert] @ moments[expert]).sum() / (np.square(w[expert]) @ moments[expert]).sum()
        assert errors["blk.1.ffn_gate_exps"].errors["IQ3_XXS"][expert] == pytest.approx(expected, rel=1e-3)
    assert errors["blk.1.ffn_gate_exps"].weights.sum() == pytest.approx(1)


def test_measured_choice(
    checkpoint: Checkpoint, tokens: tuple[Path, Tokens], base: Path, scores: Scores, tmp_path: Path
) -> None:
    """Probes, the choice, and its own measurements, once; the second time nothing is computed."""
    prober = prober_of(base, tokens[0], 2, scores, checkpoint.spec, tmp_path, Silent(), 1)
    types = ("Q8_0", "Q4_K", "Q2_K")
    damages = measured(checkpoint.spec, base, scores, COUNTS, "reap", Silent(), prober=prober, types=types)
    assert damages.source == "measured"
    assert damages.pruning[0] == 0
    assert damages.pruning[1] <= damages.pruning[2] <= damages.pruning[3]
    assert {probe.name for probe in damages.probes} >= {"attention in Q2_K", "4 of 7 experts"}
    assert all(probe.kl > 0 for probe in damages.probes)
    budget = budget_bytes("4.0bpw", checkpoint.spec, damages.parts)
    found, taken, measurements = decide(damages, budget, prober)
    assert 2 <= len(measurements) <= 3
    assert taken.experts == min(measurements, key=lambda m: m.kl).experts
    assert found.lower_bound <= found.best.damage
    stored = stored_types(damages, taken)
    sizes = {group.name: types[option] for group, option in zip(damages.parts.groups, taken.options, strict=True)}
    assert damages.parts.bytes_of(sizes, taken.experts) <= budget
    assert not set(stored.values()) & WEIGHTED
    prober.tokens = prober.tokens.take(np.array([0]), 1)  # would change every number
    again = decide(damages, budget, prober)
    assert again[2] == measurements


def test_correction_brings_predictions_to_measurements() -> None:
    both = [Measurement(7, 0.2, 0.0, 0.3), Measurement(5, 0.05, 0.1, 0.275)]
    rounding, pruning = correction(both)
    assert rounding == pytest.approx(1.5, rel=0.05)
    assert pruning == pytest.approx(2.0, rel=0.05)
    rounding, pruning = correction(both[:1])  # one says nothing about pruning: the common factor
    assert rounding == pytest.approx(1.5)
    assert pruning == pytest.approx(1.5)


def test_kept_entries_are_the_kept_experts(checkpoint: Checkpoint, scores: Scores) -> None:
    entries = entries_of(scores, checkpoint.spec)
    kept = kept_entries(entries, {0: [1, 4], 1: [0, 6]})
    name = "blk.1.ffn_down_exps.weight"
    np.testing.assert_array_equal(kept[name][0], entries[name][0][[0, 6]])
    np.testing.assert_array_equal(kept["blk.0.attn_q.weight"][0], entries["blk.0.attn_q.weight"][0])


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if isinstance(result.exception, ReapcError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def test_commands(checkpoint: Checkpoint, tokens: tuple[Path, Tokens], scores: Scores, tmp_path: Path) -> None:
    """allocate, prune to its count, quantize with its types: the file has the bytes that were announced."""
    scores.save(tmp_path / "scores.safetensors")
    given = ("--scores", tmp_path / "scores.safetensors")
    out = tmp_path / "allocation.json"
    code, text = run("allocate", checkpoint.folder, *given, "--budget", "4.5bpw", "--out", out, "--pre-tokenizer",
                     "qwen2", "--types", "Q8_0,Q4_K,Q2_K", "--criterion", "frequency")  # fmt: skip
    assert code == 0, text
    assert "certificate: of 3 expert counts" in text or "certificate: of 4 expert counts" in text
    data = read_allocation(out)
    assert data["data_bytes"] <= data["budget_bytes"]
    assert data["predicted"]["source"] == "errors"
    model = checkpoint.folder
    if data["experts"] < 7:
        code, text = run("quantize", model, "--allocation", out, "--out", tmp_path / "no.gguf")
        assert code == 2
        assert f"--experts {data['experts']}" in text
        model = tmp_path / "pruned"
        code, text = run("prune", checkpoint.folder, *given, "--experts", data["experts"], "--criterion", "frequency",
                         "--out", model)  # fmt: skip
        assert code == 0, text
    code, text = run("quantize", model, "--allocation", out, "--tokens", tokens[0], "--pre-tokenizer", "qwen2",
                     "--out", tmp_path / "mix.gguf", "--json")  # fmt: skip
    assert code == 0, text
    reader = gguf.GGUFReader(str(tmp_path / "mix.gguf"))
    assert (tmp_path / "mix.gguf").stat().st_size == reader.data_offset + data["data_bytes"]
    check_types(tmp_path / "mix.gguf", data["types"])


def test_bad_requests(checkpoint: Checkpoint, tmp_path: Path) -> None:
    code, text = run("allocate", checkpoint.folder, "--budget", "3.0bqw")
    assert code == 2
    assert "--budget" in text
    code, text = run("allocate", checkpoint.folder, "--budget", "10kB")
    assert code == 1
    assert "nothing fits" in text
    code, text = run("quantize", checkpoint.folder, "--out", tmp_path / "a.gguf")
    assert code == 2
    path = tmp_path / "bad.json"
    for content, message in (("{", "not JSON"), ("[]", "no allocation"), ('{"reapc_allocation": "1"}', "types")):
        path.write_text(content)
        with pytest.raises(ReapcError, match=message):
            read_allocation(path)
    data = {"experts": 7, "types": {"token_embd.weight": "Q8_0"}}
    with pytest.raises(ReapcError, match="another model"):
        check_allocation(data, checkpoint.spec, path)
    with pytest.raises(ReapcError, match="no-imatrix"):
        check_allocation(data | {"types": {"token_embd.weight": "IQ2_XS"}}, checkpoint.spec, path, imatrix=False)


def test_a_known_model_needs_no_files() -> None:
    code, text = run("allocate", "zai-org/GLM-5", "--budget", "180GB", "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["data_bytes"] <= 180_000_000_000
    assert found["predicted"]["source"] == "prior"
    assert found["certificate"]["counts_compared"] == 129
    assert found["types"]["blk.40.ffn_down_exps.weight"] in LADDER
