"""A model's tokenizer with chat templates, and texts that say which they are, for the tests of calibration corpora.

PYTEST_DONT_REWRITE: test modules import the helpers here before pytest loads it for its fixtures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_model

from reapc.mix import parse_sources
from reapc.observe.corpora.render import Renderer, load_tokenizer
from reapc.observe.corpus import load_split
from reapc.stream.tokens import Tokens

VOCABULARY = 2048
# Written as Qwen's: tools in the system message, calls with their arguments as an object, thoughts before the answer.
OBJECTS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for c in
m.tool_calls or [] %}<call>{{ c.function.name }} {% for key, value in c.function.arguments.items() %}{{ key }}={{ value
}};{% endfor %}</call>{% endfor %}<|im_end|>
{% endfor %}"""
# As DeepSeek-V3's: arguments are a string that is joined to others.
STRINGS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>'
}}{% endfor %}<|im_end|>
{% endfor %}"""
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Reykjavik"}'}}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}}

WEATHER = [
    {"role": "user", "content": "How is it in Reykjavik?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It rains.", "reasoning_content": "the tool says rain"},
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer with a chat template that knows tools, and a tiny model's config.json."""
    folder = tmp_path_factory.mktemp("model")
    made = make_model(
        tmp_path_factory.mktemp("made") / "m", num_hidden_layers=1, mlp_only_layers=[], vocab_size=VOCABULARY
    )
    for file in (
        made / "config.json",
        *(ROOT / "demo" / "model" / n for n in ("tokenizer.json", "tokenizer_config.json")),
    ):
        shutil.copy(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(OBJECTS)
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_model: Path) -> Any:
    return load_tokenizer(chat_model, "test")


def with_template(template: str | None) -> Renderer:
    tokenizer = load_tokenizer(ROOT / "demo" / "model", "test")
    tokenizer.chat_template = template
    return Renderer(tokenizer, Path("model"))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample_text(kind: str, number: int, words: int) -> str:
    """A text that says which it is at its beginning, and that no other begins like."""
    return f"{kind} number {number} says: " + " ".join(f"{kind}{number}.{i}" for i in range(words))


def texts(kind: str, count: int, words: int = 60) -> list[dict[str, str]]:
    return [{"text": sample_text(kind, i, words + 13 * (i % 9))} for i in range(count)]


def rows_of(tokens: Tokens) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(tokens.input_ids, tokens.mask, strict=True)]


def source_of(path: Path, **keys: Any) -> dict[str, Any]:
    return {"source": str(path), **keys}


def pack(model: Path, sources: list[dict[str, Any]], length: int, limit: int, held_out: int = 0, **settings: Any):
    parsed = parse_sources(sources, "data")
    return load_split(model, parsed, Path("."), length, limit, held_out, 0, VOCABULARY, **settings)
