"""Request logs of an OpenAI-style server: pairs of request and response, as proxies write them, become samples.

A line is an object with ``request`` and ``response`` (or ``request_body`` and ``response_body``), each the body itself,
the body as a string, or an object with ``body``; or with ``body`` as in the Batch API; or with ``messages`` and
``response`` beside each other, as LiteLLM logs them. A streamed response is a list of its chunks, or the text of the
event stream (``data: {...}`` lines)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

_PARTS = ("request", "request_body", "body")


class NoSample(Exception):
    """A record that holds no sample; the message is the reason that is counted."""


def is_log(record: dict[str, Any]) -> bool:
    """Whether a record looks like a logged request."""
    return any(_object(record.get(key)) is not None for key in _PARTS) or (
        isinstance(record.get("messages"), list) and "response" in record
    )


def exchange(record: dict[str, Any]) -> dict[str, Any]:
    """``{"messages", "tools"}`` of a chat with the answer as its last message, or ``{"text"}`` of a completion.
    NoSample says why a record holds neither."""
    try:
        return _exchange(record)
    except (AttributeError, KeyError, TypeError) as error:  # a list where an object is due, and the like
        raise NoSample("not of OpenAI's form") from error


def _exchange(record: dict[str, Any]) -> dict[str, Any]:
    request = _request(record)
    response = _response(record)
    answer = None if response is None else _first_choice(response)
    if isinstance(request.get("messages"), list) and request["messages"]:
        message = None if answer is None else answer.get("message")
        messages = [*request["messages"], message] if isinstance(message, dict) else list(request["messages"])
        return {"messages": messages, "tools": request.get("tools")}
    if isinstance(prompt := request.get("prompt"), str):
        text = "" if answer is None else answer.get("text") or ""
        return {"text": prompt + text}
    raise NoSample("not a chat or a completion")


def _object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _request(record: dict[str, Any]) -> dict[str, Any]:
    for key in _PARTS:
        found = _object(record.get(key))
        if found is not None:
            return _object(found["body"]) or found if "body" in found else found
    parameters = _object(record.get("model_parameters")) or {}
    return {"tools": parameters.get("tools"), **record}


def _response(record: dict[str, Any]) -> dict[str, Any] | None:
    """The response's body; None where only the request was logged."""
    value = record.get("response", record.get("response_body"))
    if value is None:
        return None
    outer = _object(value)
    if outer is not None and "body" in outer:
        status = outer.get("status_code", outer.get("status"))
        if isinstance(status, int) and status >= 400:
            raise NoSample("the request failed")
        value = outer["body"]
    body = _object(value)
    if body is None:
        chunks = _chunks(value)
        if isinstance(value, str) and not chunks:  # the answer alone
            return {"choices": [{"message": {"role": "assistant", "content": value}, "text": value}]}
        body = join_chunks(chunks)
    if body.get("error"):
        raise NoSample("the request failed")
    return body


def _chunks(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):  # server-sent events
        value = [line[5:].strip() for line in value.splitlines() if line.startswith("data:")]
        value = [item for item in value if item != "[DONE]"]
    if isinstance(value, list):
        return [found for item in value if (found := _object(item)) is not None]
    return []


def _first_choice(body: dict[str, Any]) -> dict[str, Any] | None:
    choices = body.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def join_chunks(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The body that a streamed response would have had: its first choice with all that the deltas add up to."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    text, seen = "", False
    for chunk in chunks:
        if chunk.get("error"):
            return {"error": chunk["error"]}
        for choice in chunk.get("choices") or []:
            if choice.get("index", 0) != 0:
                continue
            seen = True
            text += choice.get("text") or ""
            delta = choice.get("delta") or {}
            for key in ("content", "reasoning_content", "reasoning"):
                if delta.get(key):
                    message[key] = message.get(key, "") + delta[key]
            for part in delta.get("tool_calls") or []:
                _add_call(calls.setdefault(part.get("index", len(calls)), {}), part)
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return {"choices": [{"message": message, "text": text}]} if seen else {}


def _add_call(call: dict[str, Any], part: dict[str, Any]) -> None:
    function = call.setdefault("function", {"name": "", "arguments": ""})
    call.setdefault("type", "function")
    if part.get("id"):
        call["id"] = part["id"]
    for key in ("name", "arguments"):
        function[key] += (part.get("function") or {}).get(key) or ""


def last_of_each(samples: Iterable[dict[str, Any] | None]) -> Iterator[bool]:
    """For every sample whether it stays: a chat that another one repeats as its beginning does not (an agent sends the
    whole conversation with each request), nor does one that was logged before. None, no sample, does not."""
    wholes: list[bytes | None] = []
    inner: set[bytes] = set()
    for sample in samples:
        if sample is None:
            wholes.append(None)
            continue
        chain = _chain(sample)
        inner.update(chain[:-1])
        wholes.append(chain[-1])
    seen: set[bytes] = set()
    for whole in wholes:
        yield whole is not None and whole not in inner and whole not in seen
        if whole is not None:
            seen.add(whole)


def _chain(sample: dict[str, Any]) -> list[bytes]:
    """Digests of the sample's beginnings, the whole one last; thoughts and ids, which clients do not send back, left
    out."""
    if "messages" not in sample:
        return [hashlib.sha256(sample["text"].encode()).digest()]
    digests = []
    state = hashlib.sha256(json.dumps(sample.get("tools"), sort_keys=True).encode())
    for message in sample["messages"]:
        found = message if isinstance(message, dict) else {}
        calls = [
            [(call.get("function") or {}).get("name"), _object((call.get("function") or {}).get("arguments"))]
            for call in found.get("tool_calls") or []
            if isinstance(call, dict)
        ]
        said = [found.get("role"), found.get("content") or "", calls]
        state.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        digests.append(state.digest())
    return digests
