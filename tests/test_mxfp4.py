"""gpt-oss as published, its experts fused in MXFP4: decoded as transformers decodes them, observed and pruned like the
16 bit checkpoint of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import run_main
from family_checks import (
    ids_of,
    observe_and_prune,
    recorded_sum,
    reload,
    streamed_log_probs,
    tokens_of,
    whole_log_probs,
)
from family_models import CONFIGS, make
from quantized_models import changed
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from reapc.checkpoint import decode as decoding
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.packing import Packing
from reapc.formats.quantization import Quantization
from reapc.stream import StreamedModel

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as published
PLAIN = "model.layers.1.mlp.experts"
GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}


class Twins(NamedTuple):
    """The same weights: ``packed`` with experts in MXFP4, ``partly`` but for those of layer 1, ``plain`` in bf16."""

    packed: Path
    partly: Path
    plain: Path


def random_blocks(experts: int, rows: int, columns: int, scales: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bytes, under scales within [first, last]."""
    generator = torch.Generator().manual_seed(rows * columns + scales[0])
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator)
    exponents = torch.randint(scales[0], scales[1] + 1, (experts, rows, columns // 32), generator=generator)
    return blocks.to(torch.uint8), exponents.to(torch.uint8)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    root = tmp_path_factory.mktemp("mxfp4")
    (root / "source").mkdir()
    make("gpt_oss", root / "source")
    config = json.loads((root / "source/config.json").read_text())
    found: dict[str, dict[str, torch.Tensor]] = {"packed": {}, "partly": {}, "plain": {}}
    for name, tensor in load_file(root / "source/model.safetensors").items():
        as_stored = {name: tensor}
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks, scales = random_blocks(experts, rows, columns, (121, 123))  # weights of about columns**-0.5
            as_stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensor = convert_moe_packed_tensors(blocks, scales)
        found["plain"][name] = tensor
        found["packed"] |= as_stored
        found["partly"] |= {name: tensor} if name.startswith(PLAIN) else as_stored
    kept = {"packed": KEPT, "partly": [*KEPT, PLAIN]}
    for kind, names in kept.items():
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": names}
        write(root / kind, {**config, "quantization_config": quantization}, found[kind])
    write(root / "plain", config, found["plain"])
    return Twins(root / "packed", root / "partly", root / "plain")


# Values


@pytest.mark.parametrize("scales", [(0, 0), (0, 8), (90, 150), (0, 252)])
def test_decodes_as_transformers_does(scales: tuple[int, int]) -> None:
    """Bit for bit, subnormals and negative zeros too; and an expert by itself as among the others."""
    blocks, exponents = random_blocks(3, 40, 96, scales)
    theirs = convert_moe_packed_tensors(blocks, exponents)
    ours = decoding.mxfp4(blocks, exponents).mT
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.view(torch.int16))
    parts = {"blocks": blocks[1], "scales": exponents[1]}
    assert torch.equal(decoding.decode(parts, Packing("mxfp4", 4, 32), 40, 96).mT, ours[1])
    exact = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float64)
    assert torch.equal(ours.double(), exact)  # nothing was rounded


def test_every_byte_and_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(256, 1, 1)
    exponents = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    ours = decoding.mxfp4(blocks, exponents)
    theirs = convert_moe_packed_tensors(blocks[:, None], exponents[:, None])[..., 0]
    assert torch.equal(ours[:255].view(torch.int16), theirs[:255].contiguous().view(torch.int16))
    assert torch.equal(ours.isfinite().all(-1), torch.arange(256) < 253)  # 4 * 2^126 is infinite in any 8 bit exponent
    assert bool(ours[255].isnan().all())  # as the standard says; transformers takes it for 2^128


def test_tensors_are_those_of_the_16_bit_checkpoint(twins: Twins) -> None:
    plain = load_file(twins.plain / "model.safetensors")
    for folder in (twins.packed, twins.partly):
        checkpoint = Checkpoint(folder)
        assert {tensor.name for tensor in checkpoint.spec.tensors()} == plain.keys()
        for name, tensor in plain.items():
            found = checkpoint.checked_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            assert checkpoint.dtype_of(name) == Checkpoint(twins.plain).dtype_of(name)
            if ".experts." in name:
                for expert in range(6):
                    assert torch.equal(checkpoint.read_expert(name, expert), tensor[expert])
    assert Checkpoint(twins.plain).read_expert(GATE_UP, 4).equal(plain[GATE_UP][4])


# modules_to_not_convert


