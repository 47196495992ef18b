"""`reapc verify`: a real llama-server against the stored reference, and everything that can be wrong with a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fixtures import VOCABULARY, free_port, run, serving, stand_in

from reapc.errors import CannotBeDone, ReapcError
from reapc.observe.reference import TOP, SequenceReference, read_reference
from reapc.serving.client import Client, Row, base_of
from reapc.serving.fidelity import compare_row
from reapc.serving.load import ends_in_loop, read_prompts, repeated_share
from reapc.serving.process import Server
from reapc.stream.tokens import read_tokens, spread
from reapc.verify.fidelity import log_probs

pytest_plugins = ["serving_fixtures"]

FEW = ("--sequences", "2", "--positions", "3", "--max-tokens", "4")


def expected(out: Path) -> dict[str, float]:
    """KL, top-1 and perplexities over all positions that have a token after them, from llama.cpp without a server."""
    tokens = read_tokens(out / "held_out.safetensors", VOCABULARY)
    kl, agree, ours, theirs = [], [], [], []
    results = log_probs(out / "model.gguf", tokens, out, None)  # type: ignore[arg-type]
    for row, (reference, result) in enumerate(zip(read_reference(out / "reference.safetensors"), results, strict=True)):
        places = np.flatnonzero(tokens.mask[row][:-1] & tokens.mask[row][1:])
        kl += list(reference.kl_to(result)[places])
        agree += list(reference.best[places] == result.argmax(axis=1)[places])
        ours += list(reference.next_log_prob[places])
        theirs += list(result[places, tokens.input_ids[row][places + 1]])
    return {
        "positions": len(kl),
        "kl": float(np.mean(kl)),
        "top1": float(np.mean(agree)),
        "perplexity_reference": float(np.exp(-np.mean(ours))),
        "perplexity_server": float(np.exp(-np.mean(theirs))),
    }


def test_every_position_of_a_llama_server_gives_what_llamacpp_gives(built, llama, capsys) -> None:
    code, out, _ = run(
        capsys, "verify", built, "--server", llama, "--positions", 0, "--sequences", 99, "--max-tokens", 4, "--json"
    )
    assert code == 0
    report = json.loads(out)
    figures, wanted = report["fidelity"], expected(built)
    assert figures["positions"] == wanted["positions"] == 3 * 31 + 19
    assert figures["kl_is"] == "exact"
    assert figures["top_k"] == VOCABULARY
    assert figures["next_token_unknown"] == 0
    assert figures["kl"] == pytest.approx(wanted["kl"], rel=0.02)
    assert figures["top1"] == pytest.approx(wanted["top1"], abs=0.04)
    assert figures["perplexity_server"] == pytest.approx(wanted["perplexity_server"], rel=0.01)
    assert figures["perplexity_reference"] == pytest.approx(wanted["perplexity_reference"], rel=1e-5)
    assert report["server"]["kind"] == "llama-server"
    assert report["remarks"] == []
    assert report["load"]["prompts"] == 4
    assert report["load"]["tokens"] > 0
    assert report["load"]["tokens_per_second"] > 0


def test_the_top_of_a_distribution_gives_a_lower_bound_and_says_so(built, llama, capsys) -> None:
    common = ("verify", built, "--server", f"{llama}/v1", "--sequences", 99, "--positions", 5, "--max-tokens", 4)
    exact = json.loads(run(capsys, *common, "--json")[1])["fidelity"]
    code, out, _ = run(capsys, *common, "--top", 20, "--json")
    assert code == 0
    bound = json.loads(out)["fidelity"]
    assert bound["kl_is"] == "a lower bound"
    assert bound["top_k"] == 20
    assert 0 < bound["kl"] < exact["kl"]
    assert bound["rest_mass_reference"] > 0.1
    # the token that followed is always told, whether or not it is among the best 20
    assert bound["next_token_unknown"] == 0
    # a prefix that is cached and one that is not go through other kernels: not to the last digit
    assert bound["perplexity_server"] == pytest.approx(exact["perplexity_server"], rel=0.02)
    text = run(capsys, *common, "--top", 20)[1]
    assert "KL(original || server) >= " in text
    assert "one bucket for the rest" in text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.booleans())
def test_a_coarser_partition_never_raises_the_kl(seed: int, vocab: int, sharp: bool) -> None:
    random = np.random.default_rng(seed)
    p, q = (random.dirichlet(np.full(vocab, 0.1 if sharp else 2.0)) + 1e-9 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    logs = np.log(np.stack([p, p])).astype(np.float64)
    reference = SequenceReference.of(logs, np.array([0, vocab - 1]), exact=True)
    order = np.argsort(-q)
    values = []
    for k in range(1, vocab + 1):
        row = Row.of({int(i): float(np.log(q[i])) for i in order[:k]}, None)
        values.append(compare_row(reference, 0, row, vocab).kl)
    assert all(a <= b + 1e-6 for a, b in pairwise(values))
    assert values[-1] == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)
    assert min(values) >= -1e-9


def test_a_reference_of_the_top_tokens_alone_gives_its_own_lower_bound() -> None:
    vocab = 3 * TOP
    random = np.random.default_rng(3)
    ours, theirs = (np.log(random.dirichlet(np.full(vocab, 0.3), size=2) + 1e-12) for _ in range(2))
    reference = SequenceReference.of(ours.astype(np.float32), np.array([5, 6]), exact=False)
    row = Row.of(dict(enumerate(theirs[0].tolist())), float(theirs[0][6]))
    found = compare_row(reference, 0, row, vocab)
    assert found.exact == 0
    assert found.kl == pytest.approx(float(reference.kl_to(theirs)[0]), rel=1e-4)


def test_an_unknown_next_token_is_counted_and_bounds_the_perplexity() -> None:
    logs = np.log(np.full((2, 8), 1 / 8))
    reference = SequenceReference.of(logs, np.array([0, 7]), exact=True)
    found = compare_row(reference, 0, Row.of({1: np.log(0.6), 2: np.log(0.2)}, None), 8)
    assert found.unknown_next == 1
    assert found.loss_server == pytest.approx(-np.log(0.2))


def test_positions_are_spread_over_the_whole() -> None:
    assert spread(10, 0).tolist() == list(range(10))
    assert spread(10, 3).tolist() == [0, 4, 9]
    assert spread(3, 9).tolist() == [0, 1, 2]


# -- servers that are not what they should be


def test_no_server_there(built, capsys) -> None:
    code, _, err = run(capsys, "verify", built, "--server", "http://127.0.0.1:9", *FEW)
    assert code == 1
    assert "no server answers here" in err
    assert "reapc serve" in err


@pytest.mark.parametrize("url", ["ftp://host", "http://", ""])
def test_an_address_that_is_none(built, capsys, url: str) -> None:
    code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 2
    assert "is not an address" in err


def test_addresses_as_people_write_them() -> None:
    for written in ("127.0.0.1:8080", "http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1", "127.0.0.1:8080/v1/"):
        assert base_of(written) == "http://127.0.0.1:8080"


def test_halves_of_characters_are_asked_for_as_well(built, llama) -> None:
    """llama-server holds back a token of half a character, and its log-probabilities with it."""
    halves = [130, 145, 160, 170]  # the first bytes of longer characters in the demo's vocabulary
    with Client(llama, "LLAMA_API_KEY") as client:
        client.connect()
        every = next(client.rows([5, 6, 7], [1], VOCABULARY))
        for token in halves:
            row = next(client.rows([5, 6, token], [1], 4))
            assert row.actual == pytest.approx(float(every.log_probs[every.ids == token][0]), abs=1e-4)
        alone = client.post(
            "/completion", {"prompt": [5, 6], "n_predict": 1, "n_probs": 1, "logit_bias": [[halves[0], 1e6]]}
        )
    assert not alone.get("completion_probabilities")


def test_a_server_that_wants_a_key(built, tmp_path, capsys, monkeypatch) -> None:
    with serving(built, tmp_path / "log", LLAMA_API_KEY="right") as (url, _):
        monkeypatch.delenv("LLAMA_API_KEY", raising=False)
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
        assert code == 1
        assert "asks for an API key and none is in $LLAMA_API_KEY (401)" in err
        monkeypatch.setenv("LLAMA_API_KEY", "wrong")
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
        assert code == 1
        assert "refuses the one in $LLAMA_API_KEY" in err
        monkeypatch.setenv("OTHER", "right")
        code, out, _ = run(capsys, "verify", built, "--server", url, "--api-key-env", "OTHER", *FEW, "--json")
        assert code == 0
        assert json.loads(out)["fidelity"]["positions"] == 6


def relay(url: str, path: str, body: Any) -> tuple[int, str]:
    """The answer of the server at ``url``."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.status, answer.read().decode()


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_server_that_dies_in_the_middle(built, llama, capsys, concurrency: int) -> None:
    asked: list[str] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, str] | None:
        asked.append(path)
        return None if asked.count("/completion") > 6 else relay(llama, path, body)

    with stand_in(answer) as url:
        arguments = ("--sequences", 4, "--positions", 4, "--concurrency", concurrency)
        code, _, err = run(capsys, "verify", built, "--server", url, *arguments)
    assert code == 1
    assert "the connection broke" in err
    assert "4 of 16 positions were checked (1 of 4 sequences)" in err


