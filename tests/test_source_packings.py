"""Packings that models are published in beside those that reapc writes: NVFP4, MXFP4 one expert at a time, FP8 with one
scale or fused experts, DeepSeek-V4's mix; decoded as their libraries do, or as written out here by hand."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from family_models import CONFIGS, make
from quantized_models import SCHEMES, packed_copy
from safetensors.torch import load_file, save_file
from test_prune_families import choice, random_tensors, write

from reapc.arch import load_config, model_spec
from reapc.checkpoint.decode import decode
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import tensors_of
from reapc.formats.packing import Packing
from reapc.formats.published import published_format
from reapc.formats.quantization import Quantization
from reapc.progress import Silent
from reapc.prune.rewrite import prune
from reapc.prune.stored import stored_format
from reapc.quantize.decoded import decode as decode_checkpoint
from reapc.quantize.worker import known_to_transformers

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def random_e4m3(*shape: int, seed: int = 0) -> torch.Tensor:
    """Positive numbers from 2^-6 to 448."""
    exponents = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 14 - 6
    return torch.exp2(exponents).clamp(max=448).to(torch.float8_e4m3fn)


def unpacked(packed: torch.Tensor) -> np.ndarray:
    """E2M1 numbers, two in each byte, the low half first."""
    octets = packed.contiguous().view(torch.uint8).numpy()
    return E2M1[np.stack([octets & 15, octets >> 4], -1).reshape(*octets.shape[:-1], -1)]


# Values


def test_nvfp4_as_compressed_tensors() -> None:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    parts = {
        "weight_packed": random_bytes(32, 24), "weight_scale": random_e4m3(32, 3),
        "weight_global_scale": torch.tensor([37.25]),
    }  # fmt: skip
    ours = decode(parts, Packing("nvfp4", 4, 16, names="ct"), 32, 48)
    values = unpack_fp4_from_uint8(parts["weight_packed"], 32, 48, dtype=torch.float32)
    exact = dequantize(
        values, parts["weight_scale"].float(), args=stored, global_scale=parts["weight_global_scale"],
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(ours, exact)
    scheme = QuantizationScheme(targets=["Linear"], weights=stored)
    theirs = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]  # in bfloat16, the scales too
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-6, atol=0)


def test_mxfp4_as_compressed_tensors() -> None:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    stored = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )
    scale = random_bytes(16, 2, seed=1) % 40 + 100
    parts = {"weight_packed": random_bytes(16, 32), "weight_scale": scale}
    ours = decode(parts, Packing("mxfp4", 4, 32, names="ct"), 16, 64)
    theirs = MXFP4PackedCompressor.decompress(parts, QuantizationScheme(targets=["Linear"], weights=stored))["weight"]
    assert torch.equal(ours.float(), theirs.float())


def test_nvfp4_as_modelopt_by_hand() -> None:
    """weight = E2M1 * weight_scale * weight_scale_2 (the issue of TensorRT Model Optimizer's checkpoints)."""
    packed, scale, whole = random_bytes(8, 16), random_e4m3(8, 2), torch.tensor(0.0123)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    expected = unpacked(packed).reshape(8, 2, 16) * (scale.float().numpy() * whole.numpy())[..., None]
    ours = decode(parts, Packing("nvfp4", 4, 16), 8, 32).numpy()
    assert np.array_equal(ours, expected.reshape(8, 32))


def test_deepseek_v4_by_hand() -> None:
    packed, scale = random_bytes(8, 32).view(torch.int8), (random_bytes(8, 2, seed=2) % 20 + 110)
    parts = {"weight": packed, "scale": scale.view(torch.float8_e8m0fnu)}
    expected = unpacked(packed).reshape(8, 2, 32) * 2.0 ** (scale.numpy().astype(np.float32) - 127)[..., None]
    ours = decode(parts, Packing("mxfp4", 4, 32, names="deepseek_v4"), 8, 64).float().numpy()
    assert np.array_equal(ours, expected.reshape(8, 64))
    tiles = torch.tensor([[120, 130]], dtype=torch.uint8)
    weight = random_e4m3(100, 200)
    packing = Packing("fp8-block", 8, block=(128, 128), block_scale="scale", names="deepseek_v4")
    ours = decode({"weight": weight, "scale": tiles.view(torch.float8_e8m0fnu)}, packing, 100, 200)
    assert torch.equal(ours[:, :128], weight.float()[:, :128] * 2**-7)
    assert torch.equal(ours[:, 128:], weight.float()[:, 128:] * 2**3)


# Configs


def packing_of(module: str, config: dict[str, Any]) -> Packing | None:
    return Quantization(config, "config.json").packing(module)


def test_rules_of_modelopt() -> None:
    config: dict[str, Any] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
        "ignore": ["lm_head", "model.layers.*.self_attn*", "model.layers.3", "*.gate"],
    }  # fmt: skip
    nvfp4 = Packing("nvfp4", 4, 16)
    assert packing_of("model.layers.0.mlp.experts.1.up_proj", config) == nvfp4
    assert packing_of("model.layers.30.mlp.experts.1.up_proj", config) == nvfp4
    for kept in ("layers.0.self_attn.q_proj", "layers.3.mlp.experts.1.up_proj", "layers.0.mlp.gate"):
        assert packing_of(f"model.{kept}", config) is None
    assert packing_of("lm_head", config) is None
    mixed = {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4"},
                             "model.layers.*.self_attn*": {"quant_algo": "FP8"}},
    }  # fmt: skip
    assert packing_of("model.layers.0.mlp.experts.7.up_proj", mixed) == nvfp4
    assert packing_of("model.layers.1.self_attn.q_proj", mixed) == Packing("fp8", 8, per_tensor=True)
    assert packing_of("model.layers.1.mlp.experts.7.up_proj", mixed) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "quant_algo = 'FP8_PB_WO': this version reads NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size = 32"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp2"}, "expert_dtype = 'fp2'"),
        ({"quant_method": "quark"}, "quant_method = 'quark': this version reads one of gptq"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CannotBeDone, match=words) as error:
        Quantization(config, "config.json")
    assert "16 bit original" in str(error.value.hint)


