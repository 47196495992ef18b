"""The joint allocation: the solver against brute force, bytes against the rules, GLM-5 from its real config."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reapc.arch import known
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import gguf
from reapc.formats.gguf_types import padded
from reapc.planner import prior
from reapc.planner.allocate import Problem, allocate
from reapc.planner.damages import prior_damages, problem_of
from reapc.planner.tensor_groups import LADDER, file_parts


def random_problem(seed: int, *, cases: int, groups: int, options: int, devices: int, room: float) -> Problem:
    """Options with more bytes and less damage, some illegal; ``room``: from the least to the most bytes."""
    random = np.random.default_rng(seed)
    sizes = np.sort(random.integers(1, 60, (cases, groups, options)), axis=2)
    damage = -np.sort(-random.random((cases, groups, options)), axis=2)
    damage[:, :, 1:][random.random((cases, groups, options - 1)) < 0.1] = np.inf
    device = random.integers(0, devices, (cases, groups))
    low = np.stack([np.where(device == d, sizes[:, :, 0], 0).sum(1) for d in range(devices)], 1)
    high = np.stack([np.where(device == d, sizes[:, :, -1], 0).sum(1) for d in range(devices)], 1)
    capacity = np.floor(low + room * (high - low)).astype(np.int64)
    return Problem(np.arange(cases, 0, -1), random.random(cases) * 0.3, sizes, damage, device, capacity)


def brute_force(problem: Problem) -> float:
    """The least damage by trying every choice of every case."""
    cases, groups, options = problem.damage.shape
    best = np.inf
    for case in range(cases):
        for choice in product(range(options), repeat=groups):
            size = np.zeros(problem.capacity.shape[1], np.int64)
            damage = problem.fixed[case]
            for group, option in enumerate(choice):
                size[problem.device[case, group]] += problem.bytes[case, group, option]
                damage += problem.damage[case, group, option]
            if (size <= problem.capacity[case]).all():
                best = min(best, damage)
    return float(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 2), st.floats(0, 1.1))
def test_the_best_of_everything_is_found(seed: int, cases: int, devices: int, room: float) -> None:
    problem = random_problem(seed, cases=cases, groups=5, options=4, devices=devices, room=room)
    found = allocate(problem)
    best = brute_force(problem)
    assert found.best.damage == pytest.approx(best, rel=1.1e-3)
    assert found.lower_bound <= best + 1e-9
    assert (found.best.device_bytes <= problem.capacity[found.best.case]).all()
    again = allocate(problem)
    assert (again.best.options == found.best.options).all()
    assert again.best.case == found.best.case


def test_equal_layers_are_chosen_as_often_as_fits() -> None:
    # 10 equal groups of 10 or 20 bytes and room for three of the larger: any three, and nothing better.
    sizes = np.tile(np.array([10, 20]), (1, 10, 1))
    damage = np.tile(np.array([1.0, 0.5]), (1, 10, 1))
    problem = Problem(
        np.array([4]), np.zeros(1), sizes, damage, np.zeros((1, 10), np.int64), np.array([[135]])
    )  # fmt: skip
    found = allocate(problem)
    assert found.best.damage == pytest.approx(8.5)
    assert found.best.bytes == 130
    assert found.gap <= 1e-4


def test_nothing_fits_says_the_least_bytes() -> None:
    problem = random_problem(3, cases=2, groups=4, options=3, devices=1, room=0.5)
    least = int(problem.bytes[:, :, 0].sum(1).min())
    problem.capacity[:] = 3
    with pytest.raises(CannotBeDone, match=f"need {least} bytes"):
        allocate(problem)


@pytest.mark.parametrize(
    "model", ["zai-org/GLM-5", "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b", "moonshotai/Kimi-K2-Instruct"]
)
def test_bytes_are_those_of_the_rules(model: str) -> None:
    spec = known.spec(model)
    parts = file_parts(spec)
    for count in (spec.num_experts, spec.num_experts // 4 * 3):
        pruned = spec.with_experts(count)
        native = gguf.native_expert_type(spec)
        expected = 0
        for tensor in gguf.tensor_types(pruned, "Q8_0", True):
            kept = native if native and gguf.is_routed(tensor.name) and tensor.type == "Q8_0" else tensor.type
            expected += padded(gguf.tensor_bytes(kept, tensor.shape))
        types = {group.name: "Q8_0" for group in parts.groups}
        assert parts.bytes_of(types, count) == expected
        table = parts.table([count], LADDER)[0]
        assert table[:, LADDER.index("Q8_0")].sum() + parts.kept_bytes(count) == expected


def test_embeddings_get_no_type_that_needs_an_importance_matrix() -> None:
    spec = known.spec("zai-org/GLM-5")
    parts = file_parts(spec)
    by_name = {group.name: group for group in parts.groups}
    assert by_name["token_embd"].types == ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K")
    assert by_name["blk.3.ffn_gate_exps"].types == LADDER
    without = file_parts(spec, has_imatrix=False)
    assert all("IQ2_XXS" not in group.types for group in without.groups)
    with pytest.raises(ReapcError, match="no type 'Q4_X'"):
        file_parts(spec, ("Q4_X",))


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.5])
def test_glm5_under_the_prior(bits: float) -> None:
    spec = known.spec("zai-org/GLM-5")
    parts, counts = file_parts(spec), list(range(256, 127, -1))
    budget = int(bits / 8 * spec.parameters)
    fixed = [prior.pruning_loss(1 - count / 256) for count in counts]
    found = allocate(problem_of(parts, LADDER, counts, fixed, prior_damages(parts, spec, LADDER), budget))
    types = {group.name: LADDER[option] for group, option in zip(parts.groups, found.best.options, strict=True)}
    assert budget - 2**30 < parts.bytes_of(types, found.best.experts) <= budget
    assert found.relative_gap < 1e-3
    # more room never costs
    more = allocate(problem_of(parts, LADDER, counts, fixed, prior_damages(parts, spec, LADDER), budget + 2**33))
    assert more.best.damage <= found.best.damage
