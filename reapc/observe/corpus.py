"""Calibration and held-out data: token ids from a file, or packed from text with the model's own tokenizer."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reapc.errors import ReapcError
from reapc.stream.tokens import Tokens, read_tokens


def _documents(path: Path) -> Iterator[str]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix in (".txt", ".md", ".py", ".rst", ".c", ".h", ".json", ".jsonl"):
                yield from _documents(file)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip():
                yield _jsonl_text(path, number, line)
    else:
        yield path.read_text(errors="replace")


def _jsonl_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        if isinstance(row.get("messages"), list):
            return "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
        return str(row["text"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReapcError(f"{path}:{number}: an object with 'text' or 'messages' is expected") from error


def _python_documents() -> Iterator[str]:
    """Text that every Python carries: its documentation topics and its standard library's source."""
    from pydoc_data import topics

    yield from topics.topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("*.py")):
        yield file.read_text(errors="replace")


def tokenize(folder: Path, data: str, base: Path, length: int, limit: int, seed: int) -> Tokens:
    """At most ``limit`` packed sequences of ``length`` tokens, from shuffled documents of ``data``: "auto" (text
    of this Python installation), a text file, a .jsonl file (``text`` or ``messages``), or a folder of text."""
    from transformers import AutoTokenizer

    if data == "auto":
        documents = list(_python_documents())
        name = "python-docs"
    else:
        path = Path(data) if Path(data).exists() else base / data
        if not path.exists():
            raise ReapcError(
                f"data = {data!r}: no such file or folder (looked in {Path.cwd()} and {base})",
                hint='a .safetensors file of token ids, .txt, .jsonl, a folder of text, or "auto"',
            )
        documents = list(_documents(path))
        name = path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ReapcError(
            f"{folder}: no usable tokenizer to read {data!r} with ({str(error).splitlines()[0]})",
            hint="give token ids instead: a safetensors file with input_ids",
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where no file is
        raise ReapcError(
            f"{folder}: no usable tokenizer to read {data!r} with (it has no tokenizer.json, or an empty one)",
            hint="give token ids instead: a safetensors file with input_ids",
        )
    end = tokenizer.eos_token_id
    order = np.random.default_rng(seed).permutation(len(documents))
    stream: list[int] = []
    for i in order:
        stream += tokenizer(documents[i], add_special_tokens=False)["input_ids"]
        if end is not None:
            stream.append(end)
        if len(stream) >= length * limit:
            break
    rows = min(limit, len(stream) // length)
    if not rows:
        raise ReapcError(f"data = {data!r}: {len(stream)} tokens, fewer than one sequence of {length}")
    ids = np.array(stream[: rows * length], np.int32).reshape(rows, length)
    return Tokens(ids, np.ones(ids.shape, bool), np.zeros(rows, np.int32), ("all",), name)


def load_data(folder: Path, data: str, base: Path, length: int, limit: int, seed: int, vocab_size: int) -> Tokens:
    """``data`` of a recipe or command line as Tokens: at most ``limit`` sequences of at most ``length``."""
    if data.endswith(".safetensors"):
        path = Path(data) if Path(data).exists() else base / data
        tokens = read_tokens(path, vocab_size)
        if tokens.sequences > limit:
            rows = np.sort(np.random.default_rng(seed).permutation(tokens.sequences)[:limit])
            return tokens.take(rows, length)
        return tokens.take(np.arange(tokens.sequences), length)
    tokens = tokenize(folder, data, base, length, limit, seed)
    if int(tokens.input_ids.max()) >= vocab_size:
        raise ReapcError(
            f"{folder}: its tokenizer gives token id {int(tokens.input_ids.max())}, the model's vocabulary has "
            f"{vocab_size}",
            hint="the tokenizer files belong to another model; copy the right ones",
        )
    return tokens
