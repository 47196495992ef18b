"""The baselines in benchmarks/baselines: merging, masks, and what is measured of them, on tiny random models."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_glm4, make_model, make_tokens
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "benchmarks" / "baselines"))

import llmcompressor_env
import llmcompressor_quantize
import llmcompressor_reap
from behaviour import Written, cross_loss, diversity, drift, jensen_shannon, written_by
from manifold import activations, off, plane_of, spread
from masks import acceptance, search
from merging import METHODS, aligned, average, by_output, by_router, distinct, dominant, frequency, merged
from run import main
from whole import kl, load, log_probs, moe_layers, one_expert, pruned, seen_by

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.progress import Silent
from reapc.prune.criteria import CRITERIA
from reapc.prune.rewrite import prune
from reapc.stream.tokens import Tokens, write_tokens

FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen3": lambda folder, **changes: make_model(folder, **{"mlp_only_layers": [], "num_hidden_layers": 1, **changes}),
    "glm4": lambda folder, **changes: make_glm4(folder, mtp=False, **{"num_hidden_layers": 2, **changes}),
}


@pytest.fixture(scope="session", params=FAMILIES)
def tiny_whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with one MoE layer; GLM's has a dense one before it, a shared expert and a bias that changes choices."""
    model = load(FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model"))
    _, block = only_block(model)
    if hasattr(block.gate, "e_score_correction_bias"):
        block.gate.e_score_correction_bias *= 0.3  # so that every expert is chosen by some token
    return model


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.from_numpy(make_tokens(40, 24).input_ids.astype(np.int64))


def only_block(model: Any) -> tuple[int, Any]:
    ((index, block),) = moe_layers(model)
    return index, block


# -- the models held whole


def test_what_is_seen_is_what_the_layer_computes_with(tiny_whole: Any, ids: Tensor) -> None:
    index, block = only_block(tiny_whole)
    inputs, _, gates, chosen = seen_by(tiny_whole, ids)[index]
    assert len(inputs) == ids.numel()
    rows = slice(0, 40)
    expected = torch.zeros_like(inputs[rows])
    for token in range(40):
        for gate, expert in zip(gates[token], chosen[token], strict=True):
            expected[token] += gate * one_expert(block.experts, int(expert), inputs[token : token + 1])[0]
    if hasattr(block, "shared_experts"):
        expected += block.shared_experts(inputs[rows])
    with torch.inference_mode():
        assert torch.allclose(block(inputs[None, rows])[0], expected, atol=1e-5)


def test_padding_is_not_seen(tiny_whole: Any) -> None:
    tokens = make_tokens(12, 24, padded=True)
    ids, mask = torch.from_numpy(tokens.input_ids.astype(np.int64)), torch.from_numpy(tokens.mask)
    index, _ = only_block(tiny_whole)
    all_of_it, real = seen_by(tiny_whole, ids)[index], seen_by(tiny_whole, ids, mask)[index]
    assert len(real.inputs) == mask.sum() < mask.numel()
    for part, whole in zip(real, all_of_it, strict=True):
        assert torch.equal(part, whole[mask.flatten()])


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_what_reapc_prune_writes(family: str, tmp_path: Path, ids: Tensor) -> None:
    folder = FAMILIES[family](tmp_path / "model", num_hidden_layers=3)
    random = np.random.default_rng(0)
    layers = Checkpoint(folder).spec.moe_layers
    assert len(layers) > 1
    kept = {layer: sorted(random.choice(12, 7, replace=False).tolist()) for layer in layers}
    prune(Checkpoint(folder), kept, tmp_path / "pruned", Silent())
    model = load(folder)
    before = log_probs(model, ids)
    found = log_probs(pruned(model, kept), ids)
    assert torch.equal(found, log_probs(load(tmp_path / "pruned"), ids))
    assert float(kl(before, found).mean()) > 1e-3
    assert torch.equal(before, log_probs(model, ids))  # the model itself stays


def test_pruned_refuses_what_the_router_cannot_hold(tiny_whole: Any) -> None:
    index, _ = only_block(tiny_whole)
    with pytest.raises(ValueError, match="2 experts, top-3"):
        pruned(tiny_whole, {index: [0, 1]})


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=2, mlp_only_layers=[0, 1])
    with pytest.raises(ReapcError, match="no MoE layer"):
        load(tmp_path / "model")