def test_rules_of_mxfp4() -> None:
    def packing(module: str, *kept: str) -> Packing | None:
        config = {"quant_method": "mxfp4", "modules_to_not_convert": [*KEPT, *kept]}
        return Quantization(config, "config.json").packing(module)

    experts, packed = "model.layers.1.mlp.experts", Packing("mxfp4", 4, 32)
    assert packing(experts) == packed
    assert packing("model.layers.1.self_attn.q_proj") is packing("model.layers.1.mlp.router") is None
    assert packing("model.layers.1.self_attn.q_proj", "nothing") is None  # no linear of its own is ever packed
    for name in (experts, "model.layers.1", "layers.1.mlp.experts", "model.layers.*.mlp", r"model\.layers\.(0|1)"):
        assert packing(experts, name) is None
    for name in ("model.layers.11", "model.layers.1.mlp.exp", "layers.1", "model.layers.(2|3)"):
        assert packing(experts, name) == packed


def test_what_is_listed_stays_as_it_is(twins: Twins) -> None:
    checkpoint = Checkpoint(twins.partly)
    plain = [name for name in checkpoint.entries if name.startswith(PLAIN)]
    assert checkpoint.packed.keys() == Checkpoint(twins.packed).packed.keys() - set(plain)
    assert len(checkpoint.packed) == 2 * 2
    assert {checkpoint.entries[name].dtype for name in plain} == {"BF16"}
    assert not any("router" in name or "attn" in name for name in checkpoint.packed)


# The streamed pass


def test_streams_as_its_twin_and_as_transformers(twins: Twins) -> None:
    model, said = reload(twins.plain)
    assert not any(said.values())
    ids, mask = ids_of(320)
    whole = whole_log_probs(model, ids, mask)
    plain, packed, partly = (streamed_log_probs(StreamedModel(Checkpoint(folder)), ids, mask) for folder in
                             (twins.plain, twins.packed, twins.partly))  # fmt: skip
    for ours in (packed, partly):  # decoded matrices lie the other way round in memory: sums in another order
        assert torch.allclose(ours[mask], plain[mask], rtol=0, atol=1e-5)
    assert whole[mask].std() > 0.5
    assert (whole - packed)[mask].abs().max() < 1e-4


