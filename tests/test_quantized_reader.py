"""Quantized checkpoints read as if they were plain ones: names, packings and values against the libraries' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_models import changed, fmt, held_out, kl, library, same_as_library, source, streamed
from safetensors.torch import load_file, save_file

from reapc.arch import known
from reapc.checkpoint import decode as decoding
from reapc.checkpoint.reader import Checkpoint
from reapc.cli.main import main
from reapc.cli.progress import make_progress
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import layout, weights
from reapc.formats.packing import Packing
from reapc.formats.quantization import Quantization
from reapc.quantize import fp8
from reapc.stream import StreamedModel

NAMES = [*weights.names(), "ct-w4g32+attention=8", "auto-round-w4g128+layers.0=16+layers.1-2=8", "fp8-block:experts"]


# Layout


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(known.names()), st.sampled_from(NAMES), st.booleans())
def test_expected_tensors_are_the_predicted_bytes(name: str, form: str, mtp: bool) -> None:
    spec = known.spec(name)
    spec = spec.with_experts(spec.n_group if spec.n_group > 1 else 3)
    if weights.misfit(fmt(form), spec) is None:
        found = layout.expected_tensors(fmt(form), spec, mtp=mtp)
        vision = 2 * spec.vision_parameters
        assert sum(item.bytes for item in found.values()) + vision == weights.checkpoint_bytes(fmt(form), spec, mtp=mtp)


class Saved(NamedTuple):
    """What AutoRound itself saves of a tiny model: ``folders`` "source", "auto_round" (mixed) and "llm_compressor"; and
    single linears ``packed`` by it in every width."""

    folders: dict[str, Path]
    packed: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    work = tmp_path_factory.mktemp("saved")
    source(work / "source")
    _, packed = library([("auto_round_saves", work), ("auto_round_packs", None)], work)
    folders = {path.parent.relative_to(work).parts[0]: path.parent for path in work.rglob("config.json")}
    return Saved(folders, packed)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("auto_round", "auto-round-w4g32+attention=8+layers.1=3+attention=8"), ("llm_compressor", "ct-w4g32")],
)
def test_expected_tensors_are_those_of_real_files(saved: Saved, kind: str, form: str) -> None:
    checkpoint = Checkpoint(saved.folders[kind])
    expected = layout.expected_tensors(fmt(form), checkpoint.spec)
    assert set(expected) == set(checkpoint.entries)
    wider = 0  # on a CPU without bf16 AutoRound computes, and saves what it leaves alone, in float32
    for name, entry in checkpoint.entries.items():
        assert entry.shape == expected[name].shape
        if entry.dtype == "F32" and "BF16" in expected[name].dtypes:
            wider += entry.bytes // 2
        else:
            assert entry.dtype in expected[name].dtypes
    assert checkpoint.bytes - wider == weights.checkpoint_bytes(fmt(form), checkpoint.spec)


def test_the_libraries_reload_the_same_weights(saved: Saved, tmp_path: Path) -> None:
    kinds = ("llm_compressor", "auto_round")
    loaded = library([("transformers", saved.folders[kind]) for kind in kinds], tmp_path)
    original = streamed(Checkpoint(saved.folders["source"]), tmp_path / "original")
    for kind, theirs in zip(kinds, loaded, strict=True):
        checkpoint = Checkpoint(saved.folders[kind])
        assert same_as_library(checkpoint, theirs) == 2 * (4 + 6 * 3)
        ours = streamed(checkpoint, tmp_path / kind)
        # they round their weights to 16 bit; the quantization itself is a thousand times that
        assert kl(ours, theirs["log_probs"]) < 1e-4 < 1e-2 < kl(original, ours)
        assert {"auto_round": {3, 4, 8}, "llm_compressor": {4}}[kind] == {
            linear.packing.bits for linear in checkpoint.packed.values()
        }


# Packings


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [64, 96, 352])
def test_compressed_tensors_packing(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (24, columns), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    packed = pack_to_int32(values, bits)
    assert packed.shape == layout.parts(fmt(f"ct-w{bits}g32"), 24, columns)[0].shape
    assert torch.equal(decoding.unpack_stream(packed, bits, columns).int() - half, values.int())


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_with_empty_ends(bits: int) -> None:
    """As compressed-tensors 0.17 and older packed: 32 // bits values to a word, written here by hand."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, (5, 64))
    per_word = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -64 % per_word))).reshape(5, -1, per_word).astype(np.uint64)
    words = (
        (padded << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32).view(np.int32)
    )
    found = decoding.unpack_words(torch.from_numpy(words), bits, 64)
    assert np.array_equal(found.numpy(), values)
    packing = Packing("ct", bits, 32)
    scales = torch.rand(5, 2)
    parts = {"weight_packed": torch.from_numpy(words), "weight_scale": scales}
    expected = (values - (1 << (bits - 1))) * scales.repeat_interleave(32, 1).numpy()
    assert np.array_equal(decoding.decode(parts, packing, 5, 64).numpy(), expected.astype(np.float32))


