"""Healing: the refit against least squares by numpy, and whole models that come closer to their original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens, run_main
from family_models import make as make_family

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import CannotBeDone, ReapcError
from reapc.healing import split
from reapc.observe.observe import observe
from reapc.progress import Silent
from reapc.prune.criteria import choose, expert_values
from reapc.prune.heal import Healing, heal
from reapc.prune.refit import RIDGES, Refit, basis_of, solve
from reapc.prune.rewrite import prune
from reapc.quantize.folder_form import FolderForm
from reapc.stream import StreamedModel
from reapc.stream.tokens import Tokens, write_tokens
from reapc.verify.fidelity import compare


def solved(pairs: torch.Tensor, lacking: torch.Tensor, other: torch.Tensor, lacks: torch.Tensor, **more) -> Refit:
    """``solve`` from the tokens themselves."""
    basis = basis_of(pairs.T @ pairs, other.T @ other, more.pop("dual", None))
    return solve(basis, pairs.T @ lacking, other.T @ lacks, **more)


@pytest.mark.parametrize("count", [200, 7])
def test_refit_is_ridge_least_squares_and_both_forms_agree(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    pairs = torch.randn(count, 16, generator=random, dtype=torch.float64)
    truth = torch.randn(5, 16, generator=random, dtype=torch.float64)
    lacking = pairs @ truth.T + 0.1 * torch.randn(count, 5, generator=random, dtype=torch.float64)
    found = solved(pairs, lacking, pairs, lacking)
    assert found.ridge == min(RIDGES)
    strength = found.ridge * float((pairs * pairs).sum()) / 16
    augmented = np.vstack([pairs.numpy(), np.sqrt(strength) * np.eye(16)])
    expected = np.linalg.lstsq(augmented, np.vstack([lacking.numpy(), np.zeros((16, 5))]), rcond=None)[0].T
    np.testing.assert_allclose(found.change, expected, rtol=1e-8, atol=1e-10)
    if count < 16:
        dual = solved(pairs, lacking, pairs, lacking, dual=pairs)
        np.testing.assert_allclose(dual.change, expected, rtol=1e-8, atol=1e-10)


def test_other_tokens_choose_the_strength_and_may_refuse() -> None:
    random = torch.Generator().manual_seed(0)
    pairs = torch.randn(20, 16, generator=random, dtype=torch.float64)
    noise = torch.randn(20, 5, generator=random, dtype=torch.float64)
    other = torch.randn(400, 16, generator=random, dtype=torch.float64)
    unrelated = torch.randn(400, 5, generator=random, dtype=torch.float64)
    assert solved(pairs, noise, pairs, noise).ridge == min(RIDGES)
    assert solved(pairs, noise, other, unrelated).ridge > 0.1
    against = solved(pairs, noise, pairs, -noise)
    assert against.ridge == float("inf")
    assert not against.change.any()


def test_a_change_that_was_made_counts_from_where_it_began() -> None:
    """A second turn with nothing else changed gives the same again."""
    random = torch.Generator().manual_seed(1)
    pairs = torch.randn(50, 8, generator=random, dtype=torch.float64)
    other = torch.randn(40, 8, generator=random, dtype=torch.float64)
    truth = torch.randn(3, 8, generator=random, dtype=torch.float64)
    lacking, lacks = pairs @ truth.T, other @ truth.T
    first = solved(pairs, lacking, other, lacks)
    assert first.change.any()
    left, lacks_left = lacking - pairs @ first.change.T, lacks - other @ first.change.T
    second = solved(pairs, left, other, lacks_left, made=first.change)
    torch.testing.assert_close(second.change, first.change)


FIT, CHOICE = make_tokens(160, 32, seed=2, padded=True), make_tokens(40, 32, seed=3, padded=True)


def pruned_by_half(folder: Path, root: Path) -> Path:
    """The model pruned to its best half of experts."""
    original = Checkpoint(folder)
    scores = observe(original, make_tokens(16, 32, seed=1), root / "w", Silent(), moments=False)
    half = original.spec.num_experts // 2
    prune(original, choose(scores, "reap", half), root / "pruned", Silent(), values=expert_values(scores, "reap"))
    return root / "pruned"


def kl(folder: Path, other: Path) -> float:
    return compare(folder, other, make_tokens(16, 32, seed=4), Silent()).kl


def test_a_pruned_model_comes_closer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4, mlp_only_layers=[1])
    pruned = pruned_by_half(folder, tmp_path)
    form = FolderForm(Checkpoint(pruned))
    reports = heal(Checkpoint(folder), form, FIT, CHOICE, tmp_path / "w", tmp_path / "healed", Silent())
    assert [r.layer for r in reports] == [0, 2]
    assert all(r.kept and r.choice[1] < r.choice[0] for r in reports)
    assert kl(folder, tmp_path / "healed") < 0.9 * kl(folder, pruned)
    assert not (tmp_path / "w").exists()


def lacking(original: Checkpoint, healed: Checkpoint, layer: int, tokens: Tokens) -> float:
    """What the layer of one model lacks of the other's, as a share of it by token, both run from the ids on."""
    states = []
    mask = torch.from_numpy(tokens.mask)
    for checkpoint in (original, healed):
        model = StreamedModel(checkpoint)
        hidden = model.embed(torch.from_numpy(tokens.input_ids.astype(np.int64)))
        for index in range(layer + 1):
            with model.layer(index) as forward:
                hidden = forward(hidden, mask, None)
        states.append(hidden[mask].double())
    return float(((states[0] - states[1]).square().mean(-1) / states[0].square().mean(-1)).mean())


