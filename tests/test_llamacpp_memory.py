"""reapc's memory of llama.cpp against llama.cpp: llama-fit-params on real models (headers only, see ``fit_params``).

It prints MiB, rounded down: weights, cache and state must be equal; compute buffers are bounded from above.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fit_params import MIB, Allocation, measure, published, write_models

from reapc.arch import known, model_spec
from reapc.arch.spec import ModelSpec
from reapc.engines import llamacpp_memory as memory
from reapc.formats import gguf as formats
from reapc.formats.gguf_sizes import sizes

# Every architecture of the catalogue, and every shape of it that differs.
MODELS = (
    "MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M3", "Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct", "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct",
    "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-397B-A17B", "XiaomiMiMo/MiMo-V2-Flash",
    "allenai/OLMoE-1B-7B-0924", "baidu/ERNIE-4.5-21B-A3B-PT", "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V4-Flash",
    "deepseek-ai/DeepSeek-V4-Pro", "google/gemma-4-26B-A4B", "ibm-granite/granite-3.0-1b-a400m-instruct",
    "ibm-granite/granite-3.1-3b-a800m-instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct", "microsoft/Phi-3.5-MoE-instruct", "mistralai/Mixtral-8x22B-v0.1",
    "mistralai/Mixtral-8x7B-v0.1", "moonshotai/Kimi-K2.5", "moonshotai/Kimi-K3",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "openai/gpt-oss-120b", "openai/gpt-oss-20b", "stepfun-ai/Step-3.7-Flash", "zai-org/GLM-4.5",
    "zai-org/GLM-4.5-Air", "zai-org/GLM-4.7-Flash", "zai-org/GLM-5", "zai-org/GLM-5.2",
)  # fmt: skip
POINTS = ((2048, 1, "f16"), (5000, 4, "q8_0"), (32768, 1, "f16"), (131072, 1, "f16"))  # context, slots, cache
PRUNED = "Qwen/Qwen3-30B-A3B with 96 experts"
SLIDING = "mistralai/Mixtral-8x7B-v0.1 with a window"
ABOVE = 1.55  # the largest ratio of bound and buffer


@cache
def _spec(name: str) -> ModelSpec:
    if name == SLIDING:
        return model_spec(known.config(name.partition(" with ")[0]) | {"sliding_window": 1024})
    return known.spec("Qwen/Qwen3-30B-A3B").with_experts(96) if name == PRUNED else known.spec(name)


def _format(spec: ModelSpec) -> str:
    native = formats.native_expert_type(spec)
    return f"{native}_MOE" if native else "Q4_K_M"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    wanted: dict[str, tuple[ModelSpec, dict[str, Any], str]] = {}
    for name in (*MODELS, PRUNED, SLIDING):
        spec = _spec(name)
        config = published(name.partition(" with ")[0], spec)
        if name == PRUNED:
            config["num_experts"] = 96
        elif name == SLIDING:
            config["sliding_window"] = 1024
        wanted[name] = (spec, config, _format(spec))
    return write_models(tmp_path_factory.mktemp("models"), wanted)


@cache
def _measured(model: Path, context: int, slots: int, kv: str) -> Allocation:
    if not model.exists():
        pytest.fail((model.parent / "error.txt").read_text())
    return measure(model, context, slots, kv)


def _points(spec: ModelSpec) -> list[tuple[int, int, str]]:
    """The points that the model has; f16 where llama.cpp refuses a quantized cache."""
    return [
        (context, slots, "f16" if memory.cache_refusal(spec, kv, slots) else kv)
        for context, slots, kv in POINTS
        if context <= spec.max_context
    ]


def _workspace(spec: ModelSpec, context: int, slots: int) -> int:
    """The compute buffer of a device that holds the whole model."""
    fixed = memory.workspace_bytes(spec, context, output=True, concurrency=slots)
    return fixed + sum(memory.layer_workspace_bytes(spec, context, slots))


def test_no_architecture_is_left_out() -> None:
    specs = [known.spec(name) for name in known.names()]
    assert {spec.gguf_arch for spec in specs} - {None} == {_spec(name).gguf_arch for name in MODELS}


@pytest.mark.parametrize("name", [*MODELS, PRUNED])
def test_weights_cache_and_state_are_exact(name: str, models: dict[str, Path]) -> None:
    spec = _spec(name)
    sized = sizes(spec, _format(spec), True)
    weights = sized.tensors_bytes(spec.num_experts)
    if spec.gguf_arch == "gemma4":
        # Its loader makes the tied output before the embedding, and so a second copy in the same place; a mapped file
        # (llama-server's default) is shared by both, but the tool maps nothing.
        weights += sized.embedding_bytes
    for context, slots, kv in _points(spec):
        found = _measured(models[name], context, slots, kv)
        kept = sum(memory.kv_layer_bytes(layer.kind, context, slots, kv) for layer in spec.layers)
        state = sum(memory.state_layer_bytes(layer.kind, slots) for layer in spec.layers)
        assert (kept + state) // MIB == found.context, (context, slots, kv)
        assert weights // MIB == found.model


@pytest.mark.parametrize("name", [*MODELS, PRUNED, SLIDING])
def test_compute_buffers_are_bounded(name: str, models: dict[str, Path]) -> None:
    """Never below; not far above, but where a reserved graph is not the worst one: MiniMax-M3 reserves for slots that
    share a micro-batch evenly."""
    spec = _spec(name)
    for context, slots, kv in _points(spec):
        compute = _measured(models[name], context, slots, kv).compute
        bound = _workspace(spec, context, slots) / MIB
        assert bound >= compute + 1, (context, slots, kv)
        if slots == 1 or spec.gguf_arch != "minimax-m3":
            assert bound <= ABOVE * (compute + 1), (context, slots, kv)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "google/gemma-4-26B-A4B", "XiaomiMiMo/MiMo-V2-Flash"])
@pytest.mark.parametrize("context", [256, 512, 700, 768, 769, 1300, 1536, 1600])
def test_sliding_windows_around_their_edges(name: str, context: int, models: dict[str, Path]) -> None:
    spec = _spec(name)
    for slots in (1, 3):
        kept = sum(memory.kv_layer_bytes(layer.kind, context, slots, "f16") for layer in spec.layers)
        assert kept // MIB == _measured(models[name], context, slots, "f16").context


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-35B-A3B", "moonshotai/Kimi-Linear-48B-A3B-Instruct"])
def test_many_slots_add_states_to_the_graph(name: str, models: dict[str, Path]) -> None:
    spec = _spec(name)
    for slots in (8, 32):
        compute = _measured(models[name], 1024, slots, "f16").compute
        assert compute + 1 <= _workspace(spec, 1024, slots) / MIB <= ABOVE * (compute + 1)


@pytest.mark.parametrize("name", MODELS)
def test_refusals_of_a_quantized_cache_are_llama_cpps(name: str, models: dict[str, Path]) -> None:
    if memory.cache_refusal(_spec(name), "q8_0", 1) is None:
        measure(models[name], 2048, 1, "q8_0")
    else:
        with pytest.raises(AssertionError, match=r"does not divide n_embd_head_v|fatal error"):
            measure(models[name], 2048, 1, "q8_0")


def test_kimi_linear_aborts_on_slots_that_do_not_divide_a_micro_batch(models: dict[str, Path]) -> None:
    name = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
    assert memory.cache_refusal(_spec(name), "f16", 8) is None
    assert "slots divide 512" in str(memory.cache_refusal(_spec(name), "f16", 6))
    with pytest.raises(AssertionError, match="GGML_ASSERT"):
        measure(models[name], 1024, 6, "f16")


@pytest.mark.parametrize("name", MODELS)
def test_more_context_slots_or_copies_never_take_less(name: str) -> None:
    spec = _spec(name)
    contexts = [1, 255, 256, 257, 640, 1024, 1025, 2048, 5000, 8192, 8704, 8705, 32768, 100_000, 131_072, 1_048_576]
    for slots in (1, 2, 5, 64):
        for output in (False, True):
            needs = [memory.workspace_bytes(spec, c, output=output, concurrency=slots) for c in contexts]
            assert needs == sorted(needs)
        layers = [memory.layer_workspace_bytes(spec, c, slots) for c in contexts]
        assert all(sum(a) <= sum(b) for a, b in pairwise(layers))
        for kv in ("f16", "q8_0", "q4_0"):
            caches = [sum(memory.kv_layer_bytes(x.kind, c, slots, kv) for x in spec.layers) for c in contexts]
            assert caches == sorted(caches)
    for context in contexts:
        by_slots = [memory.workspace_bytes(spec, context, output=True, concurrency=n) for n in (1, 2, 4, 64)]
        by_copies = [memory.workspace_bytes(spec, context, output=True, copies=n) for n in (1, 2, 4)]
        assert by_slots == sorted(by_slots)
        assert by_copies == sorted(by_copies)
        assert memory.workspace_bytes(spec, context, output=False) <= by_slots[0]


def test_the_output_device_counts_the_logits() -> None:
    spec = _spec("zai-org/GLM-5")
    assert memory.workspace_bytes(spec, 32768, output=True) >= 154_880 * 512 * 4  # vocabulary * micro-batch * 4
    small = _spec("Qwen/Qwen3-30B-A3B")
    more = memory.workspace_bytes(small, 4096, output=True) - memory.workspace_bytes(small, 4096, output=False)
    assert more > 100 * MIB
