"""The predicted type of every tensor against llama-quantize itself, and exact packed sizes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from specs import demo_spec, qwen30b

from reapc.arch import ModelSpec
from reapc.errors import ReapcError
from reapc.formats import gguf as formats
from reapc.formats import safetensors
from reapc.toolchain import require

CASES: dict[str, dict[str, Any]] = {
    "demo": {},
    "deep-untied-gqa4": {
        "num_hidden_layers": 16, "num_experts": 13, "tie_word_embeddings": False, "num_attention_heads": 8,
    },
    "eight-experts": {"num_experts": 8, "num_hidden_layers": 16},
    "wide-1408": {"moe_intermediate_size": 1408, "num_experts": 6},
}  # fmt: skip


def write_bf16_gguf(path: Path, spec: ModelSpec) -> None:
    """A GGUF of zeros with the tensors of ``spec``: matrices bf16, norms and routers float32."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.dense_intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(spec.num_experts)
    writer.add_expert_used_count(spec.top_k)
    writer.add_expert_feed_forward_length(spec.expert_intermediate_size)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("none")
    for tensor in formats.tensor_types(spec, "BF16", False):
        if tensor.type == "F32":
            writer.add_tensor(tensor.name, np.zeros(tensor.shape, np.float32))
        else:
            row = np.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), np.uint8)
            writer.add_tensor(tensor.name, row, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def quantize(*arguments: object) -> str:
    done = subprocess.run(
        [str(require("quantize")), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


_DRY_RUN = re.compile(r"\] (\S+) +- \[.*?\], type = +(\w+), .*?(?:\((\w+)\))?$", re.M)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSpec, Path, Path]]:
    folder = tmp_path_factory.mktemp("gguf")
    found = {}
    for name, changes in CASES.items():
        spec = demo_spec(**changes)
        write_bf16_gguf(folder / f"{name}.gguf", spec)
        write_imatrix(folder / f"{name}.imatrix", spec)
        found[name] = (spec, folder / f"{name}.gguf", folder / f"{name}.imatrix")
    return found


@pytest.mark.parametrize("has_imatrix", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_types_match_llama_quantize(case: str, has_imatrix: bool, sources: Any) -> None:
    """Every format, every tensor, against ``--dry-run``, which applies the same rules without computing."""
    spec, model, imatrix = sources[case]
    for ftype in formats.DEFAULT_TYPES:
        options = ["--imatrix", imatrix] if has_imatrix else []
        printed = _DRY_RUN.findall(quantize("--dry-run", *options, model, ftype))
        actual = {name: (after or before).upper() for name, before, after in printed}
        predicted = {t.name: t.type for t in formats.tensor_types(spec, ftype, has_imatrix)}
        assert predicted == actual, ftype


@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q3_K_M", "Q8_0", "IQ2_XS", "IQ3_XXS"])
@pytest.mark.parametrize("case", ["demo", "wide-1408"])
def test_bytes_match_the_real_file(case: str, ftype: str, sources: Any, tmp_path: Path) -> None:
    spec, model, imatrix = sources[case]
    out = tmp_path / "out.gguf"
    quantize("--imatrix", imatrix, model, out, ftype)
    reader = gguf.GGUFReader(out)
    predicted = {t.name: (t.type, t.data_bytes) for t in formats.tensor_types(spec, ftype, True)}
    assert predicted == {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors}
    assert formats.weights_bytes(spec, ftype, True) == out.stat().st_size - reader.data_offset


def test_qwen3_30b_exact_bytes() -> None:
    spec = qwen30b()
    assert spec.parameters == 30_532_122_624
    assert safetensors.checkpoint_bytes(spec) == 61_064_245_248
    # llama-quantize --dry-run on a sparse file of the same shapes says 17691.34 MiB
    assert formats.weights_bytes(spec, "Q4_K_M", False) == 18_550_716_416


def test_gptq_and_compressed_tensors_bytes() -> None:
    """128 x 256 at 4 bits, groups of 64: written out by hand."""
    assert safetensors.gptq_linear_bytes(128, 256, 4, 64, g_idx=True) == 16384 + 4 * 128 * 2 + 4 * 16 * 4 + 256 * 4
    assert safetensors.compressed_tensors_linear_bytes(128, 256, 4, 64) == 16384 + 4 * 128 * 2 + 16
    assert safetensors.fp8_linear_bytes(128, 256) == 128 * 256 + 2 * 4
    spec = demo_spec()
    assert safetensors.auto_round_bytes(spec, 4, 128) < safetensors.gptq_bytes(spec, 4, 128)
    assert safetensors.gptq_bytes(spec, 4, 128) < safetensors.fp8_bytes(spec) < safetensors.checkpoint_bytes(spec)


def test_errors_name_the_cause() -> None:
    with pytest.raises(ReapcError, match="did you mean 'Q4_K_M'"):
        formats.check_format("Q4_KM")
    with pytest.raises(ReapcError, match="100 elements"):
        formats.tensor_bytes("Q4_K", (2, 100))
    with pytest.raises(ReapcError, match="groups of 100"):
        safetensors.compressed_tensors_linear_bytes(128, 256, 4, 100)