def test_a_connection_that_the_server_closes_between_two_requests_is_no_death(built, llama, capsys) -> None:
    """llama-server closes what was idle for five seconds, at times at the very moment of the next request."""
    asked: list[str] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, str] | None:
        asked.append(path)
        return None if len(asked) % 4 == 0 else relay(llama, path, body)

    with stand_in(answer) as url:
        code, out, _ = run(capsys, "verify", built, "--server", url, *FEW, "--json")
    assert code == 0
    assert json.loads(out)["fidelity"]["positions"] == 6
    assert len(asked) >= 11


def test_a_server_that_dies_while_it_answers_prompts(built, llama, capsys) -> None:
    def answer(method: str, path: str, body: Any) -> tuple[int, str] | None:
        if path != "/v1/completions":
            return relay(llama, path, body)
        answers.append(path)
        return None if len(answers) > 1 else relay(llama, path, body)

    answers: list[str] = []
    with stand_in(answer) as url:
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 1
    assert "1 of 2 prompts had been answered" in err


def models(**first: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "other", **first}]}


def test_a_server_of_another_model(built, capsys) -> None:
    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        return (200, models(owned_by="llamacpp", meta={"n_vocab": 151936})) if path == "/v1/models" else (200, {})

    with stand_in(answer) as url:
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 1
    assert "serves 'other' with a vocabulary of 151936 tokens" in err
    assert f"has {VOCABULARY}" in err