def test_auto_round_packing(saved: Saved) -> None:
    packed = saved.packed
    for bits in range(2, 9):
        parts = {part: packed[f"{bits}.{part}"] for part in ("qweight", "qzeros", "scales")}
        for part in layout.parts(fmt(f"auto-round-w{bits}g32"), 96, 128):
            assert parts[part.suffix].shape == part.shape
        packing = Packing.of(fmt(f"auto-round-w{bits}g32"))
        assert bool((decoding.zero_points(parts, packing) == 1 << (bits - 1)).all())
        decoded = decoding.decode(parts, packing, 96, 128)
        assert torch.equal(decoded.half(), packed[f"{bits}.weight"])
        assert len(decoded.unique()) > 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_by_hand(bits: int, version: str, offset: int) -> None:
    """Asymmetric, with columns in groups of any order, packed here bit by bit."""
    random = np.random.default_rng(bits)
    rows, columns, groups = 32, 64, 4
    values = random.integers(0, 1 << bits, (columns, rows))
    zeros = random.integers(1, 1 << bits, (groups, rows))
    scales = random.random((groups, rows)).astype(np.float16)
    order = random.permutation(np.arange(columns) // 16).astype(np.int32)

    def packed(numbers: np.ndarray) -> torch.Tensor:  # along the last axis
        digits = (numbers[..., None] >> np.arange(bits)) & 1
        words = digits.reshape(*numbers.shape[:-1], -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        return torch.from_numpy(words.sum(-1).astype(np.uint32).view(np.int32))

    parts = {
        "qweight": packed(values.T).t().contiguous(),
        "qzeros": packed(zeros - offset),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(order),
    }
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": True, "sym": False,
        "checkpoint_format": version,
    }  # fmt: skip
    packing = Quantization(config, "config.json").packing("model.layers.0.self_attn.q_proj")
    assert packing == Packing("gptq", bits, 16, symmetric=False, zero_offset=offset, act_order=True)
    expected = ((values - zeros[order]) * scales[order].astype(np.float32)).T
    assert np.array_equal(decoding.decode(parts, packing, rows, columns).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (200, 300)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    cast, scales = fp8.cast_blocks(weight)
    parts = {"weight": cast, "weight_scale_inv": scales}
    found = decoding.decode(parts, Packing.of(fmt("fp8-block")), *shape)
    for i in range(shape[0]):
        row = cast[i].float() * scales[i // 128, torch.arange(shape[1]) // 128]
        assert torch.equal(found[i], row)
    if shape[0] % 128 == shape[1] % 128 == 0:  # others it cuts into equal tiles, which these are not
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        theirs = Fp8Dequantize(None)._dequantize_one(cast, scales, torch.float32)
        assert torch.equal(found, theirs)


# quantization_config


def packing_of(module: str, **config: Any) -> Packing | None:
    return Quantization(config, "config.json").packing(module)


def test_rules_of_gptq() -> None:
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        "dynamic": {
            "-:.*\\.mlp\\.gate$": {}, "+:model\\.layers\\.1\\.": {"bits": 8, "group_size": 32},
            "model\\.layers\\.2": {}, "-:layers\\.3": {},
        },
    }  # fmt: skip
    four, eight = Packing("gptq", 4, 128, zero_offset=1), Packing("gptq", 8, 32, zero_offset=1)
    assert packing_of("model.layers.0.mlp.gate", **config) is None
    assert packing_of("model.layers.0.mlp.gate_proj", **config) == four
    assert packing_of("model.layers.1.self_attn.q_proj", **config) == eight
    assert packing_of("model.layers.1.mlp.gate", **config) is None  # the first pattern counts
    assert packing_of("model.layers.2.self_attn.q_proj", **config) == four
    assert packing_of("model.layers.3.self_attn.q_proj", **config) == four  # matched from the start of the name
    only = {**config, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts"]]}
    assert packing_of("model.layers.0.self_attn.q_proj", **only) == four
    assert packing_of("model.layers.0.self_attn.k_proj", **only) is None
    assert packing_of("x", **{**config, "group_size": -1, "dynamic": {}}) == Packing("gptq", 4, 0, zero_offset=1)


def test_rules_of_auto_round() -> None:
    config: dict[str, Any] = {
        "quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True,
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.0.self_attn.q_proj": {"bits": 8}, ".*mlp\\.gate$": {"bits": 16},
            "self_attn.o_proj": {"bits": 2}, ".*layers\\.1\\..*": {"bits": 3, "group_size": 32},
        },
    }  # fmt: skip
    assert packing_of("model.layers.0.self_attn.q_proj", **config) == Packing("auto-round", 8, 64, zero_offset=1)
    assert packing_of("model.layers.0.self_attn.k_proj", **config) == Packing("auto-round", 4, 64, zero_offset=1)
    assert packing_of("model.layers.1.self_attn.o_proj", **config) == Packing("auto-round", 2, 64, zero_offset=1)
    assert packing_of("model.layers.1.mlp.experts.3.up_proj", **config) == Packing("auto-round", 3, 32, zero_offset=1)
    assert packing_of("model.layers.1.mlp.gate", **config) is None
    assert packing_of("model.layers.0.mlp.gate_proj", **config) == Packing("auto-round", 4, 64, zero_offset=1)
    assert packing_of("lm_head", **config) is None


def ct_group(targets: list[str], layout_name: str = "pack-quantized", **stored: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **stored}
    return {"targets": targets, "weights": scheme, "format": layout_name}


def test_rules_of_compressed_tensors() -> None:
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": ct_group(["Linear"]),
            "b": ct_group(["re:.*layers\\.1\\..*"], num_bits=3),
            "c": ct_group(["model.layers.1.self_attn.q_proj"], num_bits=8, strategy="channel", group_size=None),
            "d": ct_group(["re:.*down_proj$"], "float-quantized", type="float", num_bits=8, strategy="channel"),
        },
        "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    }
    assert packing_of("model.layers.0.self_attn.q_proj", **config) == Packing("ct", 4, 32)
    assert packing_of("model.layers.1.self_attn.k_proj", **config) == Packing("ct", 3, 32)
    assert packing_of("model.layers.1.self_attn.q_proj", **config) == Packing("ct", 8, 0)  # a name before a pattern
    assert packing_of("model.layers.0.mlp.down_proj", **config) == Packing("fp8", 8)
    assert packing_of("model.layers.0.mlp.gate", **config) is None
    assert packing_of("model.layers.0.mlp.gate_proj", **config) == Packing("ct", 4, 32)
    assert packing_of("lm_head", **config) is None


def test_rules_of_fp8() -> None:
    config: dict[str, Any] = {
        "quant_method": "fp8", "weight_block_size": [128, 64],
        "modules_to_not_convert": ["lm_head", "mlp.gate", "model.v"],
    }  # fmt: skip
    assert packing_of("model.layers.0.mlp.gate", **config) is None
    assert packing_of("model.v.proj", **config) is None
    assert packing_of("model.layers.0.mlp.gate_proj", **config) == Packing("fp8-block", 8, block=(128, 64))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq': this version reads one of gptq, auto-round"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["("]}, "is not a regular expression"),
        ({"bits": 4}, "quant_method = 'None'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size = 128"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "gptq", "bits": 16, "group_size": 32}, "bits = 16: this version reads 2 to 8"),
        ({"quant_method": "gptq", "group_size": 32}, "bits = None: a whole number expected"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:(": {}}}, "is not a regular expression"),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
            "packing_format = 'auto_round:auto_awq'",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": ct_group(["Linear"], symmetric=False)}},
            r"config_groups.a.weights.symmetric = False",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": ct_group(["Linear"], "nvfp4-pack-quantized")},
            },
            "config_groups.a = 'nvfp4-pack-quantized",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ReapcError, match=words) as error:
        Quantization(config, "config.json")
    assert "config.json: quantization_config" in str(error.value)


