"""The words of token ids, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_BEFORE = 12  # ids that a token's text may depend on: the rest of a character, the space before a word


def token_text(folder: Path) -> Callable[[Sequence[int], int], str | None]:
    """A function of the ids before and an id that gives the text which the id adds, with the tokenizer of the model in
    ``folder``; None for every id where there is none that can be read. An unfinished character is U+FFFD."""
    decode = _decoder(folder)

    def text(before: Sequence[int], token: int) -> str | None:
        if decode is None:
            return None
        near = list(before[-_BEFORE:])
        try:
            head, whole = decode(near), decode([*near, token])
        except Exception:  # whatever a tokenizer raises at an id that it does not have
            return None
        same = next(
            (i for i, (x, y) in enumerate(zip(head, whole, strict=False)) if x != y), min(len(head), len(whole))
        )
        return whole[same:]

    return text


def _decoder(folder: Path) -> Callable[[list[int]], str] | None:
    from tokenizers import Tokenizer

    found: Any
    try:
        found = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda ids: str(found.decode(ids, skip_special_tokens=False))
    except Exception:  # none, or one that this version cannot read: it raises plain Exceptions
        pass
    from reapc.observe.corpora.render import load_tokenizer

    try:
        found = load_tokenizer(folder, "held-out text")
    except Exception:  # ReapcError where there is none; transformers raises anything at a damaged one
        return None
    return lambda ids: str(found.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
