"""vLLM 0.33's own quantization config, kernel selection and weight loader, against the rules that reapc plans by.

Every checkpoint is written with reapc's own layout and ``quantization_config``; vLLM builds its real model of it for
one rank of a group of cards that are not here (tests/vllm_model.py) and loads every tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from specs import DEMO, recipe_of
from test_vllm_parser import environment

from reapc.arch import ModelSpec, model_spec
from reapc.checkpoint.reader import Checkpoint
from reapc.engines import vllm_rules
from reapc.engines.vllm_rules import Layout
from reapc.formats import weights
from reapc.formats.layout import expected_tensors, stored
from reapc.formats.weights import WeightFormat
from reapc.quantize import fp8, quantization_config
from reapc.quantize.published import linears
from reapc.target import bare_target

pytestmark = pytest.mark.vllm
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def parsed(name: str) -> WeightFormat:
    found = weights.parse(name)
    assert found is not None, name
    return found


def write(folder: Path, config: dict[str, Any], fmt: str) -> None:
    """A checkpoint of zeros in ``fmt``, with the names, shapes and config that reapc's quantizers publish."""
    form = parsed(fmt)
    spec = model_spec(config)
    plain = folder / "plain"
    plain.mkdir(parents=True)
    for where, which in ((plain, parsed("bf16")), (folder, form)):
        tensors = expected_tensors(which, spec, mtp=True)
        save_file(
            {name: torch.zeros(item.shape, dtype=DTYPES[item.dtypes[-1]]) for name, item in tensors.items()},
            where / "model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
    (plain / "config.json").write_text(json.dumps(config))
    source = Checkpoint(plain)
    match form.method:
        case "auto-round":
            made = quantization_config.for_auto_round(form, linears(source, form), "model.layers")
        case "ct":
            made = quantization_config.for_compressed_tensors(form, linears(source, form))
        case "gptq":
            made = quantization_config.for_gptq(form, linears(source, form))
        case _:
            made = fp8.quantization_config(form.method, fp8._covered(source, form)[1])
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": made}))


def ask(capability: str, tensor_parallel: int, cases: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """What vLLM makes of these folders on such cards."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    done = subprocess.run(
        [environment("parser") / "bin" / "python", ROOT / "tests" / "vllm_model.py"],
        input=json.dumps({"capability": capability, "tensor_parallel": tensor_parallel, "cases": cases, **more}),
        capture_output=True, text=True, check=False, timeout=300,
        env={**variables, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


QWEN: dict[str, Any] = {
    **DEMO, "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "num_experts": 6, "vocab_size": 256,
    "dtype": "bfloat16", "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
# Shapes at which the rules differ: widths of experts and of the model, KV heads that are copied, odd rows of q.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {}, "inter192": {"moe_intermediate_size": 192}, "hidden192": {"hidden_size": 192},
    "inter96": {"moe_intermediate_size": 96}, "inter64": {"moe_intermediate_size": 64},
    "kv1": {"num_key_value_heads": 1}, "heads3": {"num_attention_heads": 3, "num_key_value_heads": 3},
}  # fmt: skip
FORMATS = (
    *(f"auto-round-w{bits}g{group}" for bits in (2, 3, 4, 8) for group in (32, 128)),
    "gptq-w4g32", "gptq-w4g128", "gptq-w8g64",
    *(f"ct-w{bits}g32" for bits in range(2, 9)), "ct-w4g128", "ct-w3g64", "fp8", "fp8-block",
)  # fmt: skip
GLM4: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "vocab_size": 256,
    "use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 0.5, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "dtype": "bfloat16", "rope_theta": 10000.0,
}  # fmt: skip
EXPERTS = "model.layers.{}.mlp.experts.routed_experts"
# A card and how many of them; each is a process of its own.
CARDS = [("7.5", 1), ("8.6", 1), ("8.6", 2), ("8.6", 4), ("8.9", 1), ("9.0", 2), ("12.0", 1)]


def ruling(spec: ModelSpec, fmt: WeightFormat, capability: str, cards: int) -> tuple[str | None, bool]:
    """Why reapc's rules refuse this, and whether they call it slow."""
    target = bare_target(80 << 30, cards, 0, capability)
    layout = Layout(cards, 1, 1)
    serve = recipe_of("h100x8", serve={"engine": "vllm"}).serve
    reason = vllm_rules.refusal(spec, fmt, target, serve, "auto") or vllm_rules.layout_refusal(spec, layout)
    return (reason, False) if reason else vllm_rules.format_refusal(spec, fmt, layout)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ModelSpec, WeightFormat, Path]]:
    found = []
    root = tmp_path_factory.mktemp("grid")
    for shape, changes in SHAPES.items():
        spec = model_spec({**QWEN, **changes})
        for name in FORMATS:
            fmt = parsed(name)
            if weights.misfit(fmt, spec) is None:
                write(root / f"{shape}-{name}", {**QWEN, **changes}, name)
                found.append((f"{shape} {name}", spec, fmt, root / f"{shape}-{name}"))
    assert len(found) > 100
    return found