@pytest.mark.parametrize("name", ["bf16", "glm4_moe plain", "granitemoe", "gpt_oss", "minimax_m3"])
def test_what_is_lacking_is_what_the_healed_checkpoint_still_lacks(name: str, tmp_path: Path) -> None:
    """Experts one by one and together, (out, in) and (in, out), in float32 and bf16: the error that is reported of the
    first layer with experts is that of the files that were written, run anew."""
    if name == "bf16":
        make_model(tmp_path / "m", dtype=torch.bfloat16, num_experts_per_tok=4)
    else:
        make_family(name, tmp_path / "m")
    original = Checkpoint(tmp_path / "m")
    pruned = Checkpoint(pruned_by_half(tmp_path / "m", tmp_path))
    reports = heal(original, FolderForm(pruned), FIT, CHOICE, tmp_path / "w", tmp_path / "healed", Silent())
    first = reports[0]
    assert first.kept
    assert first.choice[1] < 0.99 * first.choice[0]
    error = lacking(original, Checkpoint(tmp_path / "healed"), first.layer, CHOICE)
    assert error == pytest.approx(first.choice[1], rel=1e-3)


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v4"])
def test_layers_that_do_more_than_add_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make_family(name, tmp_path / "m")
    pruned = Checkpoint(pruned_by_half(tmp_path / "m", tmp_path))
    with pytest.raises(CannotBeDone, match=f"of {name} does not simply add what its experts give"):
        heal(Checkpoint(tmp_path / "m"), FolderForm(pruned), FIT, CHOICE, tmp_path / "w", tmp_path / "healed", Silent())
    assert not (tmp_path / "healed").exists()


def test_an_interrupted_run_goes_on_at_its_layer_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4, mlp_only_layers=[1])
    original, pruned = Checkpoint(folder), Checkpoint(pruned_by_half(folder, tmp_path))

    def run(out: Path) -> None:
        heal(original, FolderForm(pruned), FIT, CHOICE, tmp_path / "w", out, Silent())

    run(tmp_path / "whole")
    real, seen = Healing._layer, []

    def counted(self: Healing, index: int) -> object:
        seen.append(index)
        if seen == [0, 1, 2]:
            real(self, index)  # the layer is written, its report is not
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(Healing, "_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    run(tmp_path / "resumed")
    assert seen == [0, 1, 2, 2]
    files = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "whole", tmp_path / "resumed")]
    assert files[0] == files[1]


def test_parts_of_the_tokens_are_disjoint_and_hold_every_domain() -> None:
    tokens = make_tokens(43, 8)
    domain = np.repeat([0, 1], [3, 40]).astype(np.int32)
    tokens = Tokens(
        np.arange(43, dtype=np.int32)[:, None] + np.zeros((1, 8), np.int32), tokens.mask, domain, ("a", "b")
    )
    parts = split(tokens)
    assert sorted(row for part in parts for row in part.input_ids[:, 0].tolist()) == list(range(43))
    assert [np.bincount(part.domain).tolist() for part in parts] == [[1, 28], [1, 6], [1, 6]]
    with pytest.raises(ReapcError, match="2 sequences of a: healing needs some to fit"):
        split(tokens.take(np.arange(1, 43)))


def test_heal_command(tmp_path: Path, capsys) -> None:
    folder = make_model(tmp_path / "m", num_experts_per_tok=4)
    pruned_by_half(folder, tmp_path)
    write_tokens(tmp_path / "tokens", make_tokens(60, 32, seed=1))
    arguments = ("heal", folder, tmp_path / "pruned", "--tokens", tmp_path / "tokens", "--out", tmp_path / "healed")
    code, text, err = run_main(capsys, *arguments, "--json")
    assert code == 0, err
    found = json.loads(text)
    before, after = found["before"], found["after"]
    assert found["healed"] == (after["kl"] <= before["kl"] and after["top1"] >= before["top1"] - 0.01)
    healed, pruned = Checkpoint(tmp_path / "healed"), Checkpoint(tmp_path / "pruned")
    changed = {n for n in healed.entries if not torch.equal(healed.tensor(n), pruned.tensor(n))}
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert bool(changed) == found["healed"]
    code, _, err = run_main(capsys, *arguments)
    assert (code, "exists already" in err) == (2, True)
