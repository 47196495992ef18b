"""Domains, parts, shards and mixes of a scores file, against observations made apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens, run_main
from family_checks import whole_log_probs
from family_models import make as make_family
from safetensors.numpy import save_file

from reapc.checkpoint.reader import Checkpoint
from reapc.errors import ReapcError
from reapc.observe.accumulate import PARTS, ROUTING, Groups
from reapc.observe.combine import merge, missing_shards, mix
from reapc.observe.observe import observe, router_digest
from reapc.observe.reference import final_log_probs
from reapc.observe.scores import Scores, load_scores
from reapc.progress import Silent
from reapc.prune.stability import stability
from reapc.stream import StreamedModel, run_layers, states_of
from reapc.stream import run as run_module
from reapc.stream.tokens import Tokens, write_tokens

LENGTH = 24


def mixed(sequences: int = 11, seed: int = 0) -> Tokens:
    """Rows of many lengths, of three domains in turn, which batches of 100 tokens hold together."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 256, (sequences, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < random.integers(4, LENGTH + 1, sequences)[:, None]
    domain = np.arange(sequences, dtype=np.int32) % 3
    return Tokens(np.where(mask, ids, 0).astype(np.int32), mask, domain, ("code", "chat", "math"), "mixed")


@pytest.fixture(scope="module")
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "TOKENS_PER_BATCH", 100)
        yield


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory, small_batches: None) -> Scores:
    folder = tmp_path_factory.mktemp("whole")
    return observe(Checkpoint(tiny), mixed(), folder / "w", Silent(), out=folder / "scores.safetensors")


def close(a: Scores, b: Scores, rtol: float) -> None:
    assert set(a.arrays) == set(b.arrays)
    assert any(name.startswith("second_moment.layers.0.experts") for name in a.arrays)
    for name in a.arrays:
        np.testing.assert_allclose(a.arrays[name], b.arrays[name], rtol=rtol, atol=1e-300, err_msg=name)


def test_batches_hold_no_more_than_they_may_and_no_padding_behind_all() -> None:
    tokens = mixed(40)
    batches = list(tokens.batches(100))
    assert [row for batch in batches for row in range(tokens.sequences)[batch.rows]] == list(range(40))
    for batch in batches:
        assert batch.tokens <= 100
        assert batch.length == tokens.mask[batch.rows].sum(axis=1).max()
    assert sum(batch.tokens for batch in batches) < 0.9 * tokens.input_ids.size
    long = Tokens(np.zeros((2, 300), np.int32), np.ones((2, 300), bool), np.zeros(2, np.int32))
    assert [batch.rows for batch in long.batches(100)] == [slice(0, 1), slice(1, 2)]


def test_domains_and_parts_are_what_each_alone_gives(tiny: Path, whole: Scores, tmp_path: Path) -> None:
    tokens = mixed()
    assert whole.domains == ["code", "chat", "math"]
    for domain in range(3):
        alone = tokens.take(np.flatnonzero(tokens.domain == domain))
        scores = observe(Checkpoint(tiny), alone, tmp_path / "w", Silent())
        assert whole.domain_tokens[domain] == alone.count
        for name in scores.arrays:
            np.testing.assert_allclose(
                whole.arrays[name][domain], scores.arrays[name][domain], rtol=2e-5, atol=1e-7, err_msg=name
            )
            others = np.delete(scores.arrays[name], domain, axis=0)
            assert not others.any()
    groups = Groups.of(tokens)
    one = np.flatnonzero(groups.rows == PARTS + 1)  # the second sequence of "chat"
    assert one.tolist() == [4]
    scores = observe(Checkpoint(tiny), tokens.take(one), tmp_path / "w", Silent())
    for name in ROUTING:
        np.testing.assert_allclose(
            whole.routing(0, name)[1, 1], scores.routing(0, name).sum(axis=(0, 1)), rtol=2e-5, atol=1e-9, err_msg=name
        )
    assert np.asarray(whole.header["parts"]).sum() == tokens.count == whole.header["tokens"]
    assert np.asarray(whole.header["sequences"]).sum() == 11


