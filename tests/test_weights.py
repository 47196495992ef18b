"""Bytes of weight formats, by hand and against checkpoints that the quantizers' own packing rules describe."""

from __future__ import annotations

import pytest
from specs import demo_spec, qwen30b

from reapc.arch import known
from reapc.errors import ReapcError
from reapc.formats import shards, weights
from reapc.formats.weights import WeightFormat


def fmt(name: str) -> WeightFormat:
    found = weights.parse(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "size"),
    [
        # a linear of 128 rows and 256 columns, written out
        ("bf16", 128 * 256 * 2),
        ("gptq-w4g64", 128 * 256 // 2 + 4 * 128 * 2 + 4 * 128 // 2 + 256 * 4),  # weights, scales, zeros, g_idx
        ("auto-round-w4g64", 128 * 256 // 2 + 4 * 128 * 2 + 4 * 128 // 2),
        ("auto-round-w3g128", 128 * 256 * 3 // 8 + 2 * 128 * 2 + 2 * 128 * 3 // 8),
        ("auto-round-w2g32", 128 * 256 // 4 + 8 * 128 * 2 + 8 * 128 // 4),
        ("ct-w4g64", 128 * 256 // 2 + 4 * 128 * 2 + 16),  # weight_packed, weight_scale, weight_shape
        ("ct-w3g64", 128 * 256 * 3 // 8 + 4 * 128 * 2 + 16),  # one stream of bits along a row
        ("fp8-block", 128 * 256 + 2 * 4),  # one float32 scale per 128 x 128
        ("fp8", 128 * 256 + 128 * 4),
        ("int8", 128 * 256 + 128 * 2),
        ("nvfp4", 128 * 256 // 2 + 128 * 16 + 8),  # an fp8 scale per 16, two float32 for the whole
        ("mxfp4", 128 * 256 // 2 + 128 * 8),  # an e8m0 scale per 32
    ],
)
def test_a_linear_by_hand(name: str, size: int) -> None:
    assert fmt(name).linear_bytes(128, 256) == size


def test_published_checkpoints_in_their_own_formats() -> None:
    """Values in the headers of GLM-5.2-FP8 (github gogongxt/python): 753,375,793,584, MTP included, one of them a scale
    per 128 x 128 tile of an FP8 matrix."""
    spec = known.spec("zai-org/GLM-5.2-FP8")
    values = sum(
        (sum(r * c + -(-r // 128) * -(-c // 128) for r, c in group.linears) if group.linears else group.unit_parameters)
        * (spec.num_experts if group.per_expert else 1)
        * count
        for group, count in spec.groups(mtp=True)
    )
    assert values == 753_375_793_584
    full = weights.checkpoint_bytes(fmt("fp8-block"), spec, mtp=True)
    plain = sum(
        weights.stored_bytes(group) * (spec.num_experts if group.per_expert else 1) * count
        for group, count in spec.groups(mtp=True)
        if not group.linears
    )
    scales = 753_375_793_584 - spec.parameters - spec.mtp_parameters
    linears = sum(
        sum(r * c for r, c in group.linears) * (spec.num_experts if group.per_expert else 1) * count
        for group, count in spec.groups(mtp=True)
    )
    assert full == plain + linears + 4 * scales


def test_kimi_k2_int4_is_what_the_published_checkpoint_holds() -> None:
    """K2.6's headers: 170,738,182,128 values; its experts are int32 words of eight weights, a bf16 scale per 32 and two
    numbers for the shape; with 471,143,920 of the tower. Bytes follow."""
    spec = known.spec("moonshotai/Kimi-K2.5")
    form = fmt("ct-w4g32:experts")
    weights_in_words = values = 0
    for group, count in spec.groups():
        number = (spec.num_experts if group.per_expert else 1) * count
        size = group.unit_parameters
        values += (size // 8 + size // 32 + 2 if group.role == "expert" else size) * number
        weights_in_words += size * number if group.role == "expert" else 0
    assert values + 471_143_920 == 170_738_182_128
    tensors = weights_in_words // (7168 * 2048)
    expected = weights_in_words // 2 + weights_in_words // 32 * 2 + 16 * tensors
    expected += 2 * (spec.parameters - weights_in_words) + 2 * 471_143_920
    bias = sum(group.unit_parameters * spec.num_experts * count for group, count in spec.groups() if group.dtype)
    assert weights.checkpoint_bytes(form, spec) == expected + 2 * bias  # the router's bias is float32


def test_formats_leave_embeddings_head_router_and_norms_alone() -> None:
    spec = qwen30b()
    roles = spec.parameters_by_role()
    kept = 2 * (roles["embedding"] + roles["lm_head"] + roles["router"] + roles["norm"])
    for name in ("gptq-w4g128", "auto-round-w3g64", "fp8-block", "nvfp4"):
        form = fmt(name)
        heavy = sum(
            sum(form.linear_bytes(*shape) for shape in group.linears) * (128 if group.per_expert else 1) * count
            for group, count in spec.groups()
        )
        assert weights.checkpoint_bytes(form, spec) == heavy + kept
        only = weights.checkpoint_bytes(fmt(f"{name}:experts"), spec)
        assert weights.checkpoint_bytes(form, spec) < only < weights.checkpoint_bytes(fmt("bf16"), spec)


def test_shards_add_up_to_the_whole_where_everything_divides() -> None:
    """Qwen3-30B over 4 cards: experts and q, k, v, o once, norms and router four times; expert parallelism the same."""
    spec, form = qwen30b(), fmt("ct-w4g32")
    for group, _ in spec.groups():
        if group.parallel == "vocab":
            continue
        whole = weights.group_bytes(form, group, 128)
        for ep in (1, 4):
            shard = shards.shard(form, group, 4, ep, 4)
            held = 128 // ep if group.role == "expert" else 128
            rank = shard.fixed + shard.per_expert * held
            if group.parallel == "replicate":
                assert rank == whole
            elif group.role == "expert" and ep == 1:
                assert 4 * rank == whole + 3 * 16 * 128  # weight_shape, on every rank
            elif group.role == "expert":
                assert 4 * rank == whole
            else:
                assert 4 * rank == whole + 3 * 16


def test_what_does_not_divide_is_refused_by_name() -> None:
    assert "do not divide into groups of 128" in (
        weights.misfit(fmt("gptq-w4g128"), known.spec("openai/gpt-oss-20b")) or ""
    )
    assert weights.misfit(fmt("gptq-w4g64"), known.spec("openai/gpt-oss-20b")) is None
    with pytest.raises(ReapcError, match="groups of 128"):
        fmt("ct-w4g128").linear_bytes(128, 200)
    assert weights.misfit(fmt("bf16"), demo_spec()) is None


def test_names() -> None:
    assert weights.parse("Q4_K_M") is None
    assert fmt("GPTQ-W4G128").name == "gptq-w4g128"
    assert fmt("auto-round-w3g64:experts").experts_only
    for name in ("gptq-w3g128", "auto-round-w9g128", "ct-w4g16", "bf16:experts"):
        with pytest.raises(ReapcError):
            weights.parse(name)
    assert all(fmt(name).name == name for name in weights.names())
    bits = {name: fmt(name).bits_per_weight for name in weights.names()}
    assert bits["gptq-w4g128"] < bits["gptq-w4g64"] < bits["gptq-w4g32"] < bits["gptq-w8g128"]
