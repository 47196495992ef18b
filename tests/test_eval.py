"""`reapc eval`: lm-eval against a real llama-server with tasks of local files, and the commands of other benchmarks."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from serving_fixtures import VOCABULARY, run, stand_in

from reapc.progress import Silent
from reapc.serving.client import Client
from reapc.serving.panel import benchmarks
from reapc.verify.gguf_logits import gguf_log_probs

pytest_plugins = ["serving_fixtures"]

EXAMPLES = [
    {"question": "import os\nimport ", "choices": ["sys", "zebra stripes"], "answer": 0},
    {"question": "def main(", "choices": [")", " : :"], "answer": 1},
    {"question": "Größe ist ", "choices": ["ñandú", "é"], "answer": 0},
    {"question": "", "choices": ["The name", "of it"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
{more}
"""
CHOICE = """doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}"""
GENERATE = """doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks over a local file; data sets are cached beside it, and the hub is out of reach."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    for name, kind, more in (
        ("tiny_choice", "multiple_choice", CHOICE),
        ("tiny_generate", "generate_until", GENERATE),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data, more=more))
    return folder


def request(*arguments: Any) -> SimpleNamespace:
    """What lm-eval hands to a model."""
    return SimpleNamespace(args=arguments)


def test_likelihoods_are_those_of_llamacpp_itself(built, llama) -> None:
    from reapc.serving.llama_eval import make_model

    with Client(llama, "LLAMA_API_KEY") as client:
        client.connect()
        model = make_model(client, 2, Silent())
        pairs = [(e["question"], choice) for e in EXAMPLES for choice in e["choices"] if e["question"]]
        found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
        for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
            before, after = model._encode_pair(context, continuation)
            ids = np.array([before + after], np.int32)
            (rows,) = gguf_log_probs(built / "model.gguf", ids)
            steps = range(len(before) - 1, ids.shape[1] - 1)
            assert total == pytest.approx(sum(rows[i, ids[0, i + 1]] for i in steps), rel=0.01)
            assert greedy == all(rows[i].argmax() == ids[0, i + 1] for i in steps)


def test_a_whole_text_is_read_in_windows(built, llama) -> None:
    """What lm-eval calls rolling: every token once, after as much text as the context holds."""
    from reapc.serving.llama_eval import make_model

    text = " ".join(f"word{i} and" for i in range(40))
    with Client(llama, "LLAMA_API_KEY") as client:
        client.connect()
        model = make_model(client, 1, Silent())
        ids = client.tokenize(text)
        assert len(ids) < 250
        whole = model.loglikelihood_rolling([request(text)])[0]
        (rows,) = gguf_log_probs(built / "model.gguf", np.array([[model.eot_token_id, *ids]], np.int32))
        assert whole == pytest.approx(sum(rows[i, token] for i, token in enumerate(ids)), rel=0.01)
        client.info.context = 34  # two tokens are kept for the server: windows of 32
        parts = [[model.eot_token_id, *ids[:32]]]
        for start in range(32, len(ids), 32):
            end = min(start + 32, len(ids))
            parts.append(ids[max(0, end - 33) : end])
        expected = 0.0
        for number, part in enumerate(parts):
            new = min(32, len(ids) - 32 * number)
            (rows,) = gguf_log_probs(built / "model.gguf", np.array([part], np.int32))
            expected += sum(rows[i - 1, part[i]] for i in range(len(part) - new, len(part)))
        assert model.loglikelihood_rolling([request(text)])[0] == pytest.approx(expected, rel=0.01)


def test_a_greedy_continuation_is_known_as_such(built, llama) -> None:
    from reapc.serving.llama_eval import continuation

    ids = [5, 6, 7]
    for _ in range(3):
        (rows,) = gguf_log_probs(built / "model.gguf", np.array([ids], np.int32))
        ids.append(int(rows[-1].argmax()))
    with Client(llama, "LLAMA_API_KEY") as client:
        client.connect()
        assert continuation(client, ids[:3], ids[3:])[1] is True
        assert continuation(client, ids[:3], [*ids[3:5], (ids[5] + 1) % VOCABULARY])[1] is False
        # a context longer than the server's loses its start
        long = [9] * 400
        assert continuation(client, long, [4, 5])[0] == pytest.approx(
            continuation(client, long[:253], [4, 5])[0], rel=0.01
        )


def test_tasks_run_against_the_server(built, llama, tasks, tmp_path, capsys) -> None:
    out = tmp_path / "results.json"
    names = "tiny_choice,tiny_generate"
    code, text, _ = run(capsys, "eval", built, "--server", llama, "--tasks", names, "--include", tasks, "--out", out)
    assert code == 0
    assert "tiny_choice (4 examples)" in text
    results = json.loads(out.read_text())
    assert set(results["results"]) == set(names.split(","))
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
    assert results["reapc"]["model"] == "model"
    assert "samples" not in results
    again, _, err = run(capsys, "eval", built, "--server", llama, "--tasks", "tiny_choice", "--out", out)
    assert again == 2
    assert "left untouched" in err


def test_chat_goes_through_lm_evals_own_model(built, llama, tasks, capsys) -> None:
    common = ("eval", built, "--server", llama, "--include", tasks, "--chat", "--limit", 2)
    code, out, _ = run(capsys, *common, "--tasks", "tiny_generate", "--json")
    assert code == 0
    results = json.loads(out)
    assert results["n-samples"]["tiny_generate"]["effective"] == 2
    assert results["config"]["model"] == "local-chat-completions"
    code, _, err = run(capsys, *common, "--tasks", "tiny_choice")
    assert code == 1
    assert "leave --chat out" in err


def test_vllm_goes_through_lm_evals_own_model(built, tasks, capsys) -> None:
    """The requests that lm-eval makes: token ids, echoed with log-probabilities."""
    bodies: list[Any] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 128}]}
        if path != "/v1/completions":
            return 404, {}
        bodies.append(body)
        choices = []
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        for index, prompt in enumerate(prompts):
            values = [None, *[-0.5 if index % 2 == 0 else -0.25] * len(prompt)]
            top = [None, *[{"a": value} for value in values[1:]]]
            choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": values, "top_logprobs": top}})
        return 200, {"choices": choices}

    with stand_in(answer) as url:
        arguments = ("--tasks", "tiny_choice", "--include", tasks, "--limit", 2, "--concurrency", 1)
        code, out, err = run(capsys, "eval", built, "--server", url, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["model"] == "local-completions"
    assert len(bodies) == 4
    assert all(body["model"] == "m" and body["echo"] and body["logprobs"] for body in bodies)
    assert all(isinstance(token, int) for body in bodies for token in np.ravel(body["prompt"]).tolist())


def test_a_server_that_dies_during_an_evaluation(built, llama, tasks, capsys) -> None:
    from test_verify_server import relay

    asked: list[str] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, str] | None:
        asked.append(path)
        return None if asked.count("/completion") > 3 else relay(llama, path, body)

    with stand_in(answer) as url:
        arguments = ("--tasks", "tiny_choice", "--include", tasks, "--concurrency", 1)
        code, _, err = run(capsys, "eval", built, "--server", url, *arguments)
    assert code == 1
    assert "the connection broke" in err
    assert "of 8 log-likelihood requests were done" in err


def test_a_task_that_lm_eval_does_not_know(built, llama, capsys) -> None:
    code, _, err = run(capsys, "eval", built, "--server", llama, "--tasks", "gsmk8")
    assert code == 2
    assert "no task 'gsmk8'" in err
    assert "did you mean 'gsm8k'?" in err


def test_data_that_is_not_to_be_had(built, llama, tasks, tmp_path, capsys) -> None:
    (tmp_path / "data.jsonl").unlink()
    code, _, err = run(capsys, "eval", built, "--server", llama, "--tasks", "tiny_choice", "--include", tasks)
    assert code == 1
    assert "the task 'tiny_choice' cannot be loaded: FileNotFoundError" in err
    assert "Hugging Face hub" in err


def test_the_hub_out_of_reach(built, llama, tmp_path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "reapc", "eval", str(built), "--server", llama, "--tasks", "gsm8k"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 1
    assert "the task 'gsm8k' cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr.partition("error: ")[2]


def test_without_lm_eval(built, llama, capsys, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "lm_eval" else real(name, package)
    )
    code, _, err = run(capsys, "eval", built, "--server", llama, "--tasks", "gsm8k")
    assert code == 1
    assert "pip install 'reapc[eval]'" in err


@pytest.mark.parametrize("arguments", [(), ("--tasks", " , "), ("--tasks", "gsm8k", "--print")])
def test_one_of_tasks_and_print(built, llama, capsys, arguments: tuple[str, ...]) -> None:
    code, _, err = run(capsys, "eval", built, "--server", llama, *arguments)
    assert code == 2
    assert "one of the two is expected" in err


# -- the commands of other benchmarks

HOSTILE = ["model", "a b", "it's", "$(touch pwned)", "`x`;rm -rf .", 'quo"te', "org/name-1.5", "--flag"]
STUB = """#!{python}
import json, os, sys
keys = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_KEY")
print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], {{k: os.environ[k] for k in keys if k in os.environ}}]))
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Programs of the benchmarks' names that print what they were given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("evalplus.evaluate", "python", "evalscope", "mini-extra"):
        path = folder / name
        path.write_text(STUB.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def shell(line: str, stubs: Path, **variables: str) -> Any:
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", **variables}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=stubs, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("model", HOSTILE)
def test_the_commands_hand_every_word_on_as_it_is(stubs, model: str) -> None:
    found = benchmarks("http://127.0.0.1:8080", model, "LLAMA_API_KEY", 3)
    assert [item.name.split()[0] for item in found] == [
        "EvalPlus",
        "LiveCodeBench",
        "BFCL",
        "EvalScope",
        "mini-SWE-agent",
    ]
    for item in found:
        for line in item.lines:
            program, words, variables = shell(line, stubs, LLAMA_API_KEY="s e'c\"ret")
            assert words[words.index("--model") + 1] in (model, f"openai/{model}")
            everything = [*words, *variables.values()]
            assert any("http://127.0.0.1:8080/v1" in word for word in everything)
            assert "s e'c\"ret" in everything, program
    assert not (stubs / "pwned").exists()


def test_without_a_key_a_word_stands_for_it(stubs) -> None:
    line = benchmarks("http://h:1", "m", "VLLM_API_KEY")[0].lines[0]
    assert shell(line, stubs)[2] == {"OPENAI_API_KEY": "none"}


def test_print(built, llama, stubs, capsys) -> None:
    code, out, _ = run(capsys, "eval", built, "--server", llama, "--print", "--concurrency", 2)
    assert code == 0
    lines = [line for line in out.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 7
    for line in lines:
        assert shell(line, stubs)[1]
    code, out, _ = run(capsys, "eval", built, "--server", llama, "--print", "--json")
    assert [item["name"] for item in json.loads(out)][3] == "EvalScope (GSM8K, MATH-500)"
