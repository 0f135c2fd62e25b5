"""Any OpenAI-compatible chat endpoint (vLLM, SGLang, Gemini, OpenAI ...): judges and annotators.

    endpoint = Endpoint(url="http://localhost:8000/v1", model="Qwen/Qwen2.5-72B-Instruct")
    reply = endpoint.ask([{"role": "user", "content": "1 + 1?"}], temperature=0)

The API key is only read from the environment variable SABER_API_KEY (it may be unset for a server
without one) and is never written to messages, files or the cache. Replies are cached by the content
of the request, so an interrupted run repeats no request.
"""

import collections
import concurrent.futures
import dataclasses
import email.utils
import hashlib
import itertools
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from saber_jax.runs.files import read_json, write_json

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "SABER_API_KEY"

REASONS = {
    "rate_limited": "the endpoint kept saying that it is asked too often",
    "timeout": "no answer came in time",
    "disconnected": "the connection broke before the answer was complete",
    "server_error": "the endpoint kept failing",
    "malformed": "what came back is not a chat completion",
    "rejected": "the endpoint does not accept this request",
    "unreachable": "there is no endpoint at this address",
    "unauthorised": "the endpoint does not accept the key, or the key may not use the model",
    "not_found": "the endpoint knows no such address or model",
    "budget_spent": "the tokens or the money allowed for this run are spent",
}
PASSING = (408, 409, 429)
"""HTTP statuses below 500 after which a request is retried."""
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.5, 8.0, 120.0
"""Seconds: pause before the first retry, longest pause, and longest Retry-After."""

# Other requests would fail too, so a run stops instead of failing item by item.
FATAL = ("unreachable", "unauthorised", "not_found", "budget_spent")

Message = Mapping[str, Any]


class EndpointError(RuntimeError):
    """A request without an answer. `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{REASONS[reason]}: {detail}")
        self.reason = reason
        self.detail = detail

    @property
    def fatal(self) -> bool:
        return self.reason in FATAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """Chat messages and the settings that go with them (temperature, max_tokens, ...).

    `draw` tells repetitions of one question apart: each has a cache entry of its own.
    """

    messages: Sequence[Message]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draw: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """`finish_reason` is the endpoint's: "stop", "length" (cut off), "content_filter" ..."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False