# -- merging


@pytest.mark.parametrize("method", METHODS)
def test_as_many_groups_as_experts_change_nothing(tiny_whole: Any, ids: Tensor, method: str) -> None:
    same = merged(tiny_whole, seen_by(tiny_whole, ids), 12, method)
    assert torch.equal(log_probs(same, ids), log_probs(tiny_whole, ids))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("permuted", [False, True])
def test_two_equal_experts_become_one_without_loss(tiny_whole: Any, ids: Tensor, method: str, permuted: bool) -> None:
    """The least used expert is made a copy of the one that M-SMoE joins it to, with its hidden units in another order:
    HC-SMoE finds it by its outputs, but only M-SMoE puts the units in order again."""
    index, block = only_block(tiny_whole)
    layer = seen_by(tiny_whole, ids)[index]
    used = frequency(layer)
    leaders = dominant({index: used}, 11)[index]
    (least,) = set(range(12)) - set(leaders)
    twin = leaders[int(by_router(layer.logits, leaders)[least])]
    gate_up, down = block.experts.gate_up_proj.detach().clone(), block.experts.down_proj.detach().clone()
    order = torch.from_numpy(np.random.default_rng(0).permutation(32)) if permuted else torch.arange(32)
    gate_up[least] = torch.cat([part[order] for part in gate_up[twin].chunk(2)])
    down[least] = down[twin][:, order]
    model = pruned(tiny_whole, {index: list(range(12))})
    _, own = only_block(model)
    own.experts.gate_up_proj, own.experts.down_proj = nn.Parameter(gate_up, False), nn.Parameter(down, False)
    seen = seen_by(model, ids)
    assert float(frequency(seen[index])[least]) > 0  # it counts in the average
    found = merged(model, seen, 11, method)
    numbers = distinct(only_block(found)[1].experts)
    assert numbers.max() == 10
    assert numbers[least] == numbers[twin]
    lost = float(kl(log_probs(model, ids), log_probs(found, ids)).abs().max())
    if permuted and method == "hc-smoe":
        assert lost > 1e-3
    else:
        assert lost < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_merged_experts_get_the_sum_of_their_gate_weights(tiny_whole: Any, ids: Tensor, method: str) -> None:
    seen = seen_by(tiny_whole, ids)
    model = merged(tiny_whole, seen, 1, method)
    index, block = only_block(model)
    assert distinct(block.experts).max() == 0
    inputs, _, gates, _ = seen[index]
    expected = gates.sum(dim=1, keepdim=True) * one_expert(block.experts, 0, inputs)
    if hasattr(block, "shared_experts"):
        expected = expected + block.shared_experts(inputs)
    with torch.inference_mode():
        assert torch.allclose(block(inputs[None])[0], expected, atol=1e-5)


def test_the_average_is_weighted_by_use() -> None:
    experts = SimpleNamespace(
        gate_up_proj=torch.tensor([1.0, 5.0, 9.0])[:, None, None].expand(3, 4, 2).clone(),
        down_proj=torch.tensor([2.0, 4.0, 8.0])[:, None, None].expand(3, 2, 2).clone(),
    )
    gate_up, down = average(experts, [0, 1], torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64), align=False)
    assert torch.equal(gate_up, torch.full((4, 2), 2.0))
    assert torch.equal(down, torch.full((2, 2), 2.5))
    gate_up, _ = average(experts, [0, 2], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), align=False)
    assert torch.equal(gate_up, torch.full((4, 2), 5.0))  # never used: equal shares


