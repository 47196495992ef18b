"""The quality prior: its shape, the published figures that it must agree with, and files of the user's own."""

from __future__ import annotations

import timeit
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reapc.errors import ReapcError
from reapc.planner import prior

METHODS = sorted(prior.default().curves)
MIXED = ("gguf-iq", "gguf-k", "auto-round")  # methods that one may trade against pruning at any width
BITS = st.floats(1.0, 16.0)
RATIO = st.floats(0.0, 1.0)

# Issue 7: a small model, KL at equal bytes; (bits, fraction pruned): KL. Bits of group-32 rounding: width + 0.5.
TABLES = {
    4.5: {(4.5, 0.0): 0.0043, (6.5, 0.31): 0.0193, (8.5, 0.47): 0.148},
    3.5: {(3.5, 0.0): 0.0164, (4.5, 0.22): 0.0069, (6.5, 0.44): 0.097},
    2.5: {(2.5, 0.0): 0.0806, (3.5, 0.28): 0.0262, (4.5, 0.44): 0.102},
}


def loss(method: str, bits: float, ratio: float = 0.0, of: prior.Prior | None = None) -> float:
    of = of or prior.default()
    return prior.combined(of.quantization_loss(method, bits), of.pruning_loss(ratio))


@settings(deadline=None)
@given(st.sampled_from(METHODS), BITS, BITS)
def test_more_bits_always_cost_less_and_16_nothing(method: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert prior.quantization_loss(method, 16) == prior.quantization_loss(method, 16, 16) == 0
    assert prior.quantization_loss(method, low) >= prior.quantization_loss(method, high) >= 0
    if high - low > 1e-6:
        assert prior.quantization_loss(method, low) > prior.quantization_loss(method, high)


@settings(deadline=None)
@given(st.sampled_from(METHODS), BITS, BITS, BITS)
def test_more_bits_outside_the_experts_cost_less(method: str, bits: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert prior.quantization_loss(method, bits, low) >= prior.quantization_loss(method, bits, high)
    assert prior.quantization_loss(method, bits, bits) == pytest.approx(prior.quantization_loss(method, bits))
    if bits < 15.9:
        # most of the damage is the experts' own, whatever attention is stored in
        assert prior.quantization_loss(method, bits, 16) > 0.5 * prior.quantization_loss(method, bits)


@settings(deadline=None)
@given(RATIO, RATIO)
def test_pruning_is_increasing_and_convex(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert prior.pruning_loss(0) == 0
    assert prior.pruning_loss(low) <= prior.pruning_loss(high)
    middle = (prior.pruning_loss(low) + prior.pruning_loss(high)) / 2
    assert prior.pruning_loss((low + high) / 2) <= middle + 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 512), st.integers(1, 64), st.integers(1, 64))
def test_the_routers_cost_keeps_more_memory_from_making_the_loss_larger(total: int, a: int, b: int) -> None:
    def best(budget: int) -> float:  # experts that fit; the search looks at every count
        return min(
            prior.pruning_loss(1 - kept / total) + prior.router_cost(kept, "llama.cpp", "cuda")
            for kept in range(1, min(budget, total) + 1)
        )

    assert best(max(a, b)) <= best(min(a, b))


def test_the_routers_cost() -> None:
    fused = [1, 2, 4, 8, 16, 32, 64, 128, 256, 288, 512, 576]  # the cases of ggml-cuda/topk-moe.cu
    assert [kept for kept in range(1, 1200) if not prior.router_cost(kept, "llama.cpp", "cuda")] == fused
    assert prior.router_cost(100, "llama.cpp", "metal") == prior.router_cost(100, "vllm", "cuda") == 0
    assert 0 < prior.router_cost(100, "llama.cpp", "cuda") < prior.pruning_loss(1 / 256)


@pytest.mark.parametrize("method", MIXED)
@pytest.mark.parametrize("size", TABLES)
def test_the_order_at_equal_bytes_is_the_measured_one(method: str, size: float) -> None:
    measured = sorted(TABLES[size], key=lambda mix: TABLES[size][mix])
    predicted = sorted(TABLES[size], key=lambda mix: loss(method, *mix))
    assert predicted == measured  # the losers too


def test_the_small_models_own_figures_add_up(tmp_path: Path) -> None:
    """Its quantization column and the pruning left over in four mixes predict the fifth, and every order."""
    file = tmp_path / "small.toml"
    file.write_text(
        "quantization.methods.rtn.anchors = [[2.5, 0.0806], [3.5, 0.0164], [4.5, 0.0043]]\n"
        "pruning.anchors = [[0.22, 0.0026], [0.28, 0.0098], [0.31, 0.019], [0.44, 0.0967], [0.47, 0.148]]\n"
    )
    small = prior.load(file)
    # .44 was fitted to 6 bits (.097); 4 bits with .44 were not used
    assert loss("rtn", 4.5, 0.44, small) == pytest.approx(0.102, rel=0.03)
    for mixes in TABLES.values():
        measured = sorted(mixes, key=lambda mix: mixes[mix])
        assert sorted(mixes, key=lambda mix: loss("rtn", mix[0], mix[1], small)) == measured
    assert "small.toml" in small.source_of("pruning")


@pytest.mark.parametrize(
    ("method", "bits", "other", "published", "factor"),
    [
        ("gguf-iq", 2.93, None, 0.0926, 1.5),  # MiMo-V2.5
        ("gguf-iq", 2.16, None, 0.298, 1.5),  # DeepSeek-V4-Flash IQ2_XXS: 78.5 GB of 291e9 weights
        ("gguf-iq", 2.57, None, 0.178, 1.5),  # its IQ2_S
        ("gguf-iq", 2.97, None, 0.093, 1.5),  # its IQ3_XXS
        ("gguf-iq", 3.06, None, 0.244, 2.5),  # Llama-4-Scout
        ("gguf-k", 5.5, None, 0.0108, 1.5),  # Llama-3-8B Q5_K_M
        ("gguf-k", 8.5, None, 0.00109, 1.5),  # Qwen3.8-27B Q8_0
        ("gguf-k", 4.5, 8.5, 0.0102, 2.5),  # Qwen3.5-35B-A3B, attention at Q8_0
        ("compressed-tensors", 4.5, None, 0.0228, 1.5),  # Qwen3.8-27B AWQ int4, groups of 32
        ("fp8", 8.0, None, 0.0110, 2.0),  # Qwen3.8-27B; on a MoE .0184
        ("nvfp4", 4.5, 16.0, 0.0511, 1.5),  # GLM-5.3, experts only
        ("mxfp4", 4.25, None, 0.0524, 2.0),  # Qwen3.5-35B-A3B
    ],
)
def test_published_figures(method: str, bits: float, other: float | None, published: float, factor: float) -> None:
    assert published / factor < prior.quantization_loss(method, bits, other) < published * factor


def test_pruning_lies_among_the_measured_models() -> None:
    assert 0.0055 < prior.pruning_loss(0.25) < 0.32  # the small uneven model; GLM-5.3 less its 4 bits
    assert 0.150 < prior.pruning_loss(0.5) < 0.52  # the balanced and the uneven small model
    assert prior.pruning_loss(0.4) > 4 * prior.pruning_loss(0.25)  # GLM-5.1 looped at 40 %, not at 25 %


@pytest.mark.parametrize(
    ("bits", "order"),
    [
        (2.6, ["gguf-iq", "gguf-k", "gptq", "rtn"]),  # Llama-3-8B: IQ below Q2_K; uniform 2-bit grids fail
        (3.15, ["gguf-iq", "auto-round", "gptq", "rtn"]),  # Llama-3-8B: IQ3_XXS .18, EfficientQAT .14, AWQ .28
        (3.5, ["gguf-iq", "gguf-k"]),  # IQ3_S .111, Q3_K_S .200
        (4.25, ["gguf-iq", "gguf-k", "gptq", "nvfp4", "mxfp4"]),
        (4.5, ["gguf-k", "auto-round", "gptq", "nvfp4", "gguf-legacy"]),  # Q4_K_S .032, Q4_0 .072
        (8.0, ["auto-round", "gptq", "int8", "fp8"]),  # one suite: Q8_0 .0011, FP8 .0052
    ],
)
def test_the_order_of_methods_at_equal_bits(bits: float, order: list[str]) -> None:
    losses = [prior.quantization_loss(method, bits) for method in order]
    assert losses == sorted(losses)
    assert len(set(losses)) == len(losses)


def test_fp8_costs_more_than_six_bits_of_k() -> None:
    assert prior.quantization_loss("fp8", 8.0) > prior.quantization_loss("gguf-k", 6.5625)  # .0052 and .0020


@pytest.mark.parametrize(("group", "ct", "auto_round"), [(128, 4.125, 4.15625), (32, 4.5, 4.625)])
def test_the_same_weights_cost_the_same_in_either_container(group: int, ct: float, auto_round: float) -> None:
    assert ct == 4 + 16 / group
    assert auto_round == 4 + (16 + 4) / group
    assert prior.quantization_loss("ct", ct) == pytest.approx(
        prior.quantization_loss("auto-round", auto_round), rel=0.02
    )


def test_no_pruning_at_q5_k_beats_q8_0_with_40_percent_pruned() -> None:
    assert loss("gguf-k", 5.5) < loss("gguf-k", 8.5, 0.4)


@pytest.mark.parametrize(("method", "two", "three"), [("gguf-iq", 2.5, 3.5), ("gguf-k", 2.63, 3.5), ("ct", 2.25, 3.7)])
def test_two_bits_lose_to_three_with_28_percent_pruned(method: str, two: float, three: float) -> None:
    assert loss(method, two) > loss(method, three, 0.28)


@settings(deadline=None)
@given(st.sampled_from(METHODS), BITS, st.floats(0.5, 1.0))
def test_more_than_half_pruned_never_beats_three_bits(method: str, bits: float, ratio: float) -> None:
    worst = max(loss("gguf-iq", 3.06), loss("gguf-k", 3.44), loss("auto-round", 3.148), loss("ct", 3.325))
    assert loss(method, bits, ratio) > worst


def test_measured_shares_scale_the_cost() -> None:
    assert prior.measured_pruning_loss(0.25, 0.25) == pytest.approx(prior.pruning_loss(0.25))
    assert prior.measured_pruning_loss(0.25, 0.05) == pytest.approx(prior.pruning_loss(0.25) / 5)
    assert prior.measured_pruning_loss(0.0, 0.0) == 0


def test_every_number_names_its_sources() -> None:
    packaged = prior.default()
    used = {name for curve in packaged.curves.values() for name in curve.sources} | set(packaged.pruning.sources)
    assert used | {"attention-bits"} | set(packaged.kv_sources) == set(packaged.sources)
    for method in METHODS:
        assert packaged.curves[method].sources
        assert "[" in prior.source_of(method).splitlines()[1]
    assert ".0511" in prior.source_of("nvfp4")
    assert ".0117" in prior.source_of("kv")
    assert "AGAINST" in prior.source_of("pruning")
    assert all(a[1] > b[1] for curve in packaged.curves.values() for a, b in pairwise(curve.anchors))


def test_cache_types() -> None:
    assert prior.kv_loss("f16") == prior.kv_loss("bf16") == prior.kv_loss("auto") == 0
    assert 0.0008 <= prior.kv_loss("q8_0") <= 0.0067  # Llama-3-8B; Qwen3.6-35B-A3B
    assert prior.kv_loss("q8_0") < prior.kv_loss("fp8") < 0.0117 < prior.kv_loss("q4_0")  # the rotated 4 bits
    # weights before cache: a step from Q4_K to Q3_K costs more than an 8-bit cache
    step = prior.quantization_loss("gguf-k", 3.9) - prior.quantization_loss("gguf-k", 4.5)
    assert prior.kv_loss("q8_0") < step
    with pytest.raises(ReapcError, match=r"'q3_0'.*q8_0"):
        prior.kv_loss("q3_0")


def test_plain_is_free_and_an_unknown_method_is_refused() -> None:
    assert prior.quantization_loss("plain", 8) == 0
    assert "no loss" in prior.source_of("plain")
    with pytest.raises(ReapcError, match=r"'gguf-q'.*plain.*gguf-iq"):
        prior.quantization_loss("gguf-q", 4)
    with pytest.raises(ReapcError, match="more than 0"):
        prior.quantization_loss("gguf-k", 0)
    with pytest.raises(ReapcError, match=r"prune ratio 1\.5"):
        prior.pruning_loss(1.5)


def test_a_file_of_ones_own_replaces_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        [quantization]
        other_share = 0.5
        [quantization.methods.gguf-iq]
        anchors = [[4.25, 0.02]]
        sources = ["mine"]
        [pruning]
        anchors = [[0.25, 0.01], [0.5, 0.04]]
        [sources.mine]
        what = "my model"
        where = "reapc compare"
        figure = "IQ4_XS .02"
        """
    )
    mine = prior.load(file)
    assert mine.quantization_loss("gguf-iq", 4.25) == pytest.approx(0.02, rel=1e-3)
    assert mine.quantization_loss("gguf-iq", 4.25, 16) == pytest.approx(0.01, rel=1e-3)
    assert mine.pruning_loss(0.125) == pytest.approx(0.005)  # linear below the first anchor
    assert mine.pruning_loss(1.0) == pytest.approx(0.16)  # the power goes on
    assert mine.quantization_loss("gguf-k", 3.0) == prior.quantization_loss("gguf-k", 3.0)
    assert "my model: IQ4_XS .02 [reapc compare]" in mine.source_of("gguf-iq")
    assert "GLM" not in mine.source_of("pruning")
    assert prior.quantization_loss("gguf-iq", 4.25) == pytest.approx(0.034, rel=1e-3)  # the packaged one stays


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pruning]\nanchors = [[0.5, 0.1], [0.25, 0.2]]", "pruning.anchors = .*both rising"),
        ("[pruning]\nanchors = [[0.5, 0.1], [1.5, 0.2]]", "ratios up to 1"),
        ("[pruning]\nlinear = 2", "pruning.anchors = None"),
        ("[quantization.methods.gptq]\nanchors = [[3, 0.1], [4, 0.2]]", "methods.gptq.anchors = .*KL falling"),
        ("[quantization.methods.gptq]\nanchors = [[3, -0.1]]", "methods.gptq.anchors"),
        ("[quantization.methods.gptq]\nanchors = [[16, 0.1]]", "below 16"),
        ("[quantization.methods.gptq]\nanchors = [['3', 0.1]]", "methods.gptq.anchors"),
        ("[quantization.methods.gptq]\nanchors = [[3, 0.1]]\nbits = 3", "gptq.bits: unknown"),
        ("[quantization.methods.gptq]\nanchors = [[3, 0.1]]\nsources = ['nobody']", "'nobody' has no table"),
        ("[quantization]\nother_share = 1.0", "other_share = 1.0; expected 0 to less than 1"),
        ("[quantization]\nslope = true", "slope = True"),
        ("[quantization]\nshare = 1", "quantization.share: unknown; expected other_share"),
        ("[quantization]\nmethods = 1", "quantization.methods = 1; expected a table"),
        ("[quantization.aliases]\nfp9 = 'fp10'", "aliases.fp9 = 'fp10'"),
        ("[router]\nfused_also = 'no'", "router.fused_also = 'no'"),
        ("[kv]\nlosses = {f16 = 'x'}", "kv.losses.f16 = 'x'"),
        ("[kv]\nf16 = 1", "kv.f16: unknown"),
        ("[sources.x]\nwhat = 'a'", "sources.x"),
        ("[loss]\na = 1", "loss: not a table of a prior; expected quantization"),
        ("quantization = 3", "quantization: not a table"),
        ("a = ", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ReapcError, match=message) as caught:
        prior.load(file)
    assert "bad.toml" in caught.value.message
    assert caught.value.exit_code == 2


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReapcError, match=r"absent.toml: cannot be read"):
        prior.load(tmp_path / "absent.toml")


def test_a_call_is_cheap() -> None:
    calls = 2000  # some thousands per command; measured 0.5 us each, the limit leaves room for a busy machine
    seconds = min(timeit.repeat(lambda: prior.quantization_loss("gguf-iq", 2.7), number=calls, repeat=5))
    assert seconds / calls < 20e-6
