"""Samples as token ids: chats through the model's own chat template, texts as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from reapc.errors import ReapcError
from reapc.observe.corpora.logs import NoSample
from reapc.observe.corpora.samples import Chat


def load_tokenizer(folder: Path, data: str) -> Any:
    """The tokenizer of the model in ``folder``; ReapcError where there is none to read ``data`` with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    hint = "give token ids instead: a safetensors file with input_ids"
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except AttributeError:  # transformers 5.23 stumbles over the config of a model that it does not know (kimi_k2)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ReapcError(
            f"{folder}: no usable tokenizer to read {data!r} with ({str(error).splitlines()[0]})", hint=hint
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where no file is
        raise ReapcError(
            f"{folder}: no usable tokenizer to read {data!r} with (it has no tokenizer.json, or an empty one)",
            hint=hint,
        )
    tokenizer.model_max_length = _LONGEST  # else transformers warns of every long text; rows are cut here
    return tokenizer


_LONGEST = 10**9


class Renderer:
    """Turns samples into ids with one model's tokenizer."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.folder = folder

    def text(self, sample: Chat | str, where: str) -> str:
        """What the model reads. ReapcError for a chat where the model has no chat template; NoSample where the template
        refuses the chat or leaves a part of it out."""
        if isinstance(sample, str):
            return sample
        if sample.plain:
            return _plain(sample)
        if not self.tokenizer.chat_template:
            raise ReapcError(
                f"{where}: a chat, but {self.folder} has no chat template",
                hint='format = "plain" in the source renders it as lines of "role: content", format = "text" takes a '
                "column as it is",
            )
        return self._templated(sample)

    def ids(self, text: str, special: bool) -> np.ndarray:
        """(tokens,) int32; ``special``: with the tokens that the tokenizer puts around a text (a template writes its
        own)."""
        return np.array(self.tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)

    def _templated(self, chat: Chat) -> str:
        """The chat as the template writes it. Templates differ in what they take (``_variants``)."""
        reason = ""
        for messages in _variants(chat.messages):
            try:
                text = str(self.tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False))
            except Exception as error:  # whatever a template raises, or what it does to Python's operators
                words = str(error).splitlines()[0] if str(error) else repr(error)
                reason = reason or f"the chat template refused it ({words})"
                continue
            if not (lost := _left_out(messages, text)):
                return text
            reason = f"the chat template leaves out {lost}"
        raise NoSample(reason)


def _left_out(messages: list[dict[str, Any]], text: str) -> str:
    """What of the messages the text does not say."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["name"] not in text or _mark(function["arguments"]) not in text:
                return "tool calls"
        if message["role"] == "developer" and _mark(message["content"]) not in text:
            return "the developer's message"
    return ""


def loses_thoughts(chat: Chat, text: str) -> bool:
    """Whether the thoughts of the last message are not in the text; those of earlier ones templates leave out."""
    last = chat.messages[-1]
    thoughts, end, _ = last["content"].partition("</think>")
    thoughts = last.get("reasoning_content") or (thoughts if end else "")
    return isinstance(thoughts, str) and _mark(thoughts) not in text


def _mark(value: Any) -> str:
    """The longest word in ``value`` (arguments or a text): whatever the escaping, it is in a text that says it."""
    return max(re.findall(r"[A-Za-z0-9]+", json.dumps(value, ensure_ascii=False)), key=len, default="")


def _variants(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages as they are; for templates that want them, with the arguments of calls as JSON text, and with ids
    of nine letters and digits (Mistral); all of these once more with "system" for "developer"."""
    found = [messages]
    if any("tool_calls" in message for message in messages):
        found += [[_with_text_arguments(message) for message in messages], _with_short_ids(messages)]
    if any(message["role"] == "developer" for message in messages):
        found += [[m | {"role": "system"} if m["role"] == "developer" else m for m in known] for known in found]
    return found


def _with_short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known: dict[str, str] = {}

    def short(value: Any) -> str:
        return known.setdefault(str(value), f"call{len(known):05d}")

    found = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [call | {"id": short(call.get("id"))} for call in message["tool_calls"]]}
        elif "tool_call_id" in message:
            message = message | {"tool_call_id": short(message["tool_call_id"])}
        found.append(message)
    return found


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": function | {"arguments": text}})
    return message | {"tool_calls": calls}


def _plain(chat: Chat) -> str:
    lines = []
    for message in chat.messages:
        calls = [f"\n{json.dumps(call['function'], ensure_ascii=False)}" for call in message.get("tool_calls", ())]
        lines.append(f"{message['role']}: {message['content']}{''.join(calls)}")
    return "\n".join(lines)