# Checkpoints


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    changes = {"hidden_size": 128, "moe_intermediate_size": 64, "tie_word_embeddings": False, "mlp_only_layers": []}
    return make_model(folder / "model", dtype=torch.bfloat16, num_hidden_layers=2, **changes)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_quant_algo": "FP8"},
        {**SCHEMES["fp8"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}}}},
    ],
)  # fmt: skip
def test_fp8_with_one_scale(plain: Path, tmp_path: Path, scheme: dict[str, Any], shape: tuple[int, ...]) -> None:
    """As Mistral and AutoFP8, ModelOpt and compressed-tensors write it, with scales of activations and of the cache."""
    folder = packed_copy(plain, tmp_path / "fp8", scheme)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].reshape(shape)
        tensors[name.replace("weight_scale", "input_scale")] = torch.ones(shape)
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    assert published_format(checkpoint.spec) == "fp8"
    name = "model.layers.1.mlp.experts.3.up_proj"
    scale = tensors[f"{name}.weight_scale"].float()
    assert scale.numel() == 1
    assert torch.equal(checkpoint.tensor(f"{name}.weight"), tensors[f"{name}.weight"].float() * scale)
    kept = {0: list(range(3, 12)), 1: list(range(9))}
    prune(checkpoint, kept, tmp_path / "out", Silent())
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(
        after["model.layers.0.mlp.experts.0.up_proj.input_scale"],
        tensors["model.layers.0.mlp.experts.3.up_proj.input_scale"],
    )
    assert "model.layers.0.self_attn.k_proj.k_scale" in after
    Checkpoint(tmp_path / "out")