def test_another_file_and_a_shorter_context_are_told(copy, llama, capsys) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    next(row for row in manifest["fit"] if row["name"] == "weights")["actual_bytes"] += 32
    (copy / "manifest.json").write_text(json.dumps(manifest))
    plans = json.loads((copy / "plan.json").read_text())
    plans["from_scores"]["chosen"]["context"] = 4096
    (copy / "plan.json").write_text(json.dumps(plans))
    code, out, _ = run(capsys, "verify", copy, "--server", llama, *FEW)
    assert code == 0
    assert "note: not the file of this build" in out
    assert "note: the server's context is 256 tokens, the plan's 4096" in out


def test_sequences_longer_than_the_servers_context_are_cut(built, tmp_path, capsys) -> None:
    with serving(built, tmp_path / "log") as (url, _):

        def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
            status, text = relay(url, path, body)
            if path == "/props":
                return status, {**json.loads(text), "default_generation_settings": {"n_ctx": 10}}
            return status, text

        with stand_in(answer) as short:
            arguments = ("--positions", 0, "--sequences", 4, "--max-tokens", 4, "--json")
            code, out, _ = run(capsys, "verify", built, "--server", short, *arguments)
    assert code == 0
    report = json.loads(out)
    assert report["fidelity"]["positions"] == 4 * 8
    assert any("are cut there" in remark for remark in report["remarks"])


