"""Quantized checkpoints, pruned byte for byte: what is left still reads, every kept expert decodes to the same weights,
and lists of modules speak of the same experts as before."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_main
from family_models import CONFIGS
from safetensors.torch import load_file
from test_prune_families import GROUPS, Tensors, checkpoint_of, choice, random_tensors, write

from reapc.arch import load_config, model_spec
from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats.layout import linear_modules, tensors_of
from reapc.formats.quantization import quantization_of
from reapc.observe.accumulate import ROUTING
from reapc.observe.scores import Scores
from reapc.progress import Silent
from reapc.prune.rewrite import prune

QWEN = {**CONFIGS["qwen3_moe"], "hidden_size": 64, "moe_intermediate_size": 64, "attention_bias": False}
KEPT = {0: [1, 2, 4, 5], 1: [0, 2, 3, 5], 2: [0, 1, 2, 4]}
DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64,
          "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8}  # fmt: skip
E = "model.layers.{}.mlp.experts.{}"
CT = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        },
        "group_1": {
            "targets": [E.format(0, 2) + ".up_proj", r"re:.*layers\.2\.mlp\.experts\.[01]\.gate_proj"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        },
    },
    "ignore": ["lm_head", "re:.*self_attn.*", E.format(1, 3) + ".up_proj", r"re:.*layers\.1\.mlp\.experts\.[45]\."],
}  # fmt: skip
QUANTIZED: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3",
        "modules_to_not_convert": [
            "lm_head", "model.layers.0.mlp.gate", E.format(1, 3) + ".up_proj", E.format(2, 3),
            "mlp.experts.1.down_proj",
        ],
    },
    "compressed-tensors": CT,
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "dynamic": {
            "-:.*self_attn": {}, r"+:model\.layers\.1\.mlp\.experts\.2\.up_proj": {"bits": 8},
            r".*mlp\.experts\.[25]\.": {"bits": 2}, r"-:.*layers\.2.*experts\.\d\.gate_proj": {},
        },
    },
    "auto-round": {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {
            E.format(0, 2) + ".up_proj": {"bits": 8}, "experts.2.up_proj": {"bits": 2},
            r".*experts\.[245]\.": {"bits": 16}, r".*self_attn.*": {"bits": 16},
        },
    },
}  # fmt: skip


def quantized(config: dict[str, Any], scheme: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """The config and random tensors in the packing that it states."""
    config = {**config, "quantization_config": scheme}
    quantization = quantization_of(config, "config.json")
    assert quantization is not None
    generator = torch.Generator().manual_seed(0)
    found = random_tensors(config)
    for tensor, group in tensors_of(model_spec(deepcopy(config))):
        packing = quantization.packing(tensor.module) if group.linears else None
        if packing is None:
            continue
        del found[tensor.name]
        ((module, (rows, columns)),) = linear_modules(tensor, group, 0)
        for part in packing.parts(module, rows, columns, {}):
            dtype = DTYPES[part.dtypes[0]]
            if part.suffix == "weight_shape":
                values = torch.tensor([rows, columns])
            elif dtype == torch.int32:
                values = torch.randint(-(2**31), 2**31 - 1, part.shape, generator=generator)
            else:
                values = torch.randn(part.shape, generator=generator)
            found[f"{module}.{part.suffix}"] = values.to(dtype)
    return config, found


@pytest.mark.parametrize("method", QUANTIZED)
def test_kept_experts_decode_to_the_same_weights(method: str, tmp_path: Path) -> None:
    """Opening is the proof that the lists are right: a module read with another width has other tensors."""
    source = Checkpoint(write(tmp_path / "m", *quantized(QWEN, QUANTIZED[method])))
    prune(source, KEPT, tmp_path / "out", Silent())
    result = Checkpoint(tmp_path / "out")
    assert {p.packing.bits for p in source.packed.values()} == {p.packing.bits for p in result.packed.values()}
    for layer, experts in KEPT.items():
        for new, old in enumerate(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                a, b = (E.format(layer, e) + f".{part}.weight" for e in (old, new))
                packings = [c.packed[n].packing if n in c.packed else None for c, n in ((source, a), (result, b))]
                assert packings[0] == packings[1]
                torch.testing.assert_close(source.tensor(a), result.tensor(b), rtol=0, atol=0, equal_nan=True)
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(source.tensor(name)[experts], result.tensor(name))


def lists_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_config(folder)["quantization_config"]
    return found


def test_lists_are_rewritten_where_they_tell_experts_apart(tmp_path: Path) -> None:
    found = {}
    for method, scheme in QUANTIZED.items():
        source = Checkpoint(write(tmp_path / method / "m", *quantized(QWEN, scheme)))
        prune(source, KEPT, tmp_path / method / "out", Silent())
        found[method] = lists_of(tmp_path / method / "out")
    assert found["fp8"]["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.mlp.gate", E.format(1, 2) + ".up_proj", E.format(0, 0) + ".down_proj",
        E.format(2, 1) + ".down_proj",
    ]  # fmt: skip
    ct = found["compressed-tensors"]
    assert ct["ignore"][:3] == ["lm_head", "re:.*self_attn.*", E.format(1, 2) + ".up_proj"]
    assert set(ct["ignore"][3:]) == {E.format(1, 3) + f".{n}_proj" for n in ("gate", "up", "down")}
    assert ct["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert ct["config_groups"]["group_1"]["targets"] == [
        E.format(0, 1) + ".up_proj", E.format(2, 0) + ".gate_proj", E.format(2, 1) + ".gate_proj",
    ]  # fmt: skip
    gptq = found["gptq"]["dynamic"]
    assert list(gptq)[:2] == ["-:.*self_attn", r"+:model\.layers\.1\.mlp\.experts\.1\.up_proj$"]
    assert r"-:.*layers\.2.*experts\.\d\.gate_proj" not in gptq  # the pattern of 2 and 5 took some of its modules
    extra = found["auto-round"]["extra_config"]
    assert extra[E.format(0, 1) + ".up_proj"] == {"bits": 8}
    assert extra[E.format(1, 1) + ".up_proj"] == {"bits": 2}
    assert extra[E.format(0, 2) + ".up_proj"] == {"bits": 16}
    assert extra[".*self_attn.*"] == {"bits": 16}


def test_the_quantizers_own_file_is_rewritten_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", *quantized(QWEN, QUANTIZED["gptq"]))
    own = {"bits": 4, "dynamic": QUANTIZED["gptq"]["dynamic"]}
    (folder / "quantize_config.json").write_text(json.dumps(own))
    prune(Checkpoint(folder), KEPT, tmp_path / "out", Silent())
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert written == {"bits": 4, "dynamic": lists_of(tmp_path / "out")["dynamic"]}


def test_parts_of_names_that_treat_experts_alike(tmp_path: Path) -> None:
    parts = [["self_attn.q_proj"], [f"mlp.experts.{e}.{n}_proj" for e in range(6) for n in ("gate", "up", "down")]]
    scheme = {**QUANTIZED["gptq"], "dynamic": {}, "modules_in_block_to_quantize": parts}
    prune(Checkpoint(write(tmp_path / "m", *quantized(QWEN, scheme))), KEPT, tmp_path / "out", Silent())
    assert lists_of(tmp_path / "out")["modules_in_block_to_quantize"] == [parts[0], parts[1][:12]]
    Checkpoint(tmp_path / "out")
    scheme["modules_in_block_to_quantize"] = [parts[0], parts[1][:-1]]
    source = Checkpoint(write(tmp_path / "n", *quantized(QWEN, scheme)))
    with pytest.raises(CannotBeDone, match="modules_in_block_to_quantize treats experts of one layer differently"):
        prune(source, KEPT, tmp_path / "no", Silent())


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(len(shape))).to(torch.uint8).view(dtype)


def packed_experts(config: dict[str, Any], name: str, scheme: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """gpt-oss's blocks, DeepSeek-V4's fp4 and Kimi-K3's MXFP4, as published: random bytes in the published shapes."""
    found: Tensors = {}
    for key, tensor in random_tensors(config).items():
        if name == "gpt_oss" and key.endswith(("gate_up_proj", "down_proj")):
            experts, inner, rows = tensor.shape
            found[f"{key}_blocks"] = bytes_of((experts, rows, inner // 32, 16))
            found[f"{key}_scales"] = bytes_of((experts, rows, inner // 32))
        elif name == "deepseek_v4" and ".experts." in key:
            rows, inner = tensor.shape
            found[key] = bytes_of((rows, inner // 2), torch.int8)
            found[key.replace(".weight", ".scale")] = bytes_of((rows, inner // 32), torch.float8_e8m0fnu)
        elif name == "kimi-k3" and ".experts." in key:
            rows, inner = tensor.shape
            found[key.replace("weight", "weight_packed")] = bytes_of((rows, inner // 2))
            found[key.replace("weight", "weight_scale")] = bytes_of((rows, -(-inner // 32)))
        else:
            found[key] = tensor
    config = deepcopy(config)
    (config["text_config"] if name == "kimi-k3" else config)["quantization_config"] = scheme
    return config, found


PUBLISHED = {
    "gpt_oss": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
    "deepseek_v4": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "kimi-k3": {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
        "ignore": ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_packings_that_are_only_copied(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", *packed_experts(CONFIGS[name], name, PUBLISHED[name]))
    source = Checkpoint(folder, as_stored=True)
    kept = choice(source.spec)
    prune(source, kept, tmp_path / "out", Silent(), values={layer: np.ones(source.spec.num_experts) for layer in kept})
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    count = len(next(iter(kept.values())))
    checked = 0
    for layer, experts in kept.items():
        prefix = f"{source.spec.layers[layer].prefix}."
        for key in (key for key in before if key.startswith(prefix) and ("experts." in key)):
            if name == "gpt_oss":
                assert torch.equal(before[key][experts], after[key])
            elif ".experts." in key and int(key.split(".experts.")[1].split(".")[0]) in experts:
                old = key.split(".experts.")[1].split(".")[0]
                new = key.replace(f".experts.{old}.", f".experts.{experts.index(int(old))}.")
                assert torch.equal(before[key].view(torch.uint8), after[new].view(torch.uint8))
            else:
                continue
            checked += 1
    assert checked == len(kept) * (6 if name == "gpt_oss" else count * 6)
    config, original = load_config(tmp_path / "out"), load_config(folder)
    assert config.get("quantization_config") == original.get("quantization_config")
    again = Checkpoint(tmp_path / "out", as_stored=True)
    assert again.spec.num_experts == count
    prune(again, {layer: list(range(count)) for layer in kept}, tmp_path / "same", Silent(),
          values={layer: np.ones(count) for layer in kept})  # fmt: skip
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


# --- what is not understood -------------------------------------------------------------------------------------------


def broken(what: str) -> tuple[dict[str, Any], Tensors]:
    config, tensors = quantized(QWEN, deepcopy(QUANTIZED["fp8"]))
    scheme = config["quantization_config"]
    if what == "method":
        scheme["quant_method"] = "bitsandbytes"
    elif what == "list":
        scheme["kv_modules"] = {"model.layers.0.mlp.experts.3": "x"}
    elif what == "entry":
        scheme["modules_to_not_convert"].append("other.layers.0.mlp.experts.3.up_proj")
    elif what == "router":
        tensors["model.layers.0.mlp.gate.weight"] = bytes_of((6, 64), torch.float8_e4m3fn)
    elif what == "scales of a router":
        tensors["model.layers.0.mlp.gate.weight_scale_inv"] = torch.zeros(1, 2)
    elif what == "expert":
        for key in [key for key in tensors if key.startswith(E.format(1, 4) + ".up_proj.")]:
            del tensors[key]
    return config, tensors


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("method", "quant_method = 'bitsandbytes': this version prunes fp8, compressed-tensors, gptq"),
        ("list", r"kv_modules names experts by number \('model.layers.0.mlp.experts.3'\)"),
        ("entry", "'other.layers.0.mlp.experts.3.up_proj' names an expert by number, and no module"),
        ("router", "'model.layers.0.mlp.gate.weight' is F8_E4M3: a quantized router"),
        ("scales of a router", r"gate.weight_scale_inv' has shape \[1, 2\]: 6 experts on axis 0"),
        ("expert", r"'model.layers.1.mlp.experts.4.up_proj.weight' is missing \(\[64, 64\] expected\)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(what: str, message: str, tmp_path: Path) -> None:
    source = Checkpoint(write(tmp_path / "m", *broken(what)), as_stored=True)
    with pytest.raises(ReapcError, match=message):
        prune(source, KEPT, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups kept or given up, MTP layers in or out, a quantized model: by the options of `reapc prune`."""
    config = {**GROUPS, "num_nextn_predict_layers": 1}
    checkpoint = checkpoint_of(tmp_path / "m", config)
    spec, random = checkpoint.spec, np.random.default_rng(0)
    header = {"model": "m", "digest": checkpoint.digest, "num_experts": 24, "layers": list(spec.moe_layers)}
    sums = {f"layers.{i}.{name}": random.random(24) + 1 for i in spec.moe_layers for name in ROUTING}
    Scores(header, sums).save(tmp_path / "scores.safetensors")
    common = ("prune", tmp_path / "m", "--scores", tmp_path / "scores.safetensors", "--experts")
    code, _, err = run_main(capsys, *common, 20, "--out", tmp_path / "a")
    assert code == 2
    assert "keep 16 or 24" in err
    code, _, err = run_main(capsys, *common, 20, "--dissolve-groups", "--mtp", "prune", "--out", tmp_path / "a")
    assert code == 0, err
    assert "groups are given up" in err
    assert "which is a guess" in err
    found = Checkpoint(tmp_path / "a").spec
    assert (found.num_experts, found.n_group, len(found.mtp_layers)) == (20, 1, 1)
    code, _, err = run_main(capsys, *common, 16, "--out", tmp_path / "b")
    assert code == 0, err
    found = Checkpoint(tmp_path / "b").spec
    assert (found.num_experts, found.n_group, len(found.mtp_layers)) == (16, 8, 0)