@dataclasses.dataclass
class Usage:
    """Usage of a run so far. Cached replies cost no tokens."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Endpoint:
    """One model behind one address. All methods may be called from several threads."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        cache: str | Path | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        requests_per_minute: float | None = None,
        most_tokens: int | None = None,
        most_cost: float | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
        stopped: threading.Event | None = None,
    ):
        """At most `concurrency` questions are under way at a time, however many threads ask.
        `timeout` is in seconds per attempt; a retry waits twice as long as the one before it, up
        to 8 s, or what the endpoint's Retry-After says, up to two minutes. `requests_per_minute`
        counts retries too. With `most_tokens` or `most_cost`, no question is begun once that much
        was used; `prices` are per million prompt and completion tokens. Once `stopped` is set, no
        request is begun, retries included.
        """
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                "concurrency must be at least 1, retries at least 0 and timeout positive, got "
                f"{concurrency}, {retries} and {timeout}."
            )
        self.url, self.model = url, model
        self.usage = Usage()
        self.stopped = stopped or threading.Event()
        self._concurrency, self._retries, self._most_tokens = concurrency, retries, most_tokens
        self._most_cost, self._prices = most_cost, prices
        self._cache = Path(cache) if cache else None
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(concurrency)
        self._pause = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0
        self._key = os.environ.get(KEY_VARIABLE, "")
        import openai  # Takes a second, for which no command's --help shall wait.

        def begin(request: httpx2.Request) -> None:
            request.extensions["end"] = time.monotonic() + timeout

        def bound(response: httpx2.Response) -> None:
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _BoundStream(response.stream, response.request)

        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [begin], "response": [bound]}
            ),
        )

    @property
    def cost(self) -> float:
        """The cost of the tokens so far, in the currency of `prices`."""
        used = (self.usage.prompt_tokens, self.usage.completion_tokens)
        return sum(tokens * price for tokens, price in zip(used, self._prices, strict=True)) / 1e6

    def ask(self, messages: Sequence[Message], *, draw: int = 0, **settings: Any) -> Reply:
        """One answer. Raises EndpointError, or CancelledError when the endpoint is stopped."""
        request = ChatRequest(messages=messages, settings=settings, draw=draw)
        if (known := self._cached(request)) is not None:
            self._count(cached=1)
            return known
        try:
            with self._slots:
                reply = self._complete(request)
        except EndpointError:
            self._count(failed=1)
            raise
        if self._cache:
            path = self._cache_path(request)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, dataclasses.asdict(reply))
        return reply

    def ask_all(self, requests: Iterable[ChatRequest]) -> Iterator[Reply | EndpointError]:
        """The outcome of each request, in order, `concurrency` of them in work at a time.

        `requests` is read as answers are taken, so it may be long and make its media late. Raises
        EndpointError when it is a fatal one.
        """

        def outcome(request: ChatRequest) -> Reply | EndpointError:
            try:
                return self.ask(request.messages, draw=request.draw, **request.settings)
            except EndpointError as error:
                return error

        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        waiting = iter(requests)
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            try:
                # Twice as many as threads: a slow first one does not leave the others idle.
                for request in itertools.islice(waiting, 2 * self._concurrency):
                    pending.append(pool.submit(outcome, request))
                while pending:
                    result = pending.popleft().result()
                    if isinstance(result, EndpointError) and result.fatal:
                        raise result
                    yield result
                    for request in itertools.islice(waiting, 1):
                        pending.append(pool.submit(outcome, request))
            finally:
                for future in pending:
                    future.cancel()

    def _complete(self, request: ChatRequest) -> Reply:
        for attempt in itertools.count():
            try:
                self._wait_for_turn()
                return self._attempt(request)
            except _Failed as failed:
                pause = failed.retry_after
                if pause is None:
                    pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.0)
                if not failed.passing or attempt >= self._retries or pause > LONGEST_RETRY_AFTER:
                    # No chain: the library's own errors may quote the key.
                    raise EndpointError(failed.reason, self._without_key(failed.detail)) from None
            self._count(retries=1)
            self.stopped.wait(pause)
        raise AssertionError("unreachable")

    def _attempt(self, request: ChatRequest) -> Reply:
        """One request. Raises _Failed."""
        import openai

        messages: Any = list(request.messages)
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **request.settings
            )
            reply = _reply(raw.text, self.model)
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise _failure(error) from None
        tokens = {"prompt_tokens": reply.prompt_tokens}
        self._count(asked=1, completion_tokens=reply.completion_tokens, **tokens)
        return reply

    def _wait_for_turn(self) -> None:
        with self._lock:
            if self._most_tokens is not None and self.usage.tokens >= self._most_tokens:
                detail = f"{self.usage.tokens} used, {self._most_tokens} allowed"
                raise EndpointError("budget_spent", detail)
            if self._most_cost is not None and self.cost >= self._most_cost:
                detail = f"{self.cost:.4f} spent, {self._most_cost:g} allowed"
                raise EndpointError("budget_spent", detail)
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._pause
        if self.stopped.wait(max(0.0, start - time.monotonic())):
            raise concurrent.futures.CancelledError

    def _cached(self, request: ChatRequest) -> Reply | None:
        if not self._cache or not (path := self._cache_path(request)).exists():
            return None
        return Reply(**read_json(path) | {"cached": True})

    def _cache_path(self, request: ChatRequest) -> Path:
        assert self._cache
        content = {
            "model": self.model,
            "messages": list(request.messages),
            "settings": dict(request.settings),
            "draw": request.draw,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.json"

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


class _BoundStream(httpx2.SyncByteStream):
    """The body of a response, which has to arrive before the end of the attempt.

    The library's own timeout is for each read, so a server that sends a byte now and then would
    hold its slot for ever.
    """

    def __init__(self, stream: httpx2.SyncByteStream, request: httpx2.Request):
        self._stream, self._request = stream, request

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            if time.monotonic() > self._request.extensions["end"]:
                raise httpx2.ReadTimeout("the body takes too long", request=self._request)
            yield part

    def close(self) -> None:
        self._stream.close()


@dataclasses.dataclass
class _Failed(Exception):
    """An attempt without an answer. `passing` failures may be over at the next one, after
    `retry_after` seconds where the endpoint names them."""

    reason: str
    detail: str
    passing: bool = True
    retry_after: float | None = None


def _reply(body: str, model: str) -> Reply:
    """What a chat completion says; `model` where it does not. Raises _Failed."""
    try:
        completion = json.loads(body)
        choice, used = completion["choices"][0], completion.get("usage") or {}
        return Reply(
            text=choice["message"].get("content") or "",
            finish_reason=choice.get("finish_reason") or "unknown",
            model=completion.get("model") or model,
            prompt_tokens=int(used.get("prompt_tokens") or 0),
            completion_tokens=int(used.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Failed("malformed", f"{error}, in {body[:200]!r}") from None


def _failure(error: "openai.OpenAIError | httpx2.HTTPError") -> _Failed:
    """What an error of the client library means."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return _Failed("timeout", "the last attempt timed out")
    if isinstance(error, openai.APIConnectionError):
        refused = isinstance(error.__cause__, httpx2.ConnectError)
        said = f"{error.request.url}, {error.__cause__ or error}"
        return _Failed("unreachable" if refused else "disconnected", said)
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        named = {401: "unauthorised", 403: "unauthorised", 404: "not_found", 429: "rate_limited"}
        return _Failed(
            named.get(status, "server_error" if status >= 500 else "rejected"),
            f"HTTP {status}, {error.message[:300]}",
            passing=status in PASSING or status >= 500,
            retry_after=_retry_after(error.response.headers),
        )
    return _Failed("disconnected", str(error))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that Retry-After-Ms names, or Retry-After, which may also be a date."""
    after = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if re.fullmatch(r"[\d.]+", after.strip()):
            return float(after)
        date = email.utils.parsedate_to_datetime(after)
        return max(0.0, date.timestamp() - time.time())
    except ValueError:  # Neither is there.
        return None
