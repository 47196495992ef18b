"""Where calibration text comes from: chats through templates, request logs, and hub data sets streamed over HTTP."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from corpora_fixtures import (
    CALL,
    OBJECTS,
    STRINGS,
    TOOL,
    VOCABULARY,
    WEATHER,
    rows_of,
    sample_text,
    with_template,
    write,
)
from hub_datasets import DataHub
from hub_server import run_with_hub, serving

from reapc.errors import ReapcError
from reapc.mix import MixSource
from reapc.observe.corpora import logs, presets
from reapc.observe.corpora.records import Record, records
from reapc.observe.corpora.render import loses_thoughts
from reapc.observe.corpora.samples import Chat, sample_of
from reapc.observe.corpus import load_data
from reapc.stream.tokens import read_tokens

pytest_plugins = ["corpora_fixtures"]


# Chats


def rendered(record: dict[str, Any], template: str | None = OBJECTS, **keys: Any) -> str:
    source = MixSource(source="x", **keys)
    sample = sample_of(Record("x:1", record), source)
    return with_template(template).text(sample, "x:1")


@pytest.mark.parametrize("arguments", ['{"city": "Reykjavik"}', {"city": "Reykjavik"}])
def test_tool_calls_in_either_form_reach_templates_of_either_kind(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "get_weather", "arguments": arguments}}
    messages = [WEATHER[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *WEATHER[2:]]
    objects = rendered({"messages": messages, "tools": [TOOL]})
    assert "<call>get_weather city=Reykjavik;</call>" in objects
    assert json.dumps(TOOL, sort_keys=True) == json.dumps(json.loads(objects.split("\n")[1]), sort_keys=True)
    assert objects.endswith("<|im_start|>assistant\n<think>the tool says rain</think>It rains.<|im_end|>\n")
    assert '<call>get_weather {"city": "Reykjavik"}</call>' in rendered({"messages": messages}, STRINGS)


def test_columns_that_a_table_fills_with_nulls_are_not_there() -> None:
    empty = {"tool_calls": None, "tool_call_id": None, "name": None, "reasoning_content": None}
    messages = [{**empty, **message} for message in WEATHER]
    assert rendered({"messages": messages, "tools": None}) == rendered({"messages": WEATHER})
    assert rendered({"messages": json.dumps(messages), "tools": json.dumps([json.dumps(TOOL)])}) == rendered(
        {"messages": WEATHER, "tools": [TOOL]}
    )


def test_a_template_that_leaves_out_what_counts_is_not_taken_silently() -> None:
    plain = (ROOT / "demo" / "model" / "chat_template.jinja").read_text()
    with pytest.raises(logs.NoSample, match="leaves out tool calls"):
        rendered({"messages": WEATHER}, plain)
    with pytest.raises(logs.NoSample, match=r"refused it .*no tools here"):
        rendered({"messages": WEATHER}, "{{ raise_exception('no tools here') }}")
    thinking = Chat([WEATHER[0], {"role": "assistant", "content": "<think>hmm, clouds</think>rain"}])
    assert loses_thoughts(thinking, "rain")
    assert not loses_thoughts(thinking, "<think>hmm, clouds</think>rain")


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    known = "{% for m in messages if m.role in ('system', 'user') %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}, WEATHER[0]]
    assert rendered({"messages": messages}, known).startswith("system: Be brief.\n")
    assert rendered({"messages": messages}).startswith("<|im_start|>developer\nBe brief.")


def test_calls_columns_become_a_chat_with_tools() -> None:
    tools = json.dumps(
        [
            {
                "name": "live_score",
                "description": "d",
                "parameters": {"team": {"type": "str, optional", "description": "t"}},
            }
        ]
    )
    record = {
        "query": "Who wins?",
        "tools": tools,
        "answers": '[{"name": "live_score", "arguments": {"team": "Ajax"}}]',
    }
    text = rendered(record, format="calls")
    assert "<call>live_score team=Ajax;</call>" in text
    tool = json.loads(text.split("\n")[1])
    assert tool["function"]["parameters"]["properties"]["team"] == {"type": "string", "description": "t"}
    assert tool["type"] == "function"


def test_prompt_and_completion_text_and_plain() -> None:
    pair = {"prompt": "Say hi", "completion": "hi"}
    chat = "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    assert (
        rendered(pair)
        == rendered({"q": "Say hi", "a": "hi"}, format="prompt", fields={"prompt": "q", "completion": "a"})
        == chat
    )
    assert rendered({"content": "a text"}, format="text", field="content") == "a text"
    assert rendered({"content": "a text"}, field="content") == "a text"
    assert rendered({"turns": [WEATHER[0]]}, field="turns").startswith("<|im_start|>user")
    assert rendered(pair, None, format="plain") == "user: Say hi\nassistant: hi"
    assert "get_weather" in rendered({"messages": WEATHER}, None, format="plain")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert rendered({"messages": parts}) == "<|im_start|>user\na\nb<|im_end|>\n"
    with pytest.raises(logs.NoSample, match="more than text"):
        rendered({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]})


def test_a_chat_without_a_template_is_refused_with_the_mend() -> None:
    with pytest.raises(ReapcError, match="x:1: a chat, but model has no chat template") as error:
        rendered({"messages": WEATHER}, None)
    assert 'format = "plain"' in error.value.hint


def test_chat_ids_are_the_templates_and_text_begins_as_the_tokenizer_begins_it(
    chat_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": WEATHER, "tools": [TOOL]}])
    tokens = load_data(chat_model, str(path), Path("."), 512, 4, 0, VOCABULARY)
    text = chat_tokenizer.apply_chat_template(
        [{**m, "content": m["content"] or ""} for m in WEATHER[:1]], tools=[TOOL], tokenize=False
    )
    row = rows_of(tokens)[0]
    assert chat_tokenizer.decode(row).startswith(text)
    assert row[0] == chat_tokenizer.convert_tokens_to_ids("<|im_start|>")


# Request logs

QUESTION = {"model": "m", "messages": [{"role": "user", "content": "2+2?"}], "tools": [TOOL], "stream": True}
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "It is four.", "tool_calls": [CALL]}}]}
DELTAS = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "It "}}]},
    {"choices": [{"index": 1, "delta": {"content": "another choice"}}]},
    {"choices": [{"index": 0, "delta": {"content": "is four.", "tool_calls": [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '"Reykjavik"}'}}]}}]},
    {"choices": [], "usage": {"total_tokens": 9}},
]  # fmt: skip
EVENTS = "".join(f"data: {json.dumps(delta)}\n\n" for delta in DELTAS) + "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "record",
    [
        {"request": QUESTION, "response": ANSWER},
        {"request": json.dumps(QUESTION), "response": json.dumps(ANSWER)},
        {"request": {"url": "/v1/c", "body": QUESTION}, "response": {"status_code": 200, "body": ANSWER}},
        {"request_body": QUESTION, "response_body": ANSWER},
        {"custom_id": "1", "method": "POST", "url": "/v1/c", "body": QUESTION, "response": {"body": ANSWER}},
        {"messages": QUESTION["messages"], "model_parameters": {"tools": [TOOL]}, "response": ANSWER},
        {"request": QUESTION, "response": DELTAS},
        {"request": QUESTION, "response": {"status_code": 200, "body": DELTAS}},
        {"request": QUESTION, "response": EVENTS},
    ],
)  # fmt: skip
def test_every_form_of_a_log_gives_the_same_chat(record: dict[str, Any]) -> None:
    text = rendered(record)
    assert text == rendered({"messages": [*QUESTION["messages"], ANSWER["choices"][0]["message"]], "tools": [TOOL]})
    assert "It is four.<call>get_weather city=Reykjavik;</call>" in text


def test_completions_are_text_and_failures_are_counted() -> None:
    assert rendered({"request": {"prompt": "Once"}, "response": {"choices": [{"text": " upon"}]}}) == "Once upon"
    stream = [{"choices": [{"index": 0, "text": " up"}]}, {"choices": [{"index": 0, "text": "on"}]}]
    assert rendered({"request": {"prompt": "Once"}, "response": stream}) == "Once upon"
    assert rendered({"messages": QUESTION["messages"], "response": "four"}).endswith("assistant\nfour<|im_end|>\n")
    assert rendered({"body": QUESTION}) == rendered({"messages": QUESTION["messages"], "tools": [TOOL]})
    for response in ({"error": {"message": "busy"}}, {"status_code": 429, "body": "busy"}, [{"error": "cut"}]):
        with pytest.raises(logs.NoSample, match="failed"):
            logs.exchange({"request": QUESTION, "response": response})
    with pytest.raises(logs.NoSample, match="not a chat"):
        logs.exchange({"request": {"input": "an embedding"}, "response": {}})
    with pytest.raises(logs.NoSample, match="OpenAI's form"):
        logs.exchange({"request": QUESTION, "response": [{"choices": ["x"]}]})


def test_a_conversation_counts_once(tmp_path: Path) -> None:
    """An agent sends all that was said with each request, without the thoughts of before."""
    said: list[dict[str, Any]] = [{"role": "system", "content": "You are an agent."}]
    log = []
    for turn in range(4):
        said = [*said, {"role": "user", "content": f"step {turn}"}]
        answer = {"role": "assistant", "content": f"done {turn}"}
        thoughts = {**answer, "reasoning_content": "hidden"}
        log.append({"request": {"messages": said}, "response": {"choices": [{"index": 0, "message": thoughts}]}})
        said = [*said, answer]
    other = {"request": {"messages": [*said[:3], {"role": "user", "content": "another way"}]}, "response": ANSWER}
    path = write(tmp_path / "log.jsonl", [log[0], log[3], other, log[1], log[2], log[3]])
    found = list(records(MixSource(source=str(path)), Path("."), 0))
    kept = [sample_of(record, MixSource(source="x")) for record in found]
    ends = sorted(chat.messages[-1]["content"] for chat in kept if isinstance(chat, Chat))
    assert ends == ["It is four.", "done 3"]


# Hub data sets, streamed by `datasets` over HTTP

EVOL = "hub:theblackcat102/evol-codealpaca-v1"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=100)
    return buffer.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(config: str, split: str, files: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {files}\n---\n".encode()
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[DataHub]:
    code = [{"instruction": sample_text("task", i, 20), "output": sample_text("solution", i, 40)} for i in range(300)]
    thoughts = [
        {"messages": [{"role": "user", "content": sample_text("problem", i, 20)}, {"role": "assistant", "content":
         f"<think>{sample_text('thought', i, 60)}</think>so"}], "num_tokens": 9, "source": "s"}
        for i in range(300)
    ]  # fmt: skip
    trajectory = [
        {"role": "system", "content": "You repair code."},
        {"role": "user", "content": [{"type": "text", "text": "Repair this."}]},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [{"id": "t1", "type": "function", "function":
         {"name": "bash", "arguments": '{"command": "pytest tests"}'}}]},
    ]  # fmt: skip
    trajectories = [
        {"messages": json.dumps([*trajectory, {"role": "tool", "content": sample_text("result", i, 40)}]),
         "instance_id": str(i), "resolved": True, "model": "m", "traj_id": str(i), "patch": ""}
        for i in range(300)
    ]  # fmt: skip
    repos = {
        "theblackcat102/evol-codealpaca-v1": {"train.jsonl": lines(code), "README.md": b"# card\n"},
        "open-r1/Mixture-of-Thoughts": {
            "code/train-0.parquet": parquet(thoughts), "README.md": card("code", "train", "code/train-*"),
        },
        "SWE-bench/SWE-smith-trajectories": {
            "data/tool.jsonl": lines(trajectories), "README.md": card("default", "tool", "data/tool*"),
        },
        "Salesforce/xlam-function-calling-60k": {"a.jsonl": lines(code)},
    }  # fmt: skip
    with serving(DataHub(repos, gated=("Salesforce/xlam-function-calling-60k",))) as server:
        yield server


def test_a_preset_is_streamed_from_the_hub(hub: DataHub, chat_model: Path, chat_tokenizer: Any, tmp_path: Path) -> None:
    out, held_out = tmp_path / "t.safetensors", tmp_path / "h.safetensors"
    options = ["--model", chat_model, "--sequences", 24, "--length", 256, "--held-out", 4, "--held-out-file", held_out]
    done = run_with_hub(
        hub.url, tmp_path / "home", "-m", "reapc", "corpora", "pack", "code", *options, "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "corpus preset:code" in done.stderr  # how far it is
    summary = json.loads(done.stdout)
    total = 24 * 256
    assert summary["files"][str(out)]["domains"] == {"code": total // 2, "reasoning": 1843, "agentic": 1229}
    tokens, rest = read_tokens(out, VOCABULARY), read_tokens(held_out, VOCABULARY)
    assert (tokens.count, rest.count) == (total, 4 * 256)
    assert tokens.domains == ("code", "reasoning", "agentic")
    assert hub.revisions == {source.revision for source in presets.preset("code").sources}  # pinned, none from main
    first = {name: "" for name in tokens.domains}
    for row, domain in zip(rows_of(tokens), tokens.domain, strict=True):
        text = chat_tokenizer.decode(row)
        if text.startswith("<|im_start|>") and len(text) > len(first[tokens.domains[domain]]):
            first[tokens.domains[domain]] = text
    assert first["code"].startswith("<|im_start|>user\ntask number")
    assert "<|im_start|>assistant\nsolution number" in first["code"]
    assert first["reasoning"].startswith("<|im_start|>user\nproblem number")
    assert first["agentic"].startswith('<|im_start|>system\n{"type": "function", "function": {"name": "bash"')
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".arrow", ".parquet")]
    ours, theirs = (
        {
            name
            for row in rows_of(part)
            for name in re.findall(r"(?:task|thought|result)\d+\.", chat_tokenizer.decode(row))
        }
        for part in (tokens, rest)
    )
    assert ours
    assert theirs
    assert not ours & theirs


HUB_ERRORS = """
import json, sys
from reapc.errors import ReapcError
from reapc.mix import MixSource
from reapc.observe.corpora.records import records
from reapc.observe.corpora.samples import sample_of
from pathlib import Path
for keys in json.loads(sys.argv[1]):
    source = MixSource(**keys)
    try:
        sample_of(next(iter(records(source, Path("."), 0))), source)
        print(json.dumps([0, ""]))
    except ReapcError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def errors_of(url: str, home: Path, sources: list[dict[str, str]]) -> list[tuple[int, str]]:
    done = run_with_hub(url, home, "-c", HUB_ERRORS, json.dumps(sources))
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_what_the_hub_does_not_have(hub: DataHub, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, str], int, str]] = [
        ({"source": "hub:no-org/nothing"}, 1, "hub:no-org/nothing (revision main): the hub has no such data set"),
        ({"source": "hub:Salesforce/xlam-function-calling-60k"}, 1, "the data set is gated"),
        ({"source": EVOL, "split": "dev"}, 2, "Available splits: ['train']"),
        ({"source": EVOL, "config": "de"}, 2, "'de' not found"),
        ({"source": EVOL, "revision": "v9"}, 2, f"{EVOL} (revision v9): the hub has no such revision"),
        ({"source": EVOL, "format": "text"}, 2, f"{EVOL}: row 0: the field 'text' is missing"),
        ({"source": EVOL}, 2, "the fields there are: instruction, output"),
        ({"source": EVOL, "field": "instruction"}, 0, ""),
    ]  # fmt: skip
    found = errors_of(hub.url, tmp_path / "home", [case[0] for case in cases])
    for (keys, code, words), (exit_code, message) in zip(cases, found, strict=True):
        assert exit_code == code, (keys, message)
        assert words in message


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    ((code, message),) = errors_of("http://127.0.0.1:9", tmp_path / "home", [{"source": EVOL}])
    assert code == 1
    assert f"{EVOL} (revision main): the hub did not deliver it: ConnectError" in message
    assert "check the network" in message
