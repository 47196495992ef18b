"""Healing: the refit against least squares by numpy, and whole models that come closer to their original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens, run_main

from reapc.checkpoint.reader import Checkpoint
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import choose
from reapc.prune.heal import heal
from reapc.prune.refit import RIDGES, Normal, solve
from reapc.prune.rewrite import prune
from reapc.stream.tokens import write_tokens
from reapc.verify.fidelity import compare


def equations(pairs: torch.Tensor, lacking: torch.Tensor) -> Normal:
    return Normal(pairs.T @ pairs, pairs.T @ lacking)


@pytest.mark.parametrize("count", [200, 7])
def test_refit_is_ridge_least_squares_and_both_forms_agree(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    pairs = torch.randn(count, 16, generator=random, dtype=torch.float64)
    truth = torch.randn(5, 16, generator=random, dtype=torch.float64)
    lacking = pairs @ truth.T + 0.1 * torch.randn(count, 5, generator=random, dtype=torch.float64)
    fit = equations(pairs, lacking)
    found = solve(fit, fit)
    assert found.ridge == min(RIDGES)
    strength = found.ridge * float((pairs * pairs).sum()) / 16
    augmented = np.vstack([pairs.numpy(), np.sqrt(strength) * np.eye(16)])
    expected = np.linalg.lstsq(augmented, np.vstack([lacking.numpy(), np.zeros((16, 5))]), rcond=None)[0].T
    np.testing.assert_allclose(found.change, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(solve(fit, fit, pairs).change, expected, rtol=1e-8, atol=1e-10)


def test_other_tokens_choose_the_strength_and_may_refuse() -> None:
    random = torch.Generator().manual_seed(0)
    pairs = torch.randn(20, 16, generator=random, dtype=torch.float64)
    noise = torch.randn(20, 5, generator=random, dtype=torch.float64)
    other = torch.randn(400, 16, generator=random, dtype=torch.float64)
    unrelated = torch.randn(400, 5, generator=random, dtype=torch.float64)
    fit = equations(pairs, noise)
    assert solve(fit, fit).ridge == min(RIDGES)
    assert solve(fit, equations(other, unrelated)).ridge > 0.1
    against = solve(fit, equations(pairs, -noise))
    assert against.ridge == float("inf")
    assert not against.change.any()


def test_a_change_that_was_made_counts_from_where_it_began() -> None:
    random = torch.Generator().manual_seed(1)
    pairs = torch.randn(50, 8, generator=random, dtype=torch.float64)
    lacking = torch.randn(50, 3, generator=random, dtype=torch.float64)
    change = torch.randn(3, 8, generator=random, dtype=torch.float64)
    left = equations(pairs, lacking - pairs @ change.T)
    torch.testing.assert_close(left.plus(change).right, equations(pairs, lacking).right)


def test_a_pruned_model_comes_closer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4, mlp_only_layers=[1])
    original = Checkpoint(folder)
    scores = observe(original, make_tokens(16, 32, seed=1), tmp_path / "w", Silent())
    prune(original, choose(scores, "reap", 6), tmp_path / "pruned", Silent())
    fit, choice = make_tokens(160, 32, seed=2, padded=True), make_tokens(40, 32, seed=3, padded=True)
    pruned, work = Checkpoint(tmp_path / "pruned"), tmp_path / "w"
    reports = heal(original, pruned, fit, choice, work, tmp_path / "healed", Silent())
    report = make_tokens(16, 32, seed=4)
    before = compare(folder, tmp_path / "pruned", report, Silent())
    after = compare(folder, tmp_path / "healed", report, Silent())
    assert [r.layer for r in reports] == [0, 2]
    assert all(r.kept and r.choice[1] < r.choice[0] for r in reports)
    assert after.kl < 0.9 * before.kl


def test_heal_command(tmp_path: Path, capsys) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4)
    original = Checkpoint(folder)
    tokens = make_tokens(60, 32, seed=1)
    scores = observe(original, tokens, tmp_path / "w", Silent(), moments=False)
    prune(original, choose(scores, "reap", 6), tmp_path / "pruned", Silent())
    write_tokens(tmp_path / "tokens", tokens)
    arguments = ("heal", folder, tmp_path / "pruned", "--tokens", tmp_path / "tokens", "--out", tmp_path / "healed")
    code, text, err = run_main(capsys, *arguments, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["healed"] == (found["after"]["kl"] <= found["before"]["kl"])
    healed, pruned = Checkpoint(tmp_path / "healed"), Checkpoint(tmp_path / "pruned")
    changed = {n for n in healed.entries if not torch.equal(healed.tensor(n), pruned.tensor(n))}
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert bool(changed) == found["healed"]
    code, _, err = run_main(capsys, *arguments)
    assert (code, "exists already" in err) == (2, True)
