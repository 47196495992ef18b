"""llama-server as a model of lm-eval.

lm-eval's own API models read the log-probabilities of an echoed prompt, which llama-server does not give. Here each
token of a continuation is asked for as in ``client.rows``, by id and exactly, and the server's own tokenizer is used,
so a GGUF needs no tokenizer files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reapc.errors import CannotBeDone
from reapc.progress import Progress
from reapc.serving.client import Client

Pair = tuple[tuple[str, str], list[int], list[int]]


def continuation(client: Client, context: Sequence[int], following: Sequence[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of ``following`` after ``context`` (both ids), and whether greedy decoding would
    have made it. The start of a context that is too long is left out."""
    whole = [*context, *following]
    if client.info.context and len(whole) + 1 > client.info.context:
        whole = whole[len(whole) + 1 - client.info.context :]
    first = len(whole) - len(following)
    if first < 1:
        raise CannotBeDone(
            f"{client.url}: a continuation of {len(following)} tokens does not fit its context of {client.info.context}"
        )
    total, greedy = 0.0, True
    for position, row in zip(
        range(first - 1, len(whole) - 1), client.rows(whole, range(first - 1, len(whole) - 1), 1), strict=True
    ):
        if row.actual is None:
            raise CannotBeDone(f"{client.url}: gives no log-probability of token {whole[position + 1]}")
        total += row.actual
        # a row holds the best token and, where that is another, the one that followed
        greedy &= int(row.ids[0]) == int(whole[position + 1])
    return total, greedy


def make_model(client: Client, concurrency: int, progress: Progress) -> Any:
    """An ``lm_eval.api.model.LM`` over ``client``, whose server is a llama-server."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    def each(name: str, items: list[Any], work: Callable[[Any], Any]) -> list[Any]:
        found = []
        with progress.task(name, len(items), "requests") as advance, ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    found.append(future.result())
                    advance(1)
            except CannotBeDone as error:
                raise CannotBeDone(
                    f"{error.message}; {len(found)} of {len(items)} {name} requests were done", hint=error.hint
                ) from error
            finally:
                for future in futures:
                    future.cancel()
        return found

    class LlamaServer(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self._eot: int | None = None

        @property
        def eot_token_id(self) -> int:
            if self._eot is None:
                text = client.get("/props").get("eos_token") or client.get("/props").get("bos_token")
                ids = client.tokenize(str(text)) if text else []
                if len(ids) != 1:
                    raise CannotBeDone(f"{client.url}: its end-of-text token is not known ({text!r})")
                self._eot = ids[0]
            return self._eot

        @property
        def tokenizer_name(self) -> str:
            return client.info.model

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # by default a begin-of-text token as the server adds to text, where the model has one
            return client.tokenize(string, special=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
            def one(pair: Pair) -> tuple[float, bool]:
                return continuation(client, pair[1], pair[2])

            found: list[tuple[float, bool]] = each("log-likelihood", requests, one)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            length = min(client.info.context or 2048, 2**31) - 2

            def one(request: Any) -> float:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=length, context_len=1
                    ),
                )
                return sum(continuation(client, context, following)[0] for context, following in windows)

            found: list[float] = each("rolling log-likelihood", requests, one)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            def one(request: Any) -> str:
                context, settings = request.args
                until = settings.get("until") or []
                body = {
                    "model": client.info.model,
                    "prompt": context,
                    "max_tokens": int(settings.get("max_gen_toks", settings.get("max_tokens", 256))),
                    "temperature": float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
                    "stop": [until] if isinstance(until, str) else list(until),
                }
                try:
                    return str(client.post("/v1/completions", body)["choices"][0]["text"])
                except (KeyError, IndexError, TypeError) as error:
                    raise CannotBeDone(f"{client.url}/v1/completions: an answer without text") from error

            found: list[str] = each("generation", requests, one)
            return found

    return LlamaServer()