def test_modelopts_own_file(plain: Path, tmp_path: Path) -> None:
    """Older checkpoints state their quantization beside config.json; experts in its lists are renumbered there."""
    kept_module = "model.layers.0.mlp.experts.4"
    scheme = {**SCHEMES["nvfp4:experts"], "ignore": [*SCHEMES["nvfp4:experts"]["ignore"], kept_module]}
    folder = packed_copy(plain, tmp_path / "m", scheme)
    config = load_config(folder)
    stated = config.pop("quantization_config")
    own = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "exclude_modules": stated["ignore"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": own}))
    checkpoint = Checkpoint(folder)
    assert checkpoint.quantization is not None
    assert published_format(checkpoint.spec) == "nvfp4:experts"
    prune(checkpoint, {0: [0, 4, 5, 6], 1: [0, 1, 2, 3]}, tmp_path / "out", Silent())
    written = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert written["producer"] == {"name": "modelopt"}
    excluded = written["quantization"]["exclude_modules"]
    assert excluded[:3] == own["exclude_modules"][:3]
    assert set(excluded[3:]) == {f"model.layers.0.mlp.experts.1.{name}_proj" for name in ("gate", "up", "down")}
    assert "quantization_config" not in load_config(tmp_path / "out")
    again = Checkpoint(tmp_path / "out")
    assert "model.layers.0.mlp.experts.1.up_proj.weight" not in again.packed
    decode_checkpoint(again, tmp_path / "bf16", Silent())
    assert not (tmp_path / "bf16/hf_quant_config.json").exists()
    assert Checkpoint(tmp_path / "bf16").quantization is None
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ReapcError, match="no readable 'quantization' table"):
        Checkpoint(folder)


FUSED = {
    # (config, name of the scale, axis of the plain tensor that its numbers belong to; None: tiles)
    "tiles": ("qwen3_vl_moe", {"quant_method": "fp8", "weight_block_size": [128, 128],
                               "modules_to_not_convert": ["lm_head", "visual"]}),
    "columns": ("llama4", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                           "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"]}),
}  # fmt: skip


def fused_config(family: str) -> dict[str, Any]:
    """The tiny config of a family with wide enough experts to have several tiles."""
    found = {name: config for name, config in CONFIGS.items() if config["model_type"] == family}
    return deepcopy(next(iter(found.values())))


