"""A running server behind the OpenAI API: which engine it is, what it serves, and log-probabilities by token id.

vLLM gives the log-probabilities of a prompt's tokens (``prompt_logprobs`` of /v1/completions, keyed by id).
llama-server gives those of generated tokens only, keyed by id (``n_probs`` of /completion): a position is asked as a
prompt of the tokens before it, and the token that follows is forced by ``logit_bias``, which changes what is drawn and
not what is reported. Both were tried on the engines that reapc pins.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import numpy as np

from reapc.errors import CannotBeDone, ReapcError

LLAMA_SERVER = "llama-server"
LLAMA_PYTHON = "llama_cpp.server"
VLLM = "vllm"
UNKNOWN = "unknown"
_FORCED = 1e6  # added to one token's logit so that it is drawn
_OWNERS = {"llamacpp": LLAMA_SERVER, "vllm": VLLM, "me": LLAMA_PYTHON}
REQUEST_SECONDS = 600.0
_BROKEN = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """What a server knows of the token after some prefix: ``ids`` (k,) with their ``log_probs`` (k,), best first, and
    ``actual``, the log-probability of the token that followed (None where the server did not tell)."""

    ids: np.ndarray
    log_probs: np.ndarray
    actual: float | None

    @staticmethod
    def of(values: dict[int, float], actual: float | None) -> Row:
        ids = np.fromiter(values, dtype=np.int64, count=len(values))
        log_probs = np.fromiter(values.values(), dtype=np.float64, count=len(values))
        order = np.argsort(-log_probs, kind="stable")
        return Row(ids[order], log_probs[order], actual)


@dataclass(frozen=True)
class Completion:
    """A streamed answer. Times in seconds since the request was sent; ``first_seconds`` is None when nothing came."""

    text: str
    tokens: int
    finish: str | None
    first_seconds: float | None
    total_seconds: float


@dataclass
class ServerInfo:
    """What a server says of itself; None where it does not."""

    kind: str
    model: str
    vocab: int | None = None
    context: int | None = None
    tensor_bytes: int | None = None
    path: str | None = None
    slots: int | None = None
    version: str | None = None
    others: list[str] = field(default_factory=list)


class NeedsFewer(Exception):
    """The server gives fewer log-probabilities per position than were asked for; ``allowed`` where it says how many."""

    def __init__(self, allowed: int | None) -> None:
        super().__init__()
        self.allowed = allowed


def base_of(url: str) -> str:
    """``http://host:port`` of an address as users write it, with or without /v1. ReapcError when it is none."""
    written = url if "//" in url else f"http://{url}"
    try:
        parsed = httpx2.URL(written)
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except (httpx2.InvalidURL, ValueError):
        good = False
    if not good:
        raise ReapcError(f"--server {url!r} is not an address", hint="write for example http://127.0.0.1:8080")
    return str(parsed.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1")


class Client:
    """One server. Every failure is a CannotBeDone that says what was asked and what came; safe to use from threads.

    ``key_variable`` names the environment variable that holds the API key; ``wait`` bounds one request, in seconds."""

    def __init__(self, url: str, key_variable: str, model: str | None = None, wait: float = REQUEST_SECONDS) -> None:
        self.url = base_of(url)
        self.key_variable = key_variable
        self.named = model
        key = os.environ.get(key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._sent_key = bool(key)
        # trust_env off: a proxy variable must not swallow requests to the loopback address
        self._http = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(wait, connect=min(10.0, wait)),
            trust_env=not _is_loopback(self.url),
            # llama-server closes a connection that was idle for five seconds
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),
        )
        self.info = ServerInfo(UNKNOWN, model or "")
        self._plain: int | None = None

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> ServerInfo:
        """Finds out what the server is. CannotBeDone: not reachable, no OpenAI API, a key is missing."""
        try:
            answer = self.get("/v1/models")
            models = [item for item in answer["data"] if isinstance(item["id"], str)]
            first = models[0]
        except (KeyError, TypeError, IndexError) as error:
            raise CannotBeDone(
                f"{self.url}: /v1/models does not answer as an OpenAI server does",
                hint="give the address of a llama-server or a vLLM server: --server http://127.0.0.1:8080",
            ) from error
        names = [item["id"] for item in models]
        if self.named:
            chosen = next((m for m in models if self.named == m["id"] or self.named in m.get("aliases", [])), None)
            if chosen is None:
                raise ReapcError(f"{self.url}: serves no model {self.named!r}", hint=f"it serves: {', '.join(names)}")
            first = chosen
        kind = _OWNERS.get(str(first.get("owned_by")), UNKNOWN)
        info = ServerInfo(kind, first["id"], others=[name for name in names if name != first["id"]])
        if kind == LLAMA_SERVER:
            meta, props = first.get("meta") or {}, self.get("/props")
            info.vocab, info.tensor_bytes = meta.get("n_vocab"), meta.get("size")
            info.context = (props.get("default_generation_settings") or {}).get("n_ctx")
            info.path, info.slots = props.get("model_path"), props.get("total_slots")
            info.version = props.get("build_info")
        elif kind == VLLM:
            info.context, info.path = first.get("max_model_len"), first.get("root")
            info.version = self._optional("/version").get("version")
        self.info = info
        return info

    def alive(self) -> bool:
        """Whether it still answers at all."""
        try:
            self._http.get("/v1/models", timeout=5.0)
        except httpx2.TransportError:
            return False
        return True

    # -- log-probabilities

    def rows(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[Row]:
        """For each of ``positions`` (ascending, below len(ids) - 1): what the server expects after ids[: p + 1].

        NeedsFewer when ``top`` is more than the server gives."""
        if self.info.kind == LLAMA_SERVER:
            for position in positions:
                yield self._row_after(ids[: position + 1], ids[position + 1], top)
        else:
            yield from self._prompt_rows(ids, positions, top)

    def _row_after(self, prefix: Sequence[int], following: int, top: int) -> Row:
        found = self._forced(prefix, following, top)
        if found is not None:
            return found
        # Half of a UTF-8 character is held back with all that belongs to it: another token is drawn instead, and the
        # one that followed is looked up among the others, among all of them where need be.
        found = self._forced(prefix, self._plain_token(), top)
        if found is not None and following not in found.ids and self.info.vocab:
            found = self._forced(prefix, self._plain_token(), self.info.vocab)
        if found is None:
            raise self._garbage("/completion", "completion_probabilities")
        known = np.flatnonzero(found.ids == following)
        actual = float(found.log_probs[known[0]]) if len(known) else None
        return Row(found.ids, found.log_probs, actual)

    def _forced(self, prefix: Sequence[int], token: int, top: int) -> Row | None:
        """What the server expects after ``prefix``, while it draws ``token``; None when it tells nothing."""
        answer = self.post(
            "/completion",
            {
                "prompt": list(prefix), "n_predict": 1, "n_probs": top, "temperature": -1.0, "cache_prompt": True,
                "logit_bias": [[int(token), _FORCED]],
            },
        )  # fmt: skip
        if not answer.get("completion_probabilities"):
            return None
        try:
            found = answer["completion_probabilities"][0]
            values = {int(item["id"]): _number(item["logprob"]) for item in found["top_logprobs"]}
            drawn, actual = int(found["id"]), _number(found["logprob"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._garbage("/completion", "completion_probabilities with an id in each entry") from error
        values.setdefault(drawn, actual)
        return Row.of(values, actual if drawn == token else values.get(token))

    def _plain_token(self) -> int:
        """A token of whole characters."""
        if self._plain is None:
            self._plain = self.tokenize("a")[0]
        return self._plain

    def _prompt_rows(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[Row]:
        body = {
            "model": self.info.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top,
        }  # fmt: skip
        answer = self.post("/v1/completions", body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if not entries or len(entries) != len(ids):
                raise ValueError
            for position in positions:
                values = {int(token): _number(item["logprob"]) for token, item in entries[position + 1].items()}
                yield Row.of(values, values.get(int(ids[position + 1])))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CannotBeDone(
                f"{self.url}: gives no log-probabilities of prompt tokens by id ({self.describe()})",
                hint="log-probabilities by text alone are ambiguous and are not used: "
                "vLLM (prompt_logprobs) and llama-server (n_probs) give ids",
            ) from error

    # -- completions

    def stream(self, prompt: Sequence[int] | str, max_tokens: int) -> Completion:
        """One greedy completion, streamed."""
        body: dict[str, Any] = {
            "model": self.info.model, "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return self._once_more(lambda: self._read_stream(body))

    def _read_stream(self, body: dict[str, Any]) -> Completion:
        start = time.monotonic()
        text: list[str] = []
        pieces, finish, first, counted, last = 0, None, None, None, start
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code >= 400:
                    response.read()
                    self._refuse(response, "/v1/completions")
                for line in response.iter_lines():
                    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                        continue
                    chunk = json.loads(line[5:])
                    if "error" in chunk:
                        raise CannotBeDone(f"{self.url}: {_message(chunk)}")
                    counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
                    for choice in chunk.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        if choice.get("finish_reason") and not choice.get("text"):
                            continue
                        last = time.monotonic()
                        first = first or last
                        pieces += 1
                        text.append(choice.get("text") or "")
        except httpx2.TransportError as error:
            if first is None:
                raise
            raise self._lost(error) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise self._garbage("/v1/completions", "a stream of JSON chunks") from error
        return Completion(
            "".join(text),
            counted or pieces,
            finish,
            first - start if first else None,
            (last if first else time.monotonic()) - start,
        )

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids by llama-server's own tokenizer; ``special``: with the begin-of-text token of a model that wants
        one."""
        answer = self.post("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._garbage("/tokenize", "a list of tokens") from error

    def metrics(self) -> str | None:
        """The Prometheus text of /metrics; None where there is none."""
        try:
            response = self._http.get("/metrics", timeout=5.0)
        except httpx2.HTTPError:
            return None
        return response.text if response.status_code == 200 else None

    # -- plumbing

    def describe(self) -> str:
        """The engine as people say it."""
        version = f" {self.info.version}" if self.info.version else ""
        return f"{self.info.kind}{version}" if self.info.kind != UNKNOWN else "an engine that reapc does not know"

    def _optional(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path, timeout=10.0)
            found = response.json() if response.status_code == 200 else {}
        except (httpx2.HTTPError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers with."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        response = self._once_more(lambda: self._http.request(method, path, json=body))
        if response.status_code >= 400:
            self._refuse(response, path)
        try:
            answer = response.json()
        except ValueError as error:
            raise self._garbage(path, "JSON") from error
        if not isinstance(answer, dict):
            raise self._garbage(path, "a JSON object")
        return answer

    def _once_more(self, send: Callable[[], _T]) -> _T:
        """Sends, and sends again where the connection broke: a server may close one that it has kept open at the very
        moment of the next request, and nothing that is asked here changes a server."""
        try:
            return send()
        except _BROKEN as broken:
            try:
                return send()
            except httpx2.TransportError:
                raise self._lost(broken) from broken
        except httpx2.TransportError as error:
            raise self._lost(error) from error

    def _refuse(self, response: httpx2.Response, path: str) -> None:
        """Raises for an answer of status 400 or more."""
        said = _message(_json_of(response)) or response.text.strip()[:200]
        if response.status_code in (401, 403):
            state = "and refuses the one" if self._sent_key else "and none is"
            raise CannotBeDone(
                f"{self.url}: the server asks for an API key {state} in ${self.key_variable} ({response.status_code})",
                hint=f"export {self.key_variable}=..., or name another variable with --api-key-env",
            )
        if response.status_code == 400 and "logprobs" in said and "greater than" in said:
            numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in said).split()]
            raise NeedsFewer(min(numbers) if numbers else None)
        if response.status_code == 503:
            raise CannotBeDone(f"{self.url}: the server is not ready (503: {said})", hint="wait until it has loaded")
        raise CannotBeDone(f"{self.url}{path}: the server answers {response.status_code}: {said or 'nothing more'}")

    def _lost(self, error: Exception) -> CannotBeDone:
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return CannotBeDone(
                f"{self.url}: no server answers here ({error})", hint="start it first: reapc serve OUT, or OUT/serve.sh"
            )
        if isinstance(error, httpx2.TimeoutException):
            return CannotBeDone(f"{self.url}: the server did not answer in time")
        return CannotBeDone(f"{self.url}: the connection broke ({str(error) or type(error).__name__})")

    def _garbage(self, path: str, expected: str) -> CannotBeDone:
        return CannotBeDone(f"{self.url}{path}: the answer is not what was expected: {expected}")


def _is_loopback(url: str) -> bool:
    host = httpx2.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


def _number(value: Any) -> float:
    """A log-probability; llama-server and vLLM write null for minus infinity in places."""
    return float("-inf") if value is None else float(value)


def _json_of(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _message(answer: Any) -> str:
    """The text of an error answer of either engine, one line."""
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or ""
    return " ".join(str(found or "").split())[:400]