def test_alignment_finds_the_order_of_noisy_units() -> None:
    torch.manual_seed(0)
    gate_up, down, order = torch.randn(64, 16), torch.randn(16, 32), torch.randperm(32)
    shuffled = torch.cat([part[order] for part in gate_up.chunk(2)]) + 0.1 * torch.randn(64, 16)
    found, found_down = aligned(shuffled, down[:, order], gate_up, down)
    assert torch.equal(found_down, down)
    assert float((found - gate_up).abs().max()) < 0.6


def test_dominant_experts_are_counted_over_the_whole_model() -> None:
    used = {0: torch.tensor([0.4, 0.3, 0.2, 0.1]), 2: torch.tensor([0.25, 0.26, 0.24, 0.25])}
    # the best of each layer, then .3, .25, .25, .24, .2: layers keep different numbers
    assert dominant(used, 1) == {0: [0], 2: [1]}
    assert dominant(used, 2) == {0: [0, 1], 2: [0, 1]}
    assert dominant(used, 3) == {0: [0, 1], 2: [0, 1, 2, 3]}
    assert dominant(used, 4) == {0: [0, 1, 2, 3], 2: [0, 1, 2, 3]}


def test_experts_join_the_one_with_the_most_similar_logits() -> None:
    a, b = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, -1.0, 0.5])
    logits = torch.stack([b, 3 * a, a, 0.1 * b + 0.01 * a], dim=1)  # lengths do not count
    assert by_router(logits, [0, 2]).tolist() == [0, 1, 1, 0]


def test_clusters_are_as_many_as_asked_even_where_outputs_are_equal(tiny_whole: Any, ids: Tensor) -> None:
    index, block = only_block(tiny_whole)
    layer = seen_by(tiny_whole, ids)[index]
    same = SimpleNamespace(
        gate_up_proj=block.experts.gate_up_proj[[0] * 6], down_proj=block.experts.down_proj[[0] * 6],
        act_fn=block.experts.act_fn,
    )  # fmt: skip
    with torch.inference_mode():
        for groups in range(1, 7):
            assert len(set(by_output(same, layer.inputs, groups))) == groups


def test_merging_by_another_name_is_refused(tiny_whole: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="m-smoe, hc-smoe"):
        merged(tiny_whole, {}, 2, "ties")


# -- the search