@pytest.mark.parametrize(("capability", "cards"), CARDS)
def test_what_the_rules_allow_loads(
    capability: str, cards: int, grid: list[tuple[str, ModelSpec, WeightFormat, Path]]
) -> None:
    answers = ask(capability, cards, [{"folder": str(folder), "load": True} for *_, folder in grid])
    allowed = refused = 0
    for (name, spec, fmt, _), answer in zip(grid, answers, strict=True):
        reason, slow = ruling(spec, fmt, capability, cards)
        if reason is not None:
            # vLLM takes more than we do where a group or a tile is cut: it pads or copies, and nobody has measured it
            assert "error" in answer or any(
                text in reason for text in ("columns leave", "columns per card do not divide", "rows per card do not")
            ), (name, reason)
            refused += 1
            continue
        assert "error" not in answer, (name, answer["error"])
        assert answer["unloaded"] == [], name
        allowed += 1
        _, method, kernel = answer["methods"][EXPERTS.format(1)]
        if capability == "9.0":  # Humming comes first there, and takes what Marlin does not
            assert kernel.startswith("Humming") or fmt.method.startswith("fp8"), (name, kernel)
        else:
            assert slow == (kernel == "TritonWNA16Experts"), (name, method, kernel)
        assert method != "UnquantizedFusedMoEMethod"
        assert answer["methods"]["model.layers.1.mlp.gate"][1] == "UnquantizedLinearMethod"
        assert answer["methods"]["model.embed_tokens"][1] == "UnquantizedEmbeddingMethod"
        assert answer["methods"]["model.layers.1.self_attn.qkv_proj"][1] != "UnquantizedLinearMethod"
        if fmt.method in ("auto-round", "ct") and fmt.bits not in (4, 8):
            assert kernel.startswith("Humming"), name
        elif fmt.method in ("auto-round", "ct", "gptq") and not slow and capability in ("7.5", "8.6", "8.9"):
            assert kernel == "MarlinExperts", (name, kernel)
        elif fmt.method.startswith("fp8"):  # on tensor cores from 8.9 on, weight-only before
            assert (kernel == "MarlinExperts") == (capability in ("7.5", "8.6")), (name, kernel)
    assert allowed >= 40
    assert refused >= (4 if cards > 1 else 1)


def test_widths_that_no_kernel_has_are_refused_by_both(tmp_path: Path) -> None:
    """reapc writes no such checkpoint, so the config is made by hand from a legal one."""
    write(tmp_path / "gptq", QWEN, "gptq-w4g32")
    path = tmp_path / "gptq" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bits"] = 3
    path.write_text(json.dumps(config))
    (answer,) = ask("8.6", 1, [{"folder": str(tmp_path / "gptq")}])
    assert "bits=3" in answer["error"]
    assert vllm_rules.DATA["bits"]["gptq"] == [4, 8]


MIXED = (
    "auto-round-w4g32:experts+layers.0=8", "auto-round-w4g32+attention=8+layers.0=16", "auto-round-w3g32+layers.1=4",
    "auto-round-w4g32+attention=16", "ct-w4g32+attention=8+layers.0=8", "ct-w3g32:experts+layers.1=8",
    "ct-w5g32+attention=8", "gptq-w4g32+layers.0=8", "gptq-w8g32:experts+layers.0=16", "fp8+layers.0=16",
    "fp8-block:experts", "auto-round-w4g32+layers.0.experts=8g64+layers.1.attention=16",
    "ct-w4g32+layers.0.experts=3g64+layers.1.attention=8+layers.1.experts=16",
    "gptq-w4g32+layers.0.experts=8g64+layers.1.experts=4g64+layers.0-1.attention=8g128",
)  # fmt: skip


@pytest.mark.parametrize("config", [QWEN, GLM4], ids=["qwen3_moe", "glm4_moe"])
def test_mixed_widths_reach_the_fused_experts(config: dict[str, Any], tmp_path: Path) -> None:
    """Also of a dense first layer and of shared experts: each linear comes out as the format says, and loads."""
    spec = model_spec(config)
    for name in MIXED:
        write(tmp_path / name, config, name)
    cases = [{"folder": str(tmp_path / name), "load": True} for name in MIXED]
    for name, answer in zip(MIXED, ask("8.6", 2, cases), strict=True):
        assert "error" not in answer, (name, answer["error"])
        assert answer["unloaded"] == [], name
        planned = {item.tensor.module: item.format for item in stored(parsed(name), spec)}
        seen = 0
        for module, (kind, method, kernel) in answer["methods"].items():
            if kind == "RoutedExperts":
                fmt = planned[f"{module.removesuffix('.routed_experts')}.0.down_proj"]
                # the width that room was made for, and was filled
                assert answer["bits"][module] == (fmt.bits if fmt else 16), (name, module, answer["bits"])
                assert fmt is None or fmt.bits in (4, 8) or kernel.startswith("Humming"), (name, module, kernel)
            elif kind == "RowParallelLinear":  # o_proj, and down_proj of dense layers and shared experts: never fused
                fmt = planned[module]
            else:
                continue
            seen += 1
            assert method.startswith("Unquantized") == (fmt is None), (name, module, method)
        assert seen == (4 if config is QWEN else 5), seen


def test_expert_parallel(tmp_path: Path) -> None:
    """Experts stay whole on their card, so a width that tensor parallelism cannot cut is served; counts may be odd."""
    config = {**QWEN, "moe_intermediate_size": 96, "num_experts": 7}
    spec = model_spec(config)
    names = ("fp8", "auto-round-w4g32", "ct-w4g32")
    for name in names:
        write(tmp_path / name, config, name)
    cases = [{"folder": str(tmp_path / name), "load": True} for name in names]
    for name, answer in zip(names, ask("8.6", 2, cases, expert_parallel=True), strict=True):
        reason, _ = vllm_rules.format_refusal(spec, parsed(name), Layout(2, 1, 2))
        assert reason is None, name
        assert answer.get("unloaded") == [], (name, answer)
