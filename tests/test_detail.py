"""Figures beneath the totals of a comparison, and their intervals, against what numpy says of the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_tokens

from reapc.observe.reference import TOP, SequenceReference
from reapc.stream.tokens import Tokens
from reapc.verify.detail import PASSAGE_TOKENS, Detail
from reapc.verify.fidelity import measure
from reapc.verify.intervals import FEWEST, mean_interval
from reapc.verify.token_text import token_text


def log_probs(random: np.random.Generator, length: int, vocab: int) -> np.ndarray:
    logits = 2 * random.standard_normal((length, vocab))
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def measured(tokens: Tokens, vocab: int, exact: bool = True) -> tuple[Detail, list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(3)
    a = [log_probs(random, tokens.length, vocab) for _ in range(tokens.sequences)]
    b = [np.where(tokens.mask[i][:, None], log_probs(random, tokens.length, vocab), np.nan) for i in range(len(a))]
    detail = Detail(tokens)
    references = [SequenceReference.of(values, tokens.input_ids[i], exact) for i, values in enumerate(a)]
    measure(tokens, references, b, detail)
    return detail, a, b


def with_domains(tokens: Tokens, count: int) -> Tokens:
    names = tuple(f"d{i}" for i in range(count))
    return Tokens(tokens.input_ids, tokens.mask, np.arange(tokens.sequences, dtype=np.int32) % count, names)


@pytest.mark.parametrize("padded", [False, True])
def test_sequences_and_positions(padded: bool) -> None:
    tokens = with_domains(make_tokens(9, 21, vocab=40, padded=padded), 2)
    detail, a, b = measured(tokens, 40)
    found = detail.to_json()
    kl = np.stack([(np.exp(x) * (x - y)).sum(axis=1) for x, y in zip(a, b, strict=True)])
    agree = np.stack([x.argmax(1) == y.argmax(1) for x, y in zip(a, b, strict=True)])
    assert found["exact"]
    for row in range(9):
        real = int(tokens.mask[row].sum())
        assert found["sequences"]["tokens"][row] == real
        assert found["sequences"]["kl"][row] == pytest.approx(kl[row, :real].sum(), rel=1e-4)
        assert found["sequences"]["agree"][row] == agree[row, :real].sum()
        assert found["sequences"]["predictions"][row] == real - 1
        ids = tokens.input_ids[row]
        for side, values in (("a", a), ("b", b)):
            loss = -sum(values[row][t, ids[t + 1]] for t in range(real - 1))
            assert found["sequences"][f"loss_{side}"][row] == pytest.approx(loss, rel=1e-4)
    assert [(p["from"], p["to"]) for p in found["positions"]] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 21)]
    for position in found["positions"]:
        part = slice(position["from"] - 1, position["to"])
        real = tokens.mask[:, part]
        assert position["tokens"] == real.sum()
        assert position["kl"] == pytest.approx(kl[:, part][real].mean(), rel=1e-4)
        assert position["top1"] == pytest.approx(agree[:, part][real].mean())
        assert position["interval"][0] < position["kl"] < position["interval"][1]


def test_passages_say_what_both_models_put_first() -> None:
    tokens = with_domains(make_tokens(12, 150, vocab=30, padded=True), 3)
    detail, a, b = measured(tokens, 30)
    found = detail.to_json(lambda before, token: f"<{len(before)}:{token}>")
    passages = found["passages"]
    assert [p["why"] for p in passages] == ["typical"] * 3 + ["worst"]
    assert [p["domain"] for p in passages[:3]] == ["d0", "d1", "d2"]
    kl = np.stack([(np.exp(x) * (x - y)).sum(axis=1) for x, y in zip(a, b, strict=True)])
    for passage in passages:
        row, start = passage["sequence"], passage["position"] - 1
        assert len(passage["tokens"]) == PASSAGE_TOKENS
        for offset, token in enumerate(passage["tokens"]):
            t = start + offset
            assert tokens.mask[row, t + 1]
            assert token["id"] == tokens.input_ids[row, t + 1]
            assert token["text"] == f"<{t + 1}:{token['id']}>"
            assert token["kl"] == pytest.approx(kl[row, t], abs=1e-4)
            for side, values in (("a", a), ("b", b)):
                assert token[f"best_{side}"]["id"] == values[row][t].argmax()
                assert token[f"best_{side}"]["probability"] == pytest.approx(np.exp(values[row][t].max()), rel=1e-3)
                assert token[f"next_{side}"] == pytest.approx(np.exp(values[row][t, token["id"]]), rel=1e-3)
    means = np.array([np.mean(kl[i][tokens.mask[i]]) for i in range(12)])
    for number, passage in enumerate(passages[:3]):
        mine = np.sort(means[number::3])
        assert means[passage["sequence"]] == mine[1]  # the lower median of four
    stretches = [
        kl[i, s : s + PASSAGE_TOKENS].mean()
        for i in range(12)
        for s in range(int(tokens.mask[i].sum()) - PASSAGE_TOKENS)
    ]
    assert passages[-1]["kl"] == pytest.approx(max(stretches), rel=1e-4)


def test_a_reference_of_the_top_ones_is_not_called_exact() -> None:
    tokens = make_tokens(3, 8, vocab=TOP + 40)
    detail, a, _ = measured(tokens, TOP + 40, exact=False)
    found = detail.to_json()
    assert not found["exact"]
    first = found["passages"][0]
    token = first["tokens"][0]
    best = a[first["sequence"]][first["position"] - 1]
    assert token["best_a"]["id"] == best.argmax()
    assert token["best_a"]["probability"] == pytest.approx(np.exp(best.max()), rel=1e-3)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_texts_of_a_token_or_two(length: int) -> None:
    detail, _, _ = measured(make_tokens(6, length, vocab=9), 9)
    found = detail.to_json()
    assert [len(p["tokens"]) for p in found["passages"]] == ([] if length == 1 else [length - 1] * 2)
    assert sum(row["tokens"] for row in found["positions"]) == 6 * length


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Sequences of unequal length whose tokens are alike: 95 % of the intervals hold the mean, within chance."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        counts = random.integers(50, 200, 60)
        means = random.gamma(2.0, 0.1, 60)
        low, high = mean_interval(means * counts, counts, seed=trial) or (0, 0)
        held += low <= 0.2 <= high
    assert 0.90 <= held / 400 <= 0.98


def test_intervals_are_sure_of_what_does_not_vary_and_silent_of_few() -> None:
    assert mean_interval([2.0, 4.0, 6.0, 8.0, 2.0], [1, 2, 3, 4, 1]) == pytest.approx((2.0, 2.0))
    assert mean_interval([1.0] * (FEWEST - 1), [1] * (FEWEST - 1)) is None
    assert mean_interval([1.0] * FEWEST + [0.0], [1] * (FEWEST - 1) + [0, 0]) is None  # empty ones do not count
    some = np.random.default_rng(0).random(30)
    assert mean_interval(some, np.ones(30)) == mean_interval(some, np.ones(30))
    wide, narrow = (mean_interval(np.tile(some, n), np.ones(30 * n)) for n in (1, 16))
    assert wide is not None
    assert narrow is not None
    assert (narrow[1] - narrow[0]) / (wide[1] - wide[0]) == pytest.approx(1 / 4, rel=0.15)


def test_token_text_joins_to_the_text() -> None:
    from tokenizers import Tokenizer

    folder = ROOT / "demo" / "model"
    text = token_text(folder)
    written = "def größte(x):\n\treturn '日本 👩‍🚀' <b> \\ \x01"
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(written).ids
    pieces = [text(ids[:i], token) for i, token in enumerate(ids)]
    assert "\ufffd" in pieces  # characters of several tokens
    assert "".join(str(piece) for piece in pieces).replace("\ufffd", "") == written


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    assert token_text(tmp_path)([1, 2], 3) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert token_text(tmp_path)([1, 2], 3) is None
    assert token_text(ROOT / "demo" / "model")([1], 10**7) in (None, "")
