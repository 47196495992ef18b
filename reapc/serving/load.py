"""Loops, latency and throughput of a running server over a set of prompts, all from the same streamed answers."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapc.errors import CannotBeDone, ReapcError
from reapc.progress import Progress
from reapc.serving.client import Client, Completion

if TYPE_CHECKING:
    from reapc.stream.tokens import Tokens

Prompt = Sequence[int] | str
NGRAM = 4
LOOP_CHARACTERS = 60  # a tail that repeats itself over at least this many characters,
LOOP_TIMES = 4  # and this many times, is a loop
PREFIX_TOKENS = 64


def prompts_of(tokens: Tokens, context: int | None) -> list[Prompt]:
    """The first half of every held-out sequence, at most ``PREFIX_TOKENS`` tokens or half the context, as ids."""
    lengths, most = tokens.mask.sum(axis=1), min(PREFIX_TOKENS, (context or 2 * PREFIX_TOKENS) // 2)
    return [
        tokens.input_ids[row][: max(1, min(most, int(lengths[row]) // 2))].tolist() for row in range(tokens.sequences)
    ]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: a line each, or in .jsonl an object with "prompt" (text or token ids) a line."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ReapcError(f"{path}: cannot be read: {error}") from error
    if not lines:
        raise ReapcError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return list(lines)
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReapcError(f'{path}:{number}: an object with "prompt" is expected') from error
        ids = isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt)
        if not (isinstance(prompt, str) and prompt) and not ids:
            raise ReapcError(f'{path}:{number}: "prompt" is neither text nor a list of token ids')
        prompts.append(prompt)
    return prompts


def ends_in_loop(text: str) -> bool:
    """Whether the text ends in one unit repeated ``LOOP_TIMES`` times or more over ``LOOP_CHARACTERS`` characters."""
    for period in range(1, len(text) // LOOP_TIMES + 1):
        span = max(LOOP_CHARACTERS, period * LOOP_TIMES)
        if span > len(text):
            break
        tail = text[-span:]
        if tail[period:] == tail[:-period]:
            return True
    return False


def repeated_share(text: str, n: int = NGRAM) -> float | None:
    """The share of n-grams (of words and signs) that had been there before; None for a text of fewer than n."""
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@dataclass
class Load:
    """What the prompts showed."""

    prompts: int
    concurrency: int
    max_tokens: int
    seconds: float
    answers: list[Completion] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Rates are shares of the prompts; times in seconds; throughput counts made tokens over the wall time."""
        answers = self.answers
        first = [a.first_seconds for a in answers if a.first_seconds is not None]
        each = [
            (a.total_seconds - a.first_seconds) / (a.tokens - 1)
            for a in answers
            if a.first_seconds is not None and a.tokens > 1
        ]
        shares = [share for a in answers if (share := repeated_share(a.text)) is not None]
        made = sum(a.tokens for a in answers)
        return {
            "prompts": self.prompts,
            "concurrency": self.concurrency,
            "max_tokens": self.max_tokens,
            "loop_rate": sum(ends_in_loop(a.text) for a in answers) / len(answers),
            "not_ended_rate": sum(a.finish == "length" for a in answers) / len(answers),
            f"repeated_{NGRAM}grams": statistics.fmean(shares) if shares else None,
            "empty_answers": sum(not a.text for a in answers),
            "first_token_seconds": _spread(first),
            "per_token_seconds": _spread(each),
            "tokens": made,
            "tokens_per_second": made / self.seconds if self.seconds else None,
            "seconds": self.seconds,
        }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}


def run_load(client: Client, prompts: list[Prompt], max_tokens: int, concurrency: int, progress: Progress) -> Load:
    """Sends every prompt, ``concurrency`` at a time, and reads the answers as they are made (greedily)."""
    context = client.info.context
    room = max_tokens
    if context:
        longest = max((len(p) for p in prompts if not isinstance(p, str)), default=0)
        room = min(max_tokens, context - longest - 1)
        if room < 1:
            raise CannotBeDone(
                f"{client.url}: its context of {context} tokens leaves no room after {longest} of prompt"
            )
    answers: list[Completion] = []
    start = time.monotonic()
    try:
        with (
            progress.task("completions", len(prompts), "prompts") as advance,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            futures = [pool.submit(client.stream, prompt, room) for prompt in prompts]
            try:
                for future in as_completed(futures):
                    answers.append(future.result())
                    advance(1)
            finally:
                for future in futures:
                    future.cancel()
    except CannotBeDone as error:
        raise CannotBeDone(
            f"{error.message}; {len(answers)} of {len(prompts)} prompts had been answered", hint=error.hint
        ) from error
    return Load(len(prompts), concurrency, room, time.monotonic() - start, answers)