# Checkpoints


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("half") / "source")


@pytest.fixture(scope="module")
def blocks(half: Path) -> Path:
    fp8.quantize(half, half.parent / "blocks", fmt("fp8-block"), make_progress())
    return half.parent / "blocks"


def test_a_streamed_forward_is_the_decoded_models(blocks: Path, tmp_path: Path) -> None:
    """transformers on a plain checkpoint of the decoded weights, and the streamed forward of the quantized one."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(blocks)
    config = json.loads((blocks / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    tensors = {tensor.name: checkpoint.tensor(tensor.name).float() for tensor in checkpoint.spec.tensors()}
    save_file(tensors, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.from_numpy(held_out().input_ids).long()).logits, -1)
    assert float((streamed(checkpoint, tmp_path / "s") - theirs).abs().max()) < 1e-3


def test_only_what_is_routed_to_is_decoded(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(Checkpoint(blocks))
    decoded = []
    original = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args: decoded.append(args[2:]) or original(*args))
    with model.layer(0) as forward:
        assert len(decoded) == 4  # the attention
        forward(torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)), None, None)
    assert len(decoded) == 4 + 2 * 3  # one token, two experts


def test_commands_take_a_quantized_checkpoint(
    half: Path, blocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"input_ids": torch.from_numpy(held_out().input_ids)}, tmp_path / "ids.safetensors")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    code, said, errors = run("compare", half, blocks, "--tokens", tmp_path / "ids.safetensors", "--json")
    assert code == 0, errors
    assert 1e-4 < json.loads(said)["kl"] < 0.2
    scores = tmp_path / "scores.safetensors"
    code, _, errors = run("observe", blocks, "--tokens", tmp_path / "ids.safetensors", "--out", scores)
    assert code == 0, errors
    code, _, errors = run("prune", blocks, "--scores", scores, "--experts", 4, "--out", tmp_path / "pruned")
    assert code == 0, errors
    pruned = Checkpoint(tmp_path / "pruned")
    assert pruned.spec.num_experts == 4
    assert len(pruned.packed) < len(Checkpoint(blocks).packed)


EXPERT = "model.layers.1.mlp.experts.3.down_proj"


def lose_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{EXPERT}.weight_scale_inv"]


def keep_an_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{EXPERT}.weight_scale_inv"]
    tensors[f"{EXPERT}.weight"] = torch.zeros(64, 32, dtype=torch.bfloat16)


def add_a_key(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.experts.6.up_proj.weight"] = torch.zeros(32, 64)


def quantize_the_router(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.gate.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = fp8.cast_blocks(tensors[name])


def reshape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}.weight_scale_inv"] = torch.ones(1, 2)


def ignore_an_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["modules_to_not_convert"].append(EXPERT)


def not_a_number(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}.weight_scale_inv"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_scale, f"it misses '{EXPERT}.weight_scale_inv'"),
        (keep_an_expert, f"tensor '{EXPERT}.weight' is BF16, quantization_config (fp8-block 8 bits"),
        (add_a_key, "it has 'model.layers.0.mlp.experts.6.up_proj.weight', which nothing would read"),
        (quantize_the_router, "it has 'model.layers.0.mlp.gate.weight_scale_inv'"),
        (reshape, "has shape [1, 2], config.json implies [1, 1]"),
        (ignore_an_expert, f"it has '{EXPERT}.weight_scale_inv'"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says(blocks: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = changed(blocks, tmp_path / "changed", change)
    with pytest.raises(ReapcError) as error:
        Checkpoint(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)


def test_values_are_looked_at_when_they_are_read(blocks: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(changed(blocks, tmp_path / "changed", not_a_number))
    with pytest.raises(ReapcError, match="NaN or infinite") as error:
        checkpoint.checked_tensor(f"{EXPERT}.weight")
    assert "model.safetensors" in str(error.value)


def test_what_a_checkpoint_says_of_itself(half: Path, blocks: Path) -> None:
    checkpoint = Checkpoint(blocks)
    assert checkpoint.bytes == sum(t.nbytes for t in load_file(blocks / "model.safetensors").values())
    assert checkpoint.dtype_of(f"{EXPERT}.weight") == "F32"
    assert checkpoint.dtype_of("model.embed_tokens.weight") == "BF16"
    assert checkpoint.tensor(f"{EXPERT}.weight").dtype == torch.float32
    with pytest.raises(CannotBeDone, match="healing takes weights in 16 or 32 bit"):
        checkpoint.refuse_quantized("healing")
    Checkpoint(half).refuse_quantized("healing")