@pytest.mark.parametrize("kind", FUSED)
def test_fused_experts_in_fp8(kind: str, tmp_path: Path) -> None:
    """Qwen3-VL: a scale for each tile of the tensor as it lies; Llama-4: one for each of its columns."""
    family, scheme = FUSED[kind]
    config = fused_config(family)
    spec = model_spec(deepcopy(config))
    config["quantization_config"] = deepcopy(scheme)
    linears = [t.module for t, g in tensors_of(spec) if g.linears and g.expert_axis is None]
    config["quantization_config"]["modules_to_not_convert"] += linears
    tensors, expected = random_tensors({k: v for k, v in config.items() if k != "quantization_config"}), {}
    fused = [t for t, g in tensors_of(spec) if g.expert_axis is not None and g.linears]
    assert fused
    for tensor in fused:
        experts, rows, columns = tensor.shape
        weight = random_e4m3(experts, rows, columns, seed=rows)
        tensors[tensor.name] = weight
        shape = (experts, -(-rows // 128), -(-columns // 128)) if kind == "tiles" else (experts, 1, columns)
        scale = torch.rand(shape, generator=torch.Generator().manual_seed(columns)) + 0.5
        if kind == "tiles":
            spread = scale.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)[:, :, :columns]
            tensors[f"{tensor.name}_scale_inv"] = scale
        else:
            spread = scale
            # transformers makes (experts, columns, 1) of the down projection's
            tensors[f"{tensor.name}_scale"] = scale.mT.contiguous() if "down" in tensor.name else scale
        expected[tensor.name] = weight.float() * spread
    source = Checkpoint(write(tmp_path / "m", config, tensors))
    for name, weight in expected.items():
        assert torch.equal(source.tensor(name), weight)
        assert torch.equal(source.read_expert(name, 2), weight[2])
    kept = choice(source.spec)
    prune(source, kept, tmp_path / "out", Silent())
    result = Checkpoint(tmp_path / "out")
    for tensor in fused:
        assert tensor.layer is not None
        assert torch.equal(result.tensor(tensor.name), expected[tensor.name][kept[tensor.layer]])


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe", "llama4"])
@pytest.mark.parametrize("name", ["ct-w4g32:experts", "fp8-block"])
def test_experts_that_a_quantizer_unfused(family: str, name: str, tmp_path: Path) -> None:
    """Read as the fused tensors of the plain checkpoint, in its own orientation; pruned one by one."""
    config = fused_config(family)
    spec = model_spec(deepcopy(config))
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = deepcopy(SCHEMES[name])
    linears = [t.module for t, g in tensors_of(spec, mtp=True) if g.expert_axis is None and "{e}" not in g.name]
    key = "ignore" if name.startswith("ct") else "modules_to_not_convert"
    scheme[key] = [*dict.fromkeys(linears), "lm_head"]
    if name.startswith("ct"):
        scheme["config_groups"]["group_0"]["weights"]["group_size"] = 8
    source = Checkpoint(packed_copy(folder, tmp_path / "m", scheme))
    fused = [t for t, g in tensors_of(spec) if g.expert_axis is not None and g.linears]
    assert all(source.packed[tensor.name].unfused for tensor in fused)
    assert not any(tensor.name in source.entries for tensor in fused)
    for tensor in fused:
        found, original = source.tensor(tensor.name), tensors[tensor.name].float()
        assert found.shape == tensor.shape
        assert float((found - original).norm() / original.norm()) < (0.2 if name.startswith("ct") else 2**-4)
        assert torch.equal(source.read_expert(tensor.name, 1), found[1])
    stored = stored_format(source)
    if name == "fp8-block":
        assert stored is not None
        kept = choice(source.spec)
        count = len(next(iter(kept.values())))
        prune(source, kept, tmp_path / "out", Silent())
        result = Checkpoint(tmp_path / "out")
        assert stored.total_bytes(result.spec) == result.bytes
        assert result.spec.num_experts == count
        for tensor in fused:
            assert tensor.layer is not None
            assert torch.equal(result.tensor(tensor.name), source.tensor(tensor.name)[kept[tensor.layer]])


def test_deepseek_v4_as_published(tmp_path: Path) -> None:
    """Experts in fp4, the other linears in FP8 tiles, scales that are powers of two: opened, sized and pruned."""
    make("deepseek_v4", tmp_path / "plain")
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for path in (*files, tmp_path / "plain/model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file(tensors, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    config = load_config(tmp_path / "plain")
    config["expert_dtype"] = "fp4"
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    source = Checkpoint(packed_copy(tmp_path / "plain", tmp_path / "m", scheme))
    experts = [name for name in source.packed if ".experts." in name]
    others = [name for name in source.packed if ".experts." not in name]
    assert {source.packed[name].packing.method for name in experts} == {"mxfp4"}
    assert {source.packed[name].packing.method for name in others} == {"fp8-block"}
    for name in (experts[0], others[0]):
        original = tensors[name].float()
        error = float((source.tensor(name).float() - original).norm() / original.norm())
        assert error < (0.2 if name == experts[0] else 2**-4)
    assert source.entries["layers.0.ffn.experts.0.w1.scale"].dtype == "F8_E8M0"
    assert source.entries["layers.0.attn.wq_a.scale"].dtype == "F8_E8M0"
    kept = choice(source.spec)
    stored = stored_format(source)
    assert stored is not None
    prune(
        source, kept, tmp_path / "out", Silent(), values={layer: np.ones(source.spec.num_experts) for layer in kept}
    )  # fmt: skip
    result = Checkpoint(tmp_path / "out")
    assert stored.total_bytes(result.spec) == result.bytes
    layer = next(iter(kept))
    for new, old in enumerate(kept[layer]):
        a, b = (f"layers.{layer}.ffn.experts.{e}.w1.weight" for e in (old, new))
        assert torch.equal(source.tensor(a), result.tensor(b))


def test_quantizers_see_a_type_that_transformers_knows(plain: Path, tmp_path: Path) -> None:
    """Kimi-K2 is DeepSeek-V3 under another name: its tools are shown links to the files and that name."""
    assert known_to_transformers(plain, tmp_path) == plain
    folder = tmp_path / "kimi"
    shutil.copytree(plain, folder)
    config = {**load_config(plain), "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Kimi"}}
    (folder / "config.json").write_text(json.dumps(config))
    view = known_to_transformers(folder, tmp_path)
    shown = load_config(view)
    assert shown["model_type"] == "deepseek_v3"
    assert "auto_map" not in shown
    assert (view / "model.safetensors").resolve() == folder / "model.safetensors"
    assert load_config(folder) == config
