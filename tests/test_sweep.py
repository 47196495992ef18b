"""``reapc sweep``: the grid at equal bytes, the panel's statistics, and a real sweep of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_project, make_tokens, run_main
from gguf import GGUFReader

from reapc.arch import load_config, model_spec
from reapc.errors import CannotBeDone, ReapcError
from reapc.formats import weights
from reapc.sweep.frontier import ALL_EXPERTS, OURS, frontier, series_of
from reapc.sweep.grid import Budget, Mix, at_budget, at_ratios, bytes_of, parse_budgets, parse_formats, parse_ratios
from reapc.sweep.panel import Sequences, by_sequence, halves, kl_interval, ratio_interval
from reapc.sweep.run import Point, Settings, expanded
from reapc.verify.fidelity import measure
from reapc.verify.fit import tensor_bytes

FORMATS = ("Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_M")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(
        tmp_path_factory.mktemp("sweep"), "", sequences=30, num_experts=12, num_experts_per_tok=4, hidden_size=256,
        moe_intermediate_size=256, head_dim=64, dtype=torch.bfloat16,
    )  # fmt: skip
    from reapc.stream.tokens import write_tokens

    write_tokens(folder / "panel.safetensors", make_tokens(8, 48, 2000, seed=3))
    return folder


@pytest.fixture(scope="module")
def spec(project: Path):
    return model_spec(load_config(project / "model"), "config.json")


class TestGrid:
    def test_budgets_are_bits_of_the_whole_model_or_sizes(self, spec) -> None:
        found = parse_budgets("2.5, 3bpw, 1MiB", spec)
        assert {budget.name: budget.bytes for budget in found} == {
            "2.5 bpw": int(2.5 * spec.parameters / 8),
            "3 bpw": 3 * spec.parameters // 8,
            "1.0 MiB": 1 << 20,
        }
        assert [budget.bytes for budget in found] == sorted(budget.bytes for budget in found)

    def test_every_mix_is_within_the_budget_and_one_expert_more_is_not(self, spec) -> None:
        budget = parse_budgets("4.5", spec)[0]
        found = at_budget(spec, budget, FORMATS, max_ratio=0.6, mixes=9)
        assert len(found) == len({mix.format for mix in found}) >= 3
        for mix in found:
            assert mix.bytes == bytes_of(spec, mix.format, mix.kept) <= budget.bytes
            if mix.kept < spec.num_experts:
                assert bytes_of(spec, mix.format, mix.kept + 1) > budget.bytes

    def test_of_what_holds_every_expert_only_the_largest(self, spec) -> None:
        budget = parse_budgets("9", spec)[0]
        assert [mix.format for mix in at_budget(spec, budget, FORMATS, max_ratio=0.5, mixes=3)] == ["Q8_0"]

    def test_a_budget_too_small_says_the_least(self, spec) -> None:
        with pytest.raises(CannotBeDone, match="the fewest allowed"):
            at_budget(spec, Budget("x", 1000), FORMATS, max_ratio=0.5, mixes=3)

    def test_ratios(self, spec) -> None:
        assert parse_ratios("0.1..0.4") == [0.1, 0.2, 0.3, 0.4]
        assert [(mix.format, mix.kept) for mix in at_ratios(spec, [0.25, 0.5], ["Q8_0"])] == [("Q8_0", 9), ("Q8_0", 6)]
        for wrong in ("1.0", "x", "-0.1", "0.5..0.1"):
            with pytest.raises(ReapcError, match="expected ratios"):
                parse_ratios(wrong)

    def test_formats(self, spec) -> None:
        assert parse_formats("q4_k,gptq-w4g128", spec) == ("Q4_K_M", "gptq-w4g128")
        assert "IQ2_XXS" in parse_formats("auto", spec)
        assert parse_formats("bf16,BF16", spec) == ("bf16", "BF16")  # a folder, and a GGUF file
        with pytest.raises(ReapcError, match="no such format"):
            parse_formats("q99", spec)

    def test_what_keeps_every_expert_has_no_criterion(self) -> None:
        settings = Settings(("reap", "ean"), (False, True))
        found = expanded([Mix("Q8_0", 12, 1), Mix("Q8_0", 12, 1), Mix("Q4_0", 8, 1)], 12, settings)
        assert [mix.name for mix in found] == [
            "Q8_0-12e", "Q4_0-8e-reap", "Q4_0-8e-reap-healed", "Q4_0-8e-ean", "Q4_0-8e-ean-healed",
        ]  # fmt: skip

    def test_what_is_quantized_may_be_healed_after_it(self) -> None:
        settings = Settings(("reap",), (False, True), refit=True)
        found = expanded([Mix("Q8_0", 12, 1), Mix("BF16", 8, 1), Mix("bf16", 8, 1), Mix("fp8", 8, 1)], 12, settings)
        assert [mix.name for mix in found if mix.refit] == ["Q8_0-12e-refit", "fp8-8e-reap-healed-refit"]
        assert {mix.name for mix in found if mix.healed} >= {"BF16-8e-reap-healed", "bf16-8e-reap-healed"}


def _point(kl: np.ndarray, mix: Mix) -> Point:
    return Point(mix, Sequences(kl, np.ones_like(kl), np.full(len(kl), 10.0)), mix.bytes, 0.0)


class TestPanel:
    def test_sequences_together_are_the_whole(self) -> None:
        from reapc.observe.reference import SequenceReference

        tokens = make_tokens(4, 12, 50, padded=True)
        random = np.random.default_rng(0)
        a, b = (np.log(random.dirichlet(np.ones(50), (4, 12))).astype(np.float32) for _ in range(2))
        references = [SequenceReference.of(a[i], tokens.input_ids[i], True) for i in range(4)]
        whole = measure(tokens, references, iter(b))
        found = by_sequence(tokens, references, iter(b))
        assert found.mean(np.arange(4)) == pytest.approx((whole.kl, whole.top1))
        assert found.tokens.sum() == whole.tokens

    def test_halves_are_disjoint_and_hold_every_domain(self) -> None:
        tokens = make_tokens(10, 4)
        tokens = type(tokens)(tokens.input_ids, tokens.mask, np.array([0] * 4 + [1] * 6, np.int32), ("a", "b"))
        picking, reporting = halves(tokens)
        assert not set(picking) & set(reporting)
        assert len(picking) + len(reporting) == 10
        for part in (picking, reporting):
            assert set(tokens.domain[part]) == {0, 1}

    def test_intervals_of_a_mean_and_of_a_ratio(self) -> None:
        random = np.random.default_rng(0)
        kl = random.exponential(1.0, 200)
        figures = Sequences(kl, kl, np.full(200, 7.0))
        half = Sequences(kl / 2, kl, np.full(200, 7.0))
        rows = np.arange(0, 200, 2)
        low, high = kl_interval(figures, rows)
        assert low < figures.mean(rows)[0] < high
        assert ratio_interval(half, figures, rows) == pytest.approx((0.5, 0.5))  # paired, so there is no doubt
        assert kl_interval(figures, rows[:3]) is None

    def test_the_frontier_picks_on_one_half_and_reports_on_the_other(self) -> None:
        """Two equal ways: what looks better on the half that picks is reported at what it is on the other."""
        tokens = make_tokens(8, 4)
        picking, reporting = halves(tokens)
        lucky, steady = np.full(8, 1.0), np.full(8, 1.0)
        lucky[picking], lucky[reporting] = 0.5, 3.0
        points = {
            "lucky": _point(lucky, Mix("Q4_0", 6, 90, "reap")),
            "steady": _point(steady, Mix("Q3_K_M", 8, 95, "reap")),
            "all": _point(np.full(8, 2.0), Mix("Q2_K", 12, 99)),
            "large": _point(np.zeros(8), Mix("Q8_0", 12, 101)),
            "theirs": _point(np.full(8, 1.5), Mix("theirs", 6, 80)),
        }
        found = frontier(points, [Budget("b", 100)], tokens, 12, ["theirs"])
        rows = {row.series: row for row in found.rows["b"]}
        assert set(rows) == {ALL_EXPERTS, "reap, quantized", "theirs", OURS}
        assert (rows["reap, quantized"].point, rows["reap, quantized"].kl) == ("lucky", 3.0)
        assert rows[OURS].kl == 3.0
        assert rows[ALL_EXPERTS].point == "all"  # the larger one is beyond the budget
        assert found.against["b"][:2] == ("reap, quantized", 1.0)

    def test_series(self) -> None:
        assert series_of(Mix("Q4_0", 6, 1, "ean", True), 12) == "ean, healed, quantized"
        assert series_of(Mix("Q4_0", 12, 1), 12) == ALL_EXPERTS
        assert series_of(Mix("Q4_0", 12, 1, refit=True), 12) == f"{ALL_EXPERTS} and healed"
        assert series_of(Mix("x", 6, 1, "ean", True, refit=True), 12) == "ean, healed, quantized and healed"


def parameters(project: Path) -> int:
    return model_spec(load_config(project / "model"), "config.json").parameters


def _sweep(capsys, project: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return run_main(
        capsys, "sweep", project / "model", "--tokens", project / "tokens.safetensors", "--panel",
        project / "panel.safetensors", "--pre-tokenizer", "qwen2", "--out", out, *more,
    )  # fmt: skip


def test_a_sweep_measures_the_grid_and_goes_on_where_it_was(project: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "sweep"
    grid = ("--budgets", "5", "--formats", "Q8_0,Q4_K_M,IQ4_XS", "--criteria", "reap", "--max-ratio", "0.6", "--json")
    from reapc.sweep.run import Sweep

    whole, count = Sweep._measured, [0]

    def stopped(self, *arguments):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Sweep, "_measured", stopped)
    code, _, err = _sweep(capsys, project, out, *grid)
    assert code == 130
    assert len(list((out / "points").glob("*.json"))) == 2
    files = {}

    def seen(self, stored: Path, mix: Mix, result: Path, *rest):
        reader = GGUFReader(str(result))
        files[mix.name] = (sum(-(-t.n_bytes // 32) * 32 for t in reader.tensors), mix.bytes)
        return whole(self, stored, mix, result, *rest)

    monkeypatch.setattr(Sweep, "_measured", seen)
    code, text, err = _sweep(capsys, project, out, *grid)
    assert code == 0, err
    found = json.loads(text)
    stored = json.loads((out / "sweep.json").read_text())
    assert len(stored["points"]) == 2 + len(files)  # the two of the first run were not built again
    assert all(real == predicted for real, predicted in files.values())
    rows = {row["series"]: row for row in found["rows"]["5 bpw"]}
    assert {ALL_EXPERTS, "reap, quantized", "reap, healed, quantized", OURS} <= set(rows)
    assert any(name.startswith("joint") for name in rows)
    assert all(row["low"] is None for row in rows.values())  # four sequences report: too few to say
    assert rows[OURS]["kl"] == min(row["kl"] for row in rows.values() if row["point"] == rows[OURS]["point"])
    assert [path.name for path in (out / "stages").iterdir()] == ["observe"]  # nothing that was built is left
    assert not list((out / "stages").rglob("*.gguf"))
    assert (out / "frontier.md").read_text().count("\n| 5 bpw |") == len(rows)

    drawn = json.loads((out / "frontier.json").read_text())
    assert {point["label"] for point in drawn} == set(stored["points"])
    page = (out / "frontier.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page

    monkeypatch.setattr(Sweep, "_measured", lambda *a: pytest.fail("a point was measured twice"))
    assert json.loads(_sweep(capsys, project, out, *grid)[1]) == found


def test_models_of_others_are_on_the_same_panel(project: Path, capsys, tmp_path: Path) -> None:
    """The model itself as if somebody else had made it: no KL to itself."""
    code, text, err = _sweep(
        capsys, project, tmp_path / "o", "--budgets", "40", "--formats", "Q8_0", "--heal", "no", "--no-joint", "--also",
        f"them={project / 'model'}", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = {row["series"]: row for row in json.loads(text)["rows"]["40 bpw"]}
    assert rows["them"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[ALL_EXPERTS]["kl"] > rows["them"]["kl"]


def test_pruning_alone_at_ratios_in_folders_and_in_fp8(project: Path, capsys, tmp_path: Path) -> None:
    """No GGUF: the streamed pass measures folders, unquantized and quantized."""
    from transformers import Qwen3MoeForCausalLM

    theirs = tmp_path / "theirs"
    Qwen3MoeForCausalLM.from_pretrained(project / "model", dtype=torch.bfloat16).save_pretrained(theirs)
    code, _, err = _sweep(
        capsys, project, tmp_path / "o", "--ratios", "0,0.25", "--formats", "bf16,fp8", "--heal", "no", "--criteria",
        "reap", "--also", f"them={theirs}", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "o" / "sweep.json").read_text())
    points = found["points"]
    # tensors are counted, not headers: the model in the budget's own bf16 is within it
    assert "them" in {row["series"] for row in found["rows"]["bf16 with 12"]}
    del points["them"]
    assert "counts as what it has" not in err
    assert set(points) == {"bf16-12e", "fp8-12e", "bf16-9e-reap", "fp8-9e-reap"}
    assert points["bf16-12e"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < points["fp8-12e"]["kl"] < points["bf16-9e-reap"]["kl"]
    assert points["fp8-9e-reap"]["bytes"] < points["bf16-9e-reap"]["bytes"]


def test_what_a_float32_source_leaves_counts_as_it_is(project: Path, capsys, tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    plain = Qwen3MoeForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    code, _, err = run_main(
        capsys, "sweep", tmp_path / "plain", "--tokens", project / "tokens.safetensors", "--panel",
        project / "panel.safetensors", "--ratios", "0", "--formats", "bf16", "--heal", "no", "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 0, err
    assert "counts as what it has" in err
    found = json.loads((tmp_path / "o" / "sweep.json").read_text())
    assert found["points"]["bf16-12e"]["bytes"] == 4 * parameters(project)
    assert found["rows"]["bf16 with 12"] == []  # and so it is not within that budget


def test_what_is_quantized_is_healed_after_it(project: Path, capsys, tmp_path: Path) -> None:
    code, _, err = _sweep(
        capsys, project, tmp_path / "o", "--ratios", "0,0.25", "--formats", "Q4_K_M,fp8", "--heal", "no", "--criteria",
        "reap", "--refit", "--json",
    )  # fmt: skip
    assert code == 0, err
    points = json.loads((tmp_path / "o" / "sweep.json").read_text())["points"]
    plain = {"Q4_K_M-12e", "fp8-12e", "Q4_K_M-9e-reap", "fp8-9e-reap"}
    assert set(points) == plain | {f"{name}-refit" for name in plain}
    assert all(points[f"{name}-refit"]["bytes"] == points[name]["bytes"] for name in plain)
    assert points["Q4_K_M-9e-reap-refit"]["kl"] < points["Q4_K_M-9e-reap"]["kl"]


def test_the_allocator_mixes_widths_of_checkpoints_too(project: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    """One joint checkpoint for each budget, in the method and the groups of the formats asked for, of the bytes that
    were predicted, and no GGUF file where none is asked for."""
    from reapc.sweep.run import Sweep

    whole, sizes = Sweep._measured, {}

    def seen(self, stored: Path, mix: Mix, result: Path, *rest):
        sizes[mix.name] = (tensor_bytes(result), mix.bytes)
        return whole(self, stored, mix, result, *rest)

    monkeypatch.setattr(Sweep, "_measured", seen)
    grid = (
        "--budgets", "7.2,9", "--formats", "ct-w4g32,ct-w8g32", "--mixes", "0", "--heal", "no", "--criteria", "reap",
    )  # fmt: skip
    code, _, err = _sweep(capsys, project, tmp_path / "o", *grid, "--iters", "0", "--refit")
    assert code == 0, err
    points = json.loads((tmp_path / "o" / "sweep.json").read_text())["points"]
    joint = {name: point for name, point in points.items() if name.startswith("joint-ct@")}
    assert {name.partition("@")[2].partition("-")[0] for name in joint} == {"7.2bpw", "9bpw"}
    assert not any(name.startswith("joint@") for name in points)
    assert all(weights.parse(point["format"]).overrides for point in joint.values())
    assert {fmt.group_size for point in joint.values() for fmt in (weights.parse(point["format"]),)} == {32}
    assert sizes == {name: (real, real) for name, (real, _) in sizes.items()}
    rows = json.loads((tmp_path / "o" / "sweep.json").read_text())["rows"]
    for budget, bits in (("7.2 bpw", 7.2), ("9 bpw", 9)):
        row = next(row for row in rows[budget] if row["series"] == "joint, ct")
        assert row["bytes"] <= bits / 8 * parameters(project)
        assert row["kl"] <= min(row["kl"] for row in rows[budget] if row["series"] == ALL_EXPERTS)
    assert points["joint-ct@9bpw-12e"]["kl"] < points["joint-ct@7.2bpw-12e"]["kl"]

    monkeypatch.setattr(Sweep, "_measured", lambda *a: pytest.fail("a point was measured twice"))
    code, _, err = _sweep(capsys, project, tmp_path / "o", *grid, "--iters", "0", "--refit")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --budgets or --ratios"),
        (("--budgets", "3", "--ratios", "0.5"), "either --budgets or --ratios"),
        (("--budgets", "3", "--also", "nothing"), "NAME=PATH"),
        (("--budgets", "3", "--also", "a=/nowhere"), "does not exist"),
        (("--budgets", "3x"), "3x"),
        (("--budgets", "3", "--criteria", "best"), "no such criterion"),
    ],
)
def test_wrong_requests(project: Path, capsys, tmp_path: Path, options, message: str) -> None:
    code, _, err = _sweep(capsys, project, tmp_path / "o", *options)
    assert (code, message in err) == (2, True), err