@pytest.mark.parametrize("seed", range(5))
def test_the_search_keeps_its_limits_and_is_never_worse_than_uniform(seed: int) -> None:
    random = np.random.default_rng(seed)
    layers, experts, least = int(random.integers(1, 7)), 12, 3
    total = int(random.integers(layers * least, layers * experts + 1))
    table = random.normal(size=(layers, experts + 1))
    asked: list[tuple[int, ...]] = []

    def worth(counts: tuple[int, ...]) -> float:
        asked.append(counts)
        return float(sum(table[layer, count] for layer, count in enumerate(counts)))

    best, value = search(worth, layers, experts, total, least, generations=5, population=6, seed=seed)
    assert len(set(asked)) == len(asked)  # none is measured twice
    for counts in asked:
        assert sum(counts) == total
        assert all(least <= count <= experts for count in counts)
    uniform = tuple(total // layers + (layer < total % layers) for layer in range(layers))
    assert uniform in asked
    assert value == max(map(worth, set(asked))) == worth(best) >= worth(uniform)


def test_the_search_finds_what_is_plainly_best() -> None:
    wanted = (12, 3, 9, 8)
    best, value = search(lambda counts: -sum(abs(a - b) for a, b in zip(counts, wanted, strict=True)), 4, 12, 32, 3)
    assert best == wanted
    assert value == 0


@pytest.mark.parametrize("total", [11, 49])
def test_the_search_refuses_a_total_that_cannot_be(total: int) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        search(lambda counts: 0.0, 4, 12, total, 3)


def test_acceptance_is_one_minus_total_variation() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    assert acceptance(p.log(), p.log()) == pytest.approx(1)
    assert acceptance(p.log(), q.log()) == pytest.approx((0.7 + 0) / 2)


# -- what is measured


def test_diversity_of_one_text() -> None:
    text = torch.tensor([1, 2, 1, 2, 1, 2])
    assert diversity(text, 2) == 2 / 5  # 12 and 21
    assert diversity(text, 3) == 2 / 4
    assert diversity(torch.arange(9), 4) == 1
    assert math.isnan(diversity(torch.tensor([1, 2]), 3))


def test_jensen_shannon() -> None:
    a, b = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    m = [0.375, 0.5, 0.125]
    of_a = 0.5 * math.log(0.5 / m[0])
    of_b = 0.25 * math.log(0.25 / m[0]) + 0.25 * math.log(0.25 / m[2])
    assert float(jensen_shannon(a.log(), b.log())) == pytest.approx((of_a + of_b) / 2, rel=1e-5)
    assert float(jensen_shannon(b.log(), a.log())) == pytest.approx((of_a + of_b) / 2, rel=1e-5)
    disjoint = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert float(jensen_shannon(*disjoint)) == pytest.approx(math.log(2))
    torch.manual_seed(0)
    x, y = (8 * torch.randn(50, 20)).log_softmax(-1), (8 * torch.randn(50, 20)).log_softmax(-1)
    assert float(jensen_shannon(x, x).max()) < 1e-6
    assert 0 < float(jensen_shannon(x, y).min()) <= float(jensen_shannon(x, y).max()) <= math.log(2) + 1e-6


def test_drift_ends_with_the_shorter_text() -> None:
    torch.manual_seed(0)
    one, other = (torch.randn(5, 7).log_softmax(-1) for _ in range(2))
    a, b = Written([torch.arange(5)] * 2, [one, one]), Written([torch.arange(3), torch.arange(5)], [other[:3], one])
    found = drift(a, b, 4)
    assert torch.allclose(found[0, :3], jensen_shannon(one[:3], other[:3]))
    assert found[0, 3].isnan()
    assert float(found[1].abs().max()) < 1e-6


class Bigrams:
    """A model whose next token depends on the last one alone, by a table of probabilities."""

    def __init__(self, table: Tensor) -> None:
        self.table = table.log()

    def __call__(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


def test_cross_perplexity_of_the_text_alone_and_behind_its_prompt() -> None:
    original = Bigrams(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    texts, prompts = [torch.tensor([1, 1, 0]), torch.tensor([2])], torch.tensor([[0, 0], [1, 2]])
    alone = cross_loss(original, texts)
    assert alone[0] == pytest.approx(-(math.log(0.8) + math.log(0.1)) / 2)
    assert math.isnan(alone[1])  # nothing is predicted
    behind = cross_loss(original, texts, prompts)
    assert behind[0] == pytest.approx(-(math.log(0.25) + math.log(0.8) + math.log(0.1)) / 3)
    assert behind[1] == pytest.approx(-math.log(0.6))


def test_what_a_model_writes_greedily(tiny_whole: Any, ids: Tensor) -> None:
    prompts = ids[:3, :6]
    found = written_by(tiny_whole, prompts, 5)
    known = prompts
    for step in range(5):
        expected = log_probs(tiny_whole, known)[:, -1]
        assert torch.allclose(torch.stack([part[step] for part in found.log_probs]), expected, atol=1e-4)
        known = torch.cat([known, expected.argmax(-1)[:, None]], dim=1)
    assert torch.equal(torch.stack(found.texts), known[:, 6:])


def test_a_text_ends_with_the_end_token(tiny_whole: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written_by(tiny_whole, ids[:3, :6], 8)
    end = int(whole.texts[0][2])
    monkeypatch.setattr(tiny_whole.generation_config, "eos_token_id", [255 if end != 255 else 254, end])
    cut = written_by(tiny_whole, ids[:3, :6], 8)
    for text, probabilities, before in zip(cut.texts, cut.log_probs, whole.texts, strict=True):
        places = (before == end).nonzero()
        length = int(places[0]) + 1 if len(places) else 8
        assert torch.equal(text, before[:length])
        assert len(probabilities) == length
    assert len(cut.texts[0]) <= 3


def test_sampling_follows_its_seed(tiny_whole: Any, ids: Tensor) -> None:
    one, same, other = (written_by(tiny_whole, ids[:4, :6], 12, sampled=True, seed=seed).texts for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_activations_are_means_over_routed_tokens(tiny_whole: Any, ids: Tensor) -> None:
    seen = seen_by(tiny_whole, ids)
    index, block = only_block(tiny_whole)
    points, used = activations(tiny_whole, seen, index)
    there = [expert for expert in range(12) if bool((seen[index].chosen == expert).any())]
    assert len(points) == len(there)
    assert used.sum() == seen[index].chosen.numel()
    for point, number, expert in zip(points, used, there, strict=True):
        rows = (seen[index].chosen == expert).any(dim=1)
        assert number == rows.sum()
        with torch.inference_mode():
            expected = one_expert(block.experts, expert, seen[index].inputs[rows]).mean(dim=0)
        assert torch.allclose(point.float(), expected, atol=1e-5)


def test_the_plane_keeps_what_lies_in_it() -> None:
    points = torch.tensor([[0.0, 0, 5], [4, 0, 5], [0, 2, 5], [4, 2, 5]], dtype=torch.float64)
    plane = plane_of(points)
    assert plane.explained == pytest.approx(1)
    assert spread(plane.place(points)) == pytest.approx(math.sqrt(4 + 1))
    assert spread(plane.place(points + torch.tensor([0.0, 0, 9]))) == pytest.approx(math.sqrt(5))  # off the plane
    assert off(points + torch.tensor([0.0, 0, 9]), points) == pytest.approx(9)
    # a point that nothing comes to does not count
    assert spread(points, torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2)


def test_merging_moves_experts_off_their_places_and_pruning_hardly(tiny_whole: Any, ids: Tensor) -> None:
    seen = seen_by(tiny_whole, ids)
    index, _ = only_block(tiny_whole)
    points, used = activations(tiny_whole, seen, index)
    assert len(points) == 12
    less = pruned(tiny_whole, {index: torch.argsort(-used, stable=True)[:6].sort().values.tolist()})
    apart, _ = activations(less, seen_by(less, ids), index)
    for method in METHODS:
        one = merged(tiny_whole, seen, 6, method)
        drawn, _ = activations(one, seen_by(one, ids), index)
        assert len(drawn) == 6
        assert off(drawn, points) > 1.3 * off(apart, points)
        if method == "m-smoe":  # HC-SMoE leaves the outermost alone and draws the others together
            assert spread(drawn) < spread(apart) < spread(points)


# -- the whole comparison


def make_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A folder of demo/'s layout."""
    FAMILIES[family](folder / "model", num_hidden_layers=3, **changes)
    for name, sequences, seed in (("calibration", 16, 0), ("held_out", 10, 1)):
        write_tokens(folder / f"{name}.safetensors", make_tokens(sequences, 24, seed=seed))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_run(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "tiny", family)
    options = ["--ratios", "0.25", "--sequences", "6", "--prompt", "8", "--written", "6", "--generations", "1"]
    files = ["--json", str(tmp_path / "all.json"), "--plot", str(tmp_path / "experts.svg")]
    assert main([str(folder), *options, "--population", "2", *files]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    expected = ["original", *CRITERIA, "m-smoe, merged", "hc-smoe, merged"]
    assert [row["method"] for row in rows[:-1]] == expected
    assert rows[-1]["method"].endswith("(not servable by stock engines)")
    assert sum(rows[-1]["counts"]) == 9 * len(Checkpoint(folder / "model").spec.moe_layers)
    for row in rows:
        assert sum(f"| {row['method']} |" in line for line in out.splitlines()) == 2  # of two tables
        assert len(row["by_sequence"]["kl"]) == 6
        assert np.isfinite(row["by_sequence"]["kl"]).all()
        assert 0 <= max(row["by_sequence"]["jsd"]) <= math.log(2)
    assert max(rows[0]["by_sequence"]["kl"]) < 1e-6
    assert rows[0]["top1"] == 1
    assert all(part["spread"] == pytest.approx(1) for part in rows[0]["manifold"].values())
    assert all(np.mean(row["by_sequence"]["kl"]) > 1e-4 for row in rows[1:])
    assert "m-smoe, merged minus reap" in out
    drawing = ElementTree.parse(tmp_path / "experts.svg").getroot()
    titles = [element.get("aria-label", "") for element in drawing.iter("{http://www.w3.org/2000/svg}svg")]
    assert sum("hc-smoe, merged" in title for title in titles) == 4  # two layers, as they are and by use


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--plot", "a.png"], "ends in .svg"), (["--ratios", "0.9"], "fewer than the top-k")],
)
def test_run_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    folder = make_folder(tmp_path / "tiny", "qwen3")
    assert main([str(folder), *options]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out


def test_run_refuses_a_router_with_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "tiny", "glm4", n_group=2, topk_group=1)
    assert main([str(folder), "--ratios", "0.25"]) == 2
    assert "chooses by groups" in capsys.readouterr().err


def test_run_refuses_held_out_text_of_different_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "tiny", "qwen3")
    tokens: Tokens = make_tokens(6, 24, padded=True)
    (folder / "held_out.safetensors").unlink()
    write_tokens(folder / "held_out.safetensors", tokens)
    assert main([str(folder)]) == 2
    assert "different lengths" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llm_compressors_own_choice(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the first layer it must be reapc's, of the others it may differ: they are scored behind what was pruned."""
    if llmcompressor_env.find(llmcompressor_reap.RELEASE) is None:
        pytest.skip("no environment of llm-compressor: python tools/llmcompressor_env.py")
    folder = make_folder(tmp_path / "tiny", family)
    given = [str(folder / "model"), str(folder / "calibration.safetensors"), "0.25", str(tmp_path / "out")]
    assert llmcompressor_reap.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    layers = Checkpoint(folder / "model").spec.moe_layers
    assert found["kept_by_reapc_too"][str(layers[0])] == 9
    kept = {layer: found["kept"][str(layer)] for layer in layers}
    assert all(len(experts) == 9 for experts in kept.values())
    ids = torch.from_numpy(make_tokens(4, 24).input_ids.astype(np.int64))
    expected = log_probs(pruned(load(folder / "model"), kept), ids)
    assert torch.equal(log_probs(load(tmp_path / "out"), ids), expected)
    given[2:] = ["0.95", str(tmp_path / "other")]
    assert llmcompressor_reap.main(given) == 1
    assert "llm-compressor 0.13.0 failed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_llm_compressors_own_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back as W4A16: linears near the original's, everything that it leaves alone as it was."""
    if llmcompressor_env.find(llmcompressor_reap.RELEASE) is None:
        pytest.skip("no environment of llm-compressor: python tools/llmcompressor_env.py")
    wide = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32, "dtype": torch.bfloat16}
    folder = make_folder(tmp_path / "tiny", "qwen3", **wide)
    given = [str(folder / "model"), str(folder / "calibration.safetensors"), str(tmp_path / "out")]
    assert llmcompressor_quantize.main(given) == 0
    original, found = Checkpoint(folder / "model"), Checkpoint(tmp_path / "out")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert found.packed[name].packing.bits == 4
    own, other = original.tensor(name).float(), found.tensor(name).float()
    assert 0 < float((own - other).norm() / own.norm()) < 0.3
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(original.tensor(router), found.tensor(router))
    assert llmcompressor_quantize.main(given) == 2
    assert "exists" in capsys.readouterr().err
