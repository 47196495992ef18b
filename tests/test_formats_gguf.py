"""GGUF: small models against llama-quantize (every file type, odd expert counts, real files), and the fast sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import dry_run, quantize, write_small_imatrix, write_sparse
from specs import DEMO, demo_spec, qwen30b

from reapc.arch import ModelSpec, known
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import gguf as formats
from reapc.formats.gguf_rules import axes, use_more_bits
from reapc.formats.gguf_sizes import sizes
from reapc.formats.gguf_types import fallback

CASES: dict[str, dict[str, Any]] = {
    "demo": {},
    "deep-untied-gqa4": {
        "num_hidden_layers": 16, "num_experts": 13, "tie_word_embeddings": False, "num_attention_heads": 8,
    },
    "eight-experts": {"num_experts": 8, "num_hidden_layers": 16},
    "three-experts": {"num_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 32},
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 32, "mlp_only_layers": [0, 3]},
    "wide-1408": {"moe_intermediate_size": 1408, "num_experts": 6},
}  # fmt: skip


def write_imatrix(path: Path, spec: ModelSpec) -> None:
    """An importance matrix of ones for every matrix (GGUF layout, one slice per expert)."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["ones"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in formats.tensor_types(spec, "BF16", False):
        if tensor.type == "BF16":
            slices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            writer.add_tensor(f"{tensor.name}.in_sum2", np.ones((slices, tensor.shape[-1]), np.float32))
            writer.add_tensor(f"{tensor.name}.counts", np.ones((slices, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_types_match_llama_quantize(case: str, tmp_path: Path) -> None:
    """Every file type, with and without an importance matrix, against ``--dry-run``."""
    spec = demo_spec(**CASES[case])
    model, imatrix = tmp_path / "model.gguf", tmp_path / "ones.imatrix"
    write_sparse(model, spec, {**DEMO, **CASES[case]})
    write_small_imatrix(imatrix)
    for ftype in formats.DEFAULT_TYPES:
        for matrix in (None, imatrix):
            actual, _ = dry_run(model, ftype, matrix)
            predicted = formats.tensor_types(spec, ftype, matrix is not None)
            assert {t.name: (t.type, t.data_bytes) for t in predicted} == actual, (ftype, matrix)


@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q3_K_M", "IQ2_XS", "Q2_0"])
@pytest.mark.parametrize("case", ["demo", "wide-1408"])
def test_bytes_match_the_real_file(case: str, ftype: str, tmp_path: Path) -> None:
    """The file that llama-quantize really writes: types, bytes, padding. (The source is a hole: zeros.)"""
    spec = demo_spec(**CASES[case])
    model, imatrix, out = tmp_path / "model.gguf", tmp_path / "ones.imatrix", tmp_path / "out.gguf"
    write_sparse(model, spec, {**DEMO, **CASES[case]})
    write_imatrix(imatrix, spec)
    quantize("--imatrix", imatrix, model, out, ftype)
    if ftype != "Q2_0":  # which the gguf package cannot read
        reader = gguf.GGUFReader(out)
        predicted = {t.name: (t.type, t.data_bytes) for t in formats.tensor_types(spec, ftype, True)}
        assert predicted == {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors}
    # Metadata and table do not depend on the file type, but for the name of the imatrix in it: the BF16 twin has none.
    header = out.stat().st_size - sizes(spec, ftype, True).file_bytes(spec.num_experts)
    plain = model.stat().st_size - sizes(spec, "BF16", False).file_bytes(spec.num_experts)
    assert header % 32 == 0
    assert 0 <= header - plain < 1024
    assert formats.weights_bytes(spec, ftype, True) == sizes(spec, ftype, True).file_bytes(spec.num_experts)


def test_qwen3_30b_exact_bytes() -> None:
    # llama-quantize --dry-run on a sparse file of the same shapes says 17691.34 MiB
    assert formats.weights_bytes(qwen30b(), "Q4_K_M", False) == 18_550_716_416


@pytest.mark.parametrize("name", known.names())
def test_fast_sizes_are_the_sums_over_all_tensors(name: str) -> None:
    """Per layer and in total, for counts with rules of their own too, from one GgufSizes."""
    spec = known.spec(name)
    if spec.gguf_arch is None:
        with pytest.raises(CannotBeDone, match="no architecture"):
            sizes(spec, "Q8_0", False)
        return
    for number, ftype in enumerate(("BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XS", "IQ2_M", "MXFP4_MOE")):
        mtp, has_imatrix = bool(number % 2), number % 3 == 0
        found = sizes(spec, ftype, has_imatrix, mtp)
        for experts in (spec.num_experts, spec.num_experts - 1, (8, 3, 1)[number % 3]):
            tensors = formats.tensor_types(spec.with_experts(experts), ftype, has_imatrix, mtp)
            exact = found.at(experts)
            assert found.tensors_bytes(experts) == sum(t.data_bytes for t in tensors), (ftype, experts)
            assert found.file_bytes(experts) == sum(-(-t.data_bytes // 32) * 32 for t in tensors), (ftype, experts)
            assert exact.expert_bits == pytest.approx(formats.expert_bits(tensors), rel=1e-12)
            layers: dict[int, int] = {}
            routed: dict[int, int] = {}
            for tensor in tensors:
                layer, _ = formats.part_layer(tensor.name)
                layers[layer] = layers.get(layer, 0) + tensor.data_bytes
                if "_exps." in tensor.name or "_chexps." in tensor.name:
                    routed[layer] = routed.get(layer, 0) + tensor.data_bytes
            assert layers.pop(-1) == exact.embedding_bytes + exact.output_bytes
            rows = zip(exact.fixed_bytes, exact.per_expert_bytes, strict=True)
            assert list(layers.values()) == [fixed + each * experts for fixed, each in rows]
            assert [routed.get(i, 0) for i in layers] == [each * experts for each in exact.experts_per_expert_bytes]


def test_embedding_and_output_by_hand() -> None:
    """Qwen3-30B: 151936 x 2048 as Q4_K (144 bytes per 256) and Q6_K (210), a norm of 2048 floats."""
    found = sizes(qwen30b(), "Q4_K_M", False)
    assert found.embedding_bytes == 151_936 * 2048 // 256 * 144
    assert found.output_bytes == 151_936 * 2048 // 256 * 210 + 2048 * 4
    # An expert of layer 10 (no extra bits): gate and up as Q4_K, down as Q4_K; the router's row is float32.
    assert found.experts_per_expert_bytes[7] == 3 * 768 * 2048 // 256 * 144
    assert found.per_expert_bytes[7] == found.experts_per_expert_bytes[7] + 4 * 2048


def test_a_spec_is_sized_once() -> None:
    spec = qwen30b()
    assert sizes(spec, "Q4_K_M", False) is sizes(spec.with_experts(96), "Q4_K_M", False)
    assert sizes(spec, "Q4_K_M", False) is not sizes(spec.with_experts(8), "Q4_K_M", False)


def test_overhead_counts_the_table() -> None:
    """The header of a real file without a tokenizer: what the estimate adds is the metadata's 10 KiB."""
    spec = demo_spec()
    with_tokenizer = formats.file_overhead_bytes(spec)
    assert with_tokenizer - formats.file_overhead_bytes(spec, tokenizer_bytes=0) == pytest.approx(35 * 2048, abs=32)
    names = [t.name for t in formats.tensor_types(spec, "Q8_0", True)]
    # name with its length, number of axes, type, offset; eight bytes an axis
    table = sum(8 + len(name) + 4 + 4 + 8 for name in names)
    table += 8 * sum(len(t.shape) for t in formats.tensor_types(spec, "Q8_0", True))
    assert formats.file_overhead_bytes(spec, tokenizer_bytes=0) == pytest.approx(24 + table + 10 * 1024, abs=32)


@pytest.mark.parametrize(
    ("meant", "columns", "taken"),
    [("Q4_K", 2048, "Q4_K"), ("Q4_K", 2880, "Q5_0"), ("Q6_K", 1408, "Q8_0"), ("IQ2_XS", 192, "IQ4_NL"),
     ("Q3_K", 48, "F16"), ("MXFP4", 48, "F16"), ("Q2_0", 96, "Q4_0"), ("TQ2_0", 2880, "Q4_0")],
)  # fmt: skip
def test_fallbacks(meant: str, columns: int, taken: str) -> None:
    assert fallback(meant, columns) == taken


@pytest.mark.parametrize("ftype", ["Q4_K_M", "MXFP4_MOE"])
def test_packed_experts_stay_packed(ftype: str, tmp_path: Path) -> None:
    """gpt-oss as published: the converter repacks MXFP4, and llama-quantize takes only a file type that leaves it."""
    spec = replace(demo_spec(), gguf_arch="gpt-oss", quantization={"quant_method": "mxfp4"})
    assert formats.native_expert_type(spec) == "MXFP4"
    assert formats.native_expert_type(replace(spec, quantization=None)) is None
    assert sizes(spec, "BF16", False).expert_bits == 4.25
    assert sizes(replace(spec, quantization=None), "BF16", False).expert_bits == 16
    model = tmp_path / "model.gguf"
    write_sparse(model, spec, DEMO)
    if ftype == "MXFP4_MOE":
        quantize(model, tmp_path / "out.gguf", ftype)
        assert (tmp_path / "out.gguf").stat().st_size > sizes(spec, ftype, False).file_bytes(spec.num_experts)
    else:
        with pytest.raises(AssertionError, match="requantizing from type mxfp4 is disabled"):
            quantize(model, tmp_path / "out.gguf", ftype)


def test_counting_rules_by_hand() -> None:
    assert [i for i in range(16) if use_more_bits(i, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert axes((1, 128)) == 1  # a gate of one row is a vector to ggml
    assert axes((128, 1)) == 2
    assert axes((1, 1)) == 1


def test_errors_name_the_cause() -> None:
    assert formats.check_format("q4_k") == "Q4_K_M"
    with pytest.raises(ReapcError, match="Q4_KM"):
        formats.check_format("Q4_KM")
    with pytest.raises(ReapcError, match="100 elements"):
        formats.tensor_bytes("Q4_K", (2, 100))
    with pytest.raises(CannotBeDone, match="multiple of 128"):
        sizes(demo_spec(moe_intermediate_size=96), "Q1_0", False)
    with pytest.raises(CannotBeDone, match="no architecture"):
        sizes(replace(demo_spec(), gguf_arch=None), "Q8_0", False)