@pytest.mark.parametrize("count", [2, 3])
def test_shards_add_up_to_the_run_over_all(tiny: Path, whole: Scores, count: int, tmp_path: Path, capsys) -> None:
    tokens = mixed()
    write_tokens(tmp_path / "mixed", tokens)
    files = [tmp_path / f"{k}.safetensors" for k in range(1, count + 1)]
    for k, file in enumerate(files, start=1):
        code, _, err = run_main(
            capsys, "observe", tiny, "--tokens", tmp_path / "mixed", "--shard", f"{k}/{count}", "--out", file
        )
        assert code == 0, err
    out = tmp_path / "sum.safetensors"
    code, _, err = run_main(capsys, "scores", "merge", *files[1:], "--out", out)
    assert (code, "shards 1 of mixed are not in it" in err) == (0, True)
    assert missing_shards(load_scores(out)) == {"mixed": [1]}
    out.unlink()
    code, _, err = run_main(capsys, "scores", "merge", *reversed(files), "--out", out)
    assert (code, "not in it" in err) == (0, False)
    merged = load_scores(out)
    close(merged, whole, rtol=1e-12)
    changed = {key for key in whole.header if merged.header[key] != whole.header[key]}
    assert changed == {"model"}  # a path here, a name there
    code, _, err = run_main(capsys, "scores", "merge", files[0], out, "--out", tmp_path / "x")
    assert (code, "overlap" in err) == (2, True)
    code, _, err = run_main(capsys, "scores", "merge", files[0], files[0], "--out", tmp_path / "x")
    assert (code, f"both hold shard 1/{count}" in err) == (2, True)


@pytest.mark.parametrize(
    ("shard", "message"), [("0/2", "K from 1 to N"), ("3/2", "K from 1"), ("2", "K/N"), ("1/900", "at most")]
)
def test_shards_that_cannot_be(tiny: Path, shard: str, message: str, tmp_path: Path, capsys) -> None:
    write_tokens(tmp_path / "mixed", mixed())
    arguments = ("--tokens", tmp_path / "mixed", "--shard", shard, "--out", tmp_path / "s")
    code, _, err = run_main(capsys, "observe", tiny, *arguments)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "s").exists()