def test_transformers_reads_the_same_of_the_packed_one(twins: Twins) -> None:
    """Its own loader of MXFP4 (without a GPU it decodes): what is written here is such a checkpoint."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    for folder in (twins.packed, twins.partly):
        given = Mxfp4Config(
            **{**json.loads((folder / "config.json").read_text())["quantization_config"], "dequantize": True}
        )
        model, said = GptOssForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=given, output_loading_info=True
        )
        assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        state, checkpoint = model.state_dict(), Checkpoint(folder)
        for tensor in checkpoint.spec.tensors():
            assert torch.equal(checkpoint.tensor(tensor.name).to(torch.bfloat16), state[tensor.name])


def test_experts_are_decoded_one_at_a_time(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(Checkpoint(twins.packed))
    shapes = []
    original = decoding.mxfp4
    monkeypatch.setattr(decoding, "mxfp4", lambda *parts: shapes.append(parts[0].shape) or original(*parts))
    with model.layer(0) as forward:
        assert shapes == []
        forward(torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)), None, None)
    assert shapes == 2 * [(64, 2, 16), (64, 1, 16)]  # one token, two experts: gate_up and down


def test_the_recorded_sums_are_the_twins(twins: Twins) -> None:
    ids, _ = ids_of(320)
    ours, theirs = (recorded_sum(Checkpoint(folder), ids) for folder in (twins.packed, twins.plain))
    assert ours.keys() == theirs.keys() == {0, 1, 2}
    for layer, (total, pairs) in ours.items():
        assert torch.allclose(total, theirs[layer][0], rtol=1e-5, atol=1e-5)
        assert pairs == theirs[layer][1] == 2 * ids.numel()


def test_observed_and_pruned_like_its_twin(twins: Twins, tmp_path: Path) -> None:
    ids, mask = ids_of(320)
    found = {}
    for kind in ("packed", "partly", "plain"):
        (tmp_path / kind).mkdir()
        pruned = observe_and_prune(getattr(twins, kind), tmp_path / kind)
        checkpoint = Checkpoint(pruned.folder)
        assert checkpoint.spec.num_experts == pruned.kept == 4
        found[kind] = pruned, checkpoint, streamed_log_probs(StreamedModel(checkpoint), ids, mask)
    scores, plain, log_probs = found["plain"]
    for kind in ("packed", "partly"):
        pruned, checkpoint, ours = found[kind]
        assert pruned.scores.arrays.keys() == scores.scores.arrays.keys()
        for key, values in pruned.scores.arrays.items():
            np.testing.assert_allclose(values, scores.scores.arrays[key], rtol=1e-4, atol=1e-4, err_msg=key)
        assert len(checkpoint.packed) == {"packed": 6, "partly": 4}[kind]
        for tensor in plain.spec.tensors():
            assert torch.equal(checkpoint.tensor(tensor.name), plain.tensor(tensor.name))
        assert torch.allclose(ours[mask], log_probs[mask], rtol=0, atol=1e-5)


def test_commands(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"input_ids": torch.from_numpy(tokens_of(320).input_ids)}, tmp_path / "ids.safetensors")
    scores = tmp_path / "scores.safetensors"
    code, _, err = run_main(
        capsys, "observe", twins.packed, "--tokens", tmp_path / "ids.safetensors", "--out", scores, "--device", "cpu"
    )
    assert code == 0, err
    code, _, err = run_main(
        capsys, "prune", twins.packed, "--scores", scores, "--experts", 4, "--out", tmp_path / "pruned"
    )
    assert code == 0, err
    assert Checkpoint(tmp_path / "pruned").spec.num_experts == 4


# What is refused


def lose_scales(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{DOWN}_scales"]


def other_rows(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{GATE_UP}_blocks"] = tensors[f"{GATE_UP}_blocks"][:, :-2].contiguous()


def other_groups(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{GATE_UP}_scales"] = tensors[f"{GATE_UP}_scales"][:, :, :1].contiguous()


def other_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}_scales"] = tensors[f"{DOWN}_scales"][:5].contiguous()


def flat_blocks(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}_blocks"] = tensors[f"{DOWN}_blocks"].flatten(-2)


def other_dtype(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}_scales"] = tensors[f"{DOWN}_scales"].float()


def list_experts(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.0.mlp.experts")


def decode_one(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[DOWN] = convert_moe_packed_tensors(tensors.pop(f"{DOWN}_blocks"), tensors.pop(f"{DOWN}_scales"))


def odd_width(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["intermediate_size"] = 40
    blocks, scales = random_blocks(6, 80, 64, (121, 123))
    tensors[f"{GATE_UP}_blocks"], tensors[f"{GATE_UP}_scales"] = blocks, scales


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_scales, f"it misses '{DOWN}_scales'"),
        (other_rows, f"tensor '{GATE_UP}_blocks' has shape [6, 62, 2, 16], config.json implies [6, 64, 2, 16]"),
        (other_groups, f"tensor '{GATE_UP}_scales' has shape [6, 64, 1], config.json implies [6, 64, 2]"),
        (other_experts, f"tensor '{DOWN}_scales' has shape [5, 64, 1], config.json implies [6, 64, 1]"),
        (flat_blocks, f"tensor '{DOWN}_blocks' has shape [6, 64, 16], config.json implies [6, 64, 1, 16]"),
        (other_dtype, f"tensor '{DOWN}_scales' is F32, quantization_config (mxfp4 4 bits, groups of 32) implies U8"),
        (list_experts, f"it has '{DOWN}_blocks'"),
        (decode_one, f"it has '{DOWN}', which nothing would read"),
        (odd_width, f"{DOWN}: rows of 40 weights do not divide into groups of 32"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says(twins: Twins, tmp_path: Path, change: Any, words: str) -> None:
    folder = changed(twins.packed, tmp_path / "changed", change)
    with pytest.raises(ReapcError) as error:
        Checkpoint(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)


def test_a_scale_that_means_nan_is_refused_when_it_is_read(twins: Twins, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{DOWN}_scales"][3, 7, 0] = 255

    checkpoint = Checkpoint(changed(twins.packed, tmp_path / "changed", change))
    with pytest.raises(ReapcError, match=f"model.safetensors: tensor '{DOWN}', expert 3, holds NaN or infinite"):
        checkpoint.read_expert(DOWN, 3)
    checkpoint.read_expert(DOWN, 2)
    with pytest.raises(ReapcError, match=f"tensor '{DOWN}' holds NaN or infinite"):
        checkpoint.checked_tensor(DOWN)


def test_fused_experts_that_are_not_as_stated_are_refused(twins: Twins, tmp_path: Path) -> None:
    config = json.loads((twins.plain / "config.json").read_text())
    kept = ["model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.2.self_attn", "lm_head"]
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": kept}
    shutil.copytree(twins.plain, tmp_path / "fp8")
    (tmp_path / "fp8/config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    with pytest.raises(
        ReapcError, match=r"it misses .*experts\.0\.gate_proj\.weight'.*; it has .*experts\.gate_up_proj'"
    ):
        Checkpoint(tmp_path / "fp8")
    qwen = write(tmp_path / "qwen", {**CONFIGS["qwen3_moe"], "quantization_config": MXFP4}, {"x": torch.zeros(1)})
    with pytest.raises(CannotBeDone, match="quant_method = 'mxfp4' in a qwen3_moe model: this version reads it in gpt"):
        Checkpoint(qwen)
