"""What a record says: a chat (messages and tools) or a text, by the format of its source."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from reapc.errors import ReapcError
from reapc.mix import COLUMNS, MixSource
from reapc.observe.corpora import logs
from reapc.observe.corpora.logs import NoSample
from reapc.observe.corpora.records import Record

_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "tuple": "array", "set": "array", "array": "array",
    "dict": "object", "object": "object",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """Messages as the chat template takes them: OpenAI's, with the arguments of tool calls parsed where they can be.
    ``plain``: not for the template, but as lines of "role: content"."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    plain: bool = False


def sample_of(record: Record, source: MixSource) -> Chat | str:
    """The record's chat or text. NoSample for one that holds none (the reason is counted); ReapcError, naming the
    place and the columns that are there, for one that is not of the source's format."""
    fmt = source.format if source.format != "auto" else _format_of(record, source)
    columns = source.columns if source.format != "auto" else dict(COLUMNS[fmt])
    if source.format == "auto" and source.field is not None:
        columns[next(iter(columns))] = source.field
    if fmt == "log":
        found = logs.exchange(record.value)
        return found["text"] if "text" in found else _chat(record, found["messages"], found.get("tools"))
    if fmt == "text":
        text = _column(record, columns["text"])
        if not isinstance(text, str):
            raise ReapcError(f"{record.where}: {columns['text']!r} is {type(text).__name__}, a text is expected")
        return text
    if fmt == "prompt" or (fmt == "plain" and columns["messages"] not in record.value):
        return _chat(record, _turns(record, columns), plain=fmt == "plain")
    if fmt == "calls":
        return _single_call(record, columns)
    tools = source.constant_tools or record.value.get(columns.get("tools", ""))
    return _chat(record, _column(record, columns["messages"]), tools, plain=fmt == "plain")


def _format_of(record: Record, source: MixSource) -> str:
    """The format that the record's columns speak of."""
    value = record.value
    if source.field is not None:
        return "chat" if isinstance(_parsed(value.get(source.field)), list) else "text"
    if logs.is_log(value):
        return "log"
    if "messages" in value:
        return "chat"
    if "prompt" in value and "completion" in value:
        return "prompt"
    if "text" in value:
        return "text"
    raise ReapcError(
        f"{record.where}: no 'messages', 'text', 'prompt' and 'completion', or 'request'; {_there(record)}",
        hint="say which column it is: format and field (or fields) of the source",
    )


def _there(record: Record) -> str:
    return f"the fields there are: {', '.join(record.value) or 'none'}"


def _column(record: Record, name: str) -> Any:
    if record.value.get(name) is None:
        empty = "is empty" if name in record.value else "is missing"
        raise ReapcError(f"{record.where}: the field {name!r} {empty}; {_there(record)}", hint="fields of the source")
    return record.value[name]


def _parsed(value: Any) -> Any:
    """JSON in a string as what it says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _filled(value: Any) -> Any:
    """Without the empty fields that a table gives to every row because another row has them."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _turns(record: Record, columns: dict[str, str]) -> list[dict[str, Any]]:
    prompt, completion = _column(record, columns["prompt"]), _column(record, columns["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):  # both as messages
        return [*prompt, *completion]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _single_call(record: Record, columns: dict[str, str]) -> Chat:
    """A question, the tools at hand, and the calls that answer it (``[{"name", "arguments"}]``)."""
    calls = _parsed(_column(record, columns["calls"]))
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ReapcError(f"{record.where}: {columns['calls']!r} is not a list of calls with name and arguments")
    asked = [
        {"type": "function", "id": f"call_{i}", "function": {"name": c["name"], "arguments": c.get("arguments", {})}}
        for i, c in enumerate(calls)
    ]
    messages = [
        {"role": "user", "content": _column(record, columns["prompt"])},
        {"role": "assistant", "content": "", "tool_calls": asked},
    ]
    return _chat(record, messages, _column(record, columns["tools"]))


def _chat(record: Record, messages: Any, tools: Any = None, plain: bool = False) -> Chat:
    messages = _parsed(messages)
    if not isinstance(messages, list) or not messages:
        raise ReapcError(f"{record.where}: a list of messages is expected, with role and content; {_there(record)}")
    return Chat([_message(record, message) for message in messages], _tools(tools), plain)


def _message(record: Record, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ReapcError(f"{record.where}: a message without a role: {str(message)[:80]}")
    found = {key: value for key, value in message.items() if value is not None}  # columns that others fill
    found["content"] = _text(found.get("content", ""))
    if "reasoning" in found:
        found.setdefault("reasoning_content", found["reasoning"])
    if calls := found.pop("tool_calls", None):
        found["tool_calls"] = [_call(record, call) for call in calls]
    return found


def _text(content: Any) -> str:
    """A message's content as one text; its parts are joined by lines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content)
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise NoSample("a message with more than text")
        parts.append(text)
    return "\n".join(parts)


def _call(record: Record, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ReapcError(f"{record.where}: a tool call without a function's name: {str(call)[:80]}")
    arguments = _parsed(_filled(function.get("arguments")) or {})
    kept = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **kept, "function": {**function, "arguments": arguments}}


def _json_type(parameter: dict[str, Any]) -> dict[str, Any]:
    kind = re.match(r"\w*", str(parameter.get("type", "string")).lower())
    return parameter | {"type": _TYPES.get(kind[0] if kind else "", "string")}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them, from objects or JSON, with or without the outer {"type": "function"}."""
    tools = _parsed(tools)
    if not isinstance(tools, list) or not tools:
        return None
    found = []
    for item in tools:
        tool = _filled(_parsed(item))
        if not isinstance(tool, dict):
            raise NoSample("tools that are not objects")
        if "function" not in tool:
            tool = {"type": "function", "function": {key: v for key, v in tool.items() if key != "type"}}
        function = dict(tool["function"])
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and all(isinstance(value, dict) for value in parameters.values()):
            function["parameters"] = {  # names to descriptions alone, with Python's names of types (xLAM)
                "type": "object",
                "properties": {name: _json_type(value) for name, value in parameters.items()},
            }
        found.append({**tool, "function": function})
    return found