def test_a_mix_is_the_weighted_sum_of_its_domains(whole: Scores, tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "s.safetensors", tmp_path / "mixed.safetensors"
    whole.save(path)
    code, text, err = run_main(capsys, "scores", "mix", path, "--weight", "code=3, chat=1", "--out", out)
    assert code == 0, err
    assert "code 75%, chat 25%; left out: math" in text
    mixed_scores = load_scores(out)
    code_tokens, chat_tokens, _ = whole.domain_tokens
    for layer in whole.layers:
        found = mixed_scores.layer(layer)
        shares = {
            name: whole.routing(layer, name)[0].sum(0) / code_tokens * 0.75
            + whole.routing(layer, name)[1].sum(0) / chat_tokens * 0.25
            for name in ("routed_tokens", "gate_norm_sum")
        }
        used = shares["routed_tokens"] > 0
        expected = shares["gate_norm_sum"][used] / shares["routed_tokens"][used]
        np.testing.assert_allclose(found["reap"][used], expected, rtol=1e-12)
        np.testing.assert_allclose(
            found["max_activation"], whole.routing(layer, "max_activation")[:2].max(axis=(0, 1)), rtol=0
        )
    np.testing.assert_allclose(mixed_scores.domain_tokens / mixed_scores.domain_tokens.sum(), [0.75, 0.25])
    moment = "second_moment.model.layers.0.self_attn.o_proj"
    count = moment.replace("moment.", "moment_count.")
    expected = sum(share * whole.arrays[moment][d] / whole.arrays[count][d] for d, share in enumerate((0.75, 0.25)))
    np.testing.assert_allclose(mixed_scores.total(moment) / mixed_scores.total(count), expected, rtol=1e-12)
    # as they stood: nothing changes; and a mix can be mixed again
    same = mix(whole, dict(zip(whole.domains, whole.domain_tokens, strict=True)))
    close(same, whole, rtol=1e-12)
    again = mix(mixed_scores, {"code": 1.0, "chat": 1.0})
    direct = mix(whole, {"code": 1.0, "chat": 1.0})
    np.testing.assert_allclose(again.layer(0)["reap"], direct.layer(0)["reap"], rtol=1e-12)


@pytest.mark.parametrize(
    ("weight", "message"),
    [("poetry=1", "no domain 'poetry'; it has code, chat, math"), ("code", "NAME=NUMBER"), ("code=0", "above 0"),
     ("code=1,code=2", "once for each"), ("code=nan", "above 0")],
)  # fmt: skip
def test_mixes_that_cannot_be(whole: Scores, weight: str, message: str, tmp_path: Path, capsys) -> None:
    whole.save(tmp_path / "s")
    code, _, err = run_main(capsys, "scores", "mix", tmp_path / "s", "--weight", weight, "--out", tmp_path / "m")
    assert (code, message in err) == (2, True), err


def test_corpora_merge_by_the_names_of_their_domains(tiny: Path, whole: Scores, tmp_path: Path) -> None:
    other = make_tokens(3, LENGTH, seed=5)
    other = Tokens(other.input_ids, other.mask, np.array([0, 1, 0], np.int32), ("math", "law"), "other")
    found = merge([whole, observe(Checkpoint(tiny), other, tmp_path / "w", Silent())])
    assert found.domains == ["code", "chat", "math", "law"]
    assert found.domain_tokens.tolist() == [*whole.domain_tokens[:2], whole.domain_tokens[2] + 48, 24]
    assert found.header["calibration"] == ["mixed", "other"]
    assert found.layer(0)["routed_tokens"].sum() == 3 * found.header["tokens"]
    with pytest.raises(ReapcError, match="hold shard 1/1"):
        merge([whole, whole])


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    sums = {f"layers.0.{name}": np.arange(4.0) for name in ROUTING}
    sums["second_moment.layers.0.experts.down"] = np.ones((4, 6))
    header = (
        '{"model": "m", "digest": "d", "num_experts": 4, "top_k": 1, "layers": [0], "tokens": 6, "calibration": ["x"], '
        '"dtype": "float32"}'
    )
    save_file(sums, tmp_path / "old", metadata={"reapc_scores": "1", "header": header})
    old = load_scores(tmp_path / "old")
    assert old.layer(0)["reap"].tolist() == [0, 1, 1, 1]
    assert old.never_routed() == {0: [0]}
    twice = merge([old, old])
    assert twice.layer(0)["routed_tokens"].tolist() == [0, 2, 4, 6]
    assert twice.layer(0)["max_activation"].tolist() == [0, 1, 2, 3]
    assert twice.total("second_moment.layers.0.experts.down").tolist() == np.full((4, 6), 2.0).tolist()
    assert stability(old, "reap", 3).halves is None


def test_the_digest_of_the_routers_is_that_of_the_model_not_of_its_dtype(tiny: Path, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", dtype=torch.float32)
    narrow = make_model(tmp_path / "narrow", dtype=torch.bfloat16)
    assert router_digest(Checkpoint(wide)) == router_digest(Checkpoint(tiny))
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(narrow / "model.safetensors")
    save_torch({k: v.float() for k, v in tensors.items()}, narrow / "model.safetensors", metadata={"format": "pt"})
    widened = router_digest(Checkpoint(narrow))
    assert widened == router_digest(Checkpoint(make_model(tmp_path / "again", dtype=torch.bfloat16)))
    assert widened != router_digest(Checkpoint(tiny))


@pytest.mark.parametrize("name", ["glm_moe_dsa", "qwen35moe", "deepseek_v4", "kimi-linear"])
def test_ragged_rows_give_what_transformers_does(name: str, tmp_path: Path, monkeypatch) -> None:
    """Indices handed on, linear attention and compressed windows, in batches that are cut to their longest row.
    (The batch is the same on both sides: ties in a sparse attention's choice depend on it.)"""
    model = make_family(name, tmp_path / "m")
    monkeypatch.setattr(run_module, "TOKENS_PER_BATCH", 100)
    tokens = mixed(7, seed=3)
    streamed = StreamedModel(Checkpoint(tmp_path / "m"))
    states = states_of(streamed, tokens, tmp_path, "test")
    run_layers(streamed, [(states, False)], lambda i: None, lambda i, o: None, Silent())
    found = list(final_log_probs(streamed, states))
    cut = 0
    for batch in tokens.batches(100):
        ids = torch.from_numpy(tokens.input_ids[batch.rows, : batch.length].astype(np.int64))
        mask = torch.from_numpy(tokens.mask[batch.rows, : batch.length])
        expected = whole_log_probs(model, ids, mask).numpy()
        cut += batch.length < LENGTH
        for row, values, real in zip(range(7)[batch.rows], expected, mask.numpy(), strict=True):
            np.testing.assert_allclose(found[row][: batch.length][real], values[real], atol=2e-4)
    assert cut


def handmade(reap: np.ndarray, tokens: np.ndarray) -> Scores:
    """Scores of one layer: ``reap`` and ``tokens`` (domains, PARTS, experts)."""
    sums = {name: np.zeros_like(reap) for name in ROUTING}
    sums |= {"routed_tokens": tokens, "gate_norm_sum": reap * tokens}
    names = [f"d{i}" for i in range(len(reap))]
    header = {
        "num_experts": reap.shape[2], "layers": [0], "top_k": 1, "domains": names, "tokens": int(tokens.sum()),
        "parts": tokens.sum(axis=2).tolist(), "sequences": np.full(tokens.shape[:2], 2).tolist(),
    }  # fmt: skip
    return Scores(header, {f"layers.0.{name}": values for name, values in sums.items()})


def test_stability_of_what_never_changes_and_of_what_does() -> None:
    values = np.tile(np.arange(1.0, 9.0), (1, PARTS, 1))
    steady = stability(handmade(values, np.ones_like(values)), "reap", 4)
    assert (steady.halves, steady.chance) == (1.0, 0.5)
    assert steady.curve == [(2 * n, 8 * n, 1.0) for n in (1, 2, 4, 6, 8)]
    assert (steady.dead, steady.unused, steady.domains) == ({}, {}, [])
    torn = values.copy()
    torn[0, 1::2] = torn[0, 1::2, ::-1]  # odd parts want just the other experts
    torn[0, 0] *= 3
    found = stability(handmade(torn, np.ones_like(torn)), "reap", 4)
    assert found.halves == 0.0
    assert found.curve[0] == (2, 8, 1.0)
    assert any("two halves of the data drop the same experts to 0 % (by chance 50 %)" in line for line in found.lines())


def test_domains_that_disagree_and_experts_that_one_never_uses() -> None:
    rising = np.arange(1.0, 9.0)
    values = np.stack([np.tile(rising, (PARTS, 1)), np.tile(rising[::-1], (PARTS, 1)), np.tile(rising, (PARTS, 1))])
    tokens = np.ones_like(values)
    tokens[1, :, 2] = 0
    tokens[:, :, 7] = 0
    found = stability(handmade(values, tokens), "reap", 4)
    assert [(a, b) for a, b, _ in found.disagreeing] == [("d0", "d1"), ("d1", "d2")]
    assert dict(((a, b), share) for a, b, share in found.domains)["d0", "d2"] == 1.0
    assert found.unused == {"d0": {0: [7]}, "d1": {0: [2, 7]}, "d2": {0: [7]}}
    assert found.dead == {0: 1}
    assert len(found.lines()) == 1 + 2 + 3 + 1


def test_stability_command(whole: Scores, tmp_path: Path, capsys) -> None:
    whole.save(tmp_path / "s")
    code, text, err = run_main(capsys, "scores", "stability", tmp_path / "s", "--ratio", 0.5)
    assert code == 0, err
    assert "6 of 12 experts kept by reap" in text
    assert "two halves of the data" in text
    code, _, err = run_main(capsys, "scores", "stability", tmp_path / "s", "--ratio", 0.01)
    assert (code, "drops none" in err) == (2, True)
    code, _, err = run_main(capsys, "scores", "stability", tmp_path / "s", "--ratio", 0.9)
    assert (code, "top-k" in err) == (2, True)