@pytest.mark.parametrize(
    ("content", "said"),
    [("<html>hello</html>", "expected: JSON"), ({"data": []}, "as an OpenAI server does"), ([1], "a JSON object")],
)
def test_what_answers_is_no_openai_server(built, capsys, content: Any, said: str) -> None:
    with stand_in(lambda method, path, body: (200, content)) as url:
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 1
    assert said in err


def test_answers_without_token_ids_are_refused(built, llama, capsys) -> None:
    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        status, text = relay(llama, path, body)
        if path == "/completion":
            found = json.loads(text)
            for item in found["completion_probabilities"][0]["top_logprobs"]:
                del item["id"]
            return status, found
        return status, text

    with stand_in(answer) as url:
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 1
    assert "completion_probabilities with an id in each entry" in err


def test_llama_cpp_server_of_python_is_refused_with_the_reason(built, capsys) -> None:
    with stand_in(lambda method, path, body: (200, models(owned_by="me"))) as url:
        code, _, err = run(capsys, "verify", built, "--server", url, *FEW)
    assert code == 1
    assert "log-probabilities by text" in err


def test_a_model_that_the_server_does_not_have(built, llama, capsys) -> None:
    code, _, err = run(capsys, "verify", built, "--server", llama, "--model", "nothing", *FEW)
    assert code == 2
    assert "serves no model 'nothing'" in err
    assert "it serves: model" in err


class Vllm:
    """Answers as vLLM 0.32 does, from given log-probabilities (sequence, position, vocabulary)."""

    def __init__(self, ids: np.ndarray, log_probs: np.ndarray, most: int = 20) -> None:
        self.rows = {tuple(row): values for row, values in zip(ids.tolist(), log_probs, strict=True)}
        self.most, self.asked = most, []

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, models(owned_by="vllm", root="/elsewhere/model", max_model_len=256)
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if body.get("stream"):
            return 200, 'data: {"choices": [{"text": "a b", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
        self.asked.append(body["prompt_logprobs"])
        if body["prompt_logprobs"] > self.most:
            return 400, {
                "error": {
                    "message": f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max "
                    f"allowed: {self.most}", "code": 400,
                }
            }  # fmt: skip
        prompt = body["prompt"]
        values = next(v for row, v in self.rows.items() if list(row[: len(prompt)]) == prompt)
        entries: list[Any] = [None]
        for position in range(len(prompt) - 1):
            best = np.argsort(-values[position])[: body["prompt_logprobs"]].tolist()
            keys = dict.fromkeys([*best, prompt[position + 1]])
            entries.append({str(i): {"logprob": float(values[position][i]), "decoded_token": "?"} for i in keys})
        return 200, {"choices": [{"text": "x", "prompt_logprobs": entries}]}


def test_vllms_answers(built, capsys) -> None:
    tokens = read_tokens(built / "held_out.safetensors", VOCABULARY)
    stored = np.stack([reference.log_probs for reference in read_reference(built / "reference.safetensors")])
    vllm = Vllm(tokens.input_ids, stored)
    with stand_in(vllm) as url:
        code, out, _ = run(capsys, "verify", built, "--server", url, "--sequences", 4, "--json")
    assert code == 0
    report = json.loads(out)
    figures = report["fidelity"]
    assert vllm.asked == [VOCABULARY, 20, 20, 20, 20]  # what it gives is learnt once
    assert figures["top_k"] == 20
    assert figures["positions"] == 3 * 31 + 19
    # the server gives the reference itself: nothing is lost, whatever the partition
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["top1"] == 1
    assert figures["perplexity_server"] == pytest.approx(figures["perplexity_reference"], rel=1e-5)
    assert report["server"]["engine"] == "vllm 0.32.0"
    assert "perhaps not the folder of this build: the server serves /elsewhere/model" in report["remarks"]
    assert report["load"]["loop_rate"] == 0


def test_a_model_that_has_nothing_in_common(built, capsys) -> None:
    tokens = read_tokens(built / "held_out.safetensors", VOCABULARY)
    noise = np.random.default_rng(9).normal(size=(4, 32, VOCABULARY)) * 8
    noise -= np.log(np.exp(noise).sum(axis=-1, keepdims=True))
    with stand_in(Vllm(tokens.input_ids, noise)) as url:
        code, out, _ = run(capsys, "verify", built, "--server", url, "--sequences", 4)
    assert code == 0
    assert "another model or tokenizer" in out


# -- thresholds, prompts, files


def test_thresholds(built, llama, capsys) -> None:
    common = ("verify", built, "--server", llama, *FEW)
    code, out, err = run(capsys, *common, "--max-kl", "0.0000001", "--min-top1", 1)
    assert code == 1
    assert "is above --max-kl" in err
    assert "KL(original || server)" in out
    assert run(capsys, *common, "--max-kl", 5, "--min-top1", 0)[0] == 0


def test_prompts_of_a_file(built, llama, tmp_path, capsys) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import os"}\n{"prompt": [5, 6, 7]}\n\n')
    code, out, _ = run(capsys, "verify", built, "--server", llama, *FEW, "--prompts", path, "--json")
    assert code == 0
    assert json.loads(out)["load"]["prompts"] == 2
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\ntwo\n")
    assert read_prompts(plain) == ["one", "two"]
    path.write_text('{"text": "no prompt"}\n')
    with pytest.raises(ReapcError, match=r"prompts.jsonl:1: an object with"):
        read_prompts(path)
    path.write_text('{"prompt": [true]}\n')
    with pytest.raises(ReapcError, match="neither text nor a list"):
        read_prompts(path)


def test_loops() -> None:
    assert ends_in_loop("so: " + "abc " * 20)
    assert ends_in_loop("x" * 60)
    assert ends_in_loop("intro. " + "a sentence of some length, which comes back. " * 4)
    assert not ends_in_loop("a sentence of some length, which comes back. " * 3)
    assert not ends_in_loop("x" * 59)
    assert not ends_in_loop("".join(chr(97 + i * i % 26) + str(i) for i in range(200)))
    assert not ends_in_loop("x" * 100 + " and then it went on to say something else altogether, once only")
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated_share("a b c") is None


def test_a_streamed_answer_is_the_whole_answer(built, llama) -> None:
    with Client(llama, "LLAMA_API_KEY") as client:
        client.connect()
        answer = client.stream([7, 8, 9], 200)
    assert answer.tokens == 200
    assert answer.finish == "length"
    assert 0 < answer.first_seconds <= answer.total_seconds
    again = relay(llama, "/v1/completions", {"prompt": [7, 8, 9], "max_tokens": 200, "temperature": 0})
    assert json.loads(again[1])["choices"][0]["text"] == answer.text


def test_the_files_of_a_build(copy, capsys) -> None:
    code, out, _ = run(capsys, "verify", copy)
    assert code == 0
    assert "files have the sizes of the manifest" in out
    assert "weights:" in out
    with (copy / "model.gguf").open("r+b") as file:
        file.truncate(1000)
    (copy / "scores.safetensors").unlink()
    (copy / "more").write_text("x")
    code, _, err = run(capsys, "verify", copy)
    assert code == 1
    assert "3 of its files" in err
    assert "model.gguf: 1000 bytes, the manifest says" in err
    assert "scores.safetensors: missing" in err
    assert "more: not in the manifest" in err


def test_a_build_of_another_version(copy, capsys) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["versions"]["reapc"] = "0.0.9"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run(capsys, "verify", copy)
    assert code == 0
    assert "written by reapc 0.0.9" in err
    (copy / "plan.json").write_text('{"plan": 1}')
    code, _, err = run(capsys, "verify", copy)
    assert code == 2
    assert "are not those of reapc" in err
    assert "reapc build RECIPE" in err


def test_a_build_without_its_reference(copy, llama, capsys) -> None:
    (copy / "reference.safetensors").unlink()
    code, _, err = run(capsys, "verify", copy, "--server", llama, *FEW)
    assert code == 2
    assert "reference.safetensors: no such file" in err


def test_a_reference_of_other_tokens(copy, llama, tmp_path, capsys) -> None:
    shutil.copy(ROOT / "demo" / "held_out.safetensors", copy / "held_out.safetensors")
    code, _, err = run(capsys, "verify", copy, "--server", llama, *FEW)
    assert code == 2
    assert "is not the reference of held_out.safetensors" in err


@pytest.mark.parametrize("what", ["nothing", "file", "folder", "garbage"])
def test_what_is_no_build(tmp_path, capsys, what: str) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("x")
    elif what != "nothing":
        out.mkdir()
        if what == "garbage":
            (out / "manifest.json").write_text("{")
    code, _, err = run(capsys, "verify", out)
    assert code == 2
    assert str(out) in err


def test_errors_of_a_stream_are_told() -> None:
    with stand_in(lambda method, path, body: (200, 'data: {"error": {"message": "out of cache"}}\n\n')) as url:
        client = Client(url, "NONE")
        with pytest.raises(CannotBeDone, match="out of cache"):
            client.stream("x", 4)
    with (
        stand_in(lambda method, path, body: (200, "data: not json\n\n")) as url,
        pytest.raises(CannotBeDone, match="a stream of JSON chunks"),
    ):
        Client(url, "NONE").stream("x", 4)


@pytest.fixture(scope="module")
def vllm(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real vLLM (for CPUs) that serves the original of the build in 32 bits."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "vllm_env.py", "--path"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no vLLM here: make vllm-env")
    log, url = tmp_path_factory.mktemp("vllm") / "log", f"http://127.0.0.1:{(port := free_port())}"
    command = [
        f"{done.stdout.strip()}/bin/vllm", "serve", str(built.parent / "model"), "--served-model-name", "model",
        "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "-1",
        "--max-model-len", "256",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles vLLM anew
    with Server(command, environment, log) as server:
        server.wait_ready(url, 580, lambda seconds, line: None)
        yield url


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_vllm_that_serves_the_original_loses_nothing(built, vllm, capsys) -> None:
    common = ("verify", built, "--server", vllm, "--sequences", 4, "--max-tokens", 8, "--json")
    code, out, _ = run(capsys, *common)
    assert code == 0
    report = json.loads(out)
    figures = report["fidelity"]
    assert report["server"]["kind"] == "vllm"
    assert figures["kl_is"] == "exact"
    assert figures["positions"] == 3 * 31 + 19
    assert abs(figures["kl"]) < 1e-4
    assert figures["top1"] == 1
    assert figures["perplexity_server"] == pytest.approx(figures["perplexity_reference"], rel=1e-3)
    assert report["load"]["tokens"] > 0
    assert any("perhaps not the folder of this build" in remark for remark in report["remarks"])
    bound = json.loads(run(capsys, *common, "--top", 5)[1])["fidelity"]
    assert bound["kl_is"] == "a lower bound"
    assert bound["kl"] <= figures["kl"] + 1e-6


@pytest.mark.slow
@pytest.mark.vllm
def test_lm_eval_against_a_real_vllm(built, vllm, tmp_path, capsys, monkeypatch) -> None:
    """lm-eval's own model of completions, with the tokenizer of the build's source."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "data.jsonl").write_text('{"q": "import ", "choices": ["sys", "os and more"], "answer": 0}\n')
    (tmp_path / "one.yaml").write_text(
        f"task: one\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    code, out, _ = run(capsys, "eval", built, "--server", vllm, "--tasks", "one", "--include", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["results"]["one"]["acc,none"] in (0, 1)
