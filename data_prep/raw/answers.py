"""Answers in JSON from a chat endpoint: asked for, checked, and once asked for again.

`saber_jax.endpoint` outlasts what passes (429, 5xx, timeouts, broken connections); here is what
does not: refusals, half answers, wrong keys. All end as an `Unanswered` with a reason.
"""

import concurrent.futures
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_prep.raw import storage, wording
from data_prep.raw.shards import Dropped, Outcome, Row, Stage, run
from saber_jax import endpoint
from saber_jax.endpoint import Endpoint, EndpointError, Message

T = TypeVar("T")

Clients = Mapping[str, Endpoint]
"""The endpoints of a stage, by what they are for."""

REASONS = {
    **{reason: text for reason, text in endpoint.REASONS.items() if reason not in endpoint.FATAL},
    "refused": "the model declined, or its answer was filtered",
    "cut_off": "the answer was longer than `max_tokens`, twice",
    "not_json": "the answer holds no JSON object, twice",
    "bad_answer": "the JSON does not follow the layout, twice",
    "unreadable": "the clip cannot be decoded for the request",
}


class Unanswered(Exception):
    """No usable answer; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Where to ask, how often, and for how much. The key comes from SABER_API_KEY alone.

    `most_tokens` and `most_cost` bound one run of the stage, `prices` are per million prompt and
    completion tokens, in the currency of `most_cost`. With `json_mode`, the endpoint is asked to
    produce JSON by itself, which vLLM and most others can.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0  # Seconds.
    requests_per_minute: float | None = None
    most_tokens: int | None = None
    most_cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    max_tokens: int = 1500
    temperature: float = 0.2
    json_mode: bool = True

    def __post_init__(self):
        if self.most_cost is not None and not any(self.prices):
            raise ValueError("most_cost needs prices: [per million prompt tokens, ... completion].")

    def require(self, name: str) -> None:
        """Raises ValueError without an address or model."""
        if not self.url or not self.model:
            raise ValueError(
                f"{name} needs url and model, got {self.url!r} and {self.model!r}. Example: "
                'url = "http://localhost:8000/v1", model = "Qwen/Qwen2.5-Omni-7B".'
            )

    def open(self, cache: str) -> Endpoint:
        """A client that keeps its answers in the local folder `cache`."""
        return Endpoint(
            url=self.url,
            model=self.model,
            cache=cache,
            concurrency=self.concurrency,
            retries=self.retries,
            timeout=self.timeout,
            requests_per_minute=self.requests_per_minute,
            most_tokens=self.most_tokens,
            most_cost=self.most_cost,
            prices=self.prices,
        )

    def of_request(self) -> dict[str, Any]:
        """What goes into every request."""
        mode = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **mode}

    def of_result(self) -> dict[str, Any]:
        """What decides an answer, for manifests; speed and limits may change within a stage."""
        return {"model": self.model, **self.of_request()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """A checked answer. `tokens` counts prompt and completion, of the repair too."""

    value: T
    model: str
    tokens: int
    repaired: bool


def ask_json(
    client: Endpoint,
    messages: Sequence[Message],
    check: Callable[[Any], T],
    *,
    language: str,
    settings: Mapping[str, Any],
) -> Answer[T]:
    """Asks, and asks once more saying what was wrong.

    `check` turns the JSON value into the result, or raises ValueError saying what is wrong with it.
    Raises Unanswered; EndpointError if asking anything else would fail too.
    """
    asked, spent, model = list(messages), 0, client.model
    for attempt in (0, 1):
        try:
            reply = client.ask(asked, **settings)
        except EndpointError as error:
            if error.fatal:
                raise
            raise Unanswered(error.reason, error.detail) from None
        spent += reply.prompt_tokens + reply.completion_tokens
        model = reply.model
        if reply.finish_reason == "content_filter" or not reply.text.strip():
            raise Unanswered("refused", f"finish_reason {reply.finish_reason}")
        try:
            value = check(extract_json(reply.text))
            return Answer(value=value, model=model, tokens=spent, repaired=attempt > 0)
        except ValueError as error:
            reason = error.reason if isinstance(error, NoJsonError) else "bad_answer"
            reason = "cut_off" if reply.finish_reason == "length" else reason
            problem = str(error)
        repair = wording.REPAIR[language].format(problem=problem)
        asked += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": repair},
        ]
    raise Unanswered(reason, f"{problem} In: {reply.text[:200]!r}")


class NoJsonError(ValueError):
    """Nothing in the text can be read as a JSON object."""

    reason = "not_json"


def extract_json(text: str) -> dict[str, Any]:
    """The JSON object in an answer, whatever stands around it. Raises NoJsonError."""
    for match in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        return value
    raise NoJsonError("there is no complete JSON object in it.")


def each_row(
    rows: list[Row],
    answer: Callable[[Row], Outcome],
    pool: concurrent.futures.Executor,
) -> Iterator[Outcome]:
    """The outcomes of `answer`, in order; a row that stays unanswered is dropped with its reason.

    A fatal EndpointError ends it at once: what was not begun yet is not asked.
    """
    stopped = threading.Event()

    def outcome(row: Row) -> Outcome:
        if stopped.is_set():
            raise concurrent.futures.CancelledError
        try:
            return answer(row)
        except Unanswered as error:
            return Dropped(row=row, reason=error.reason, detail=str(error))
        except EndpointError:
            stopped.set()
            raise

    futures = [pool.submit(outcome, row) for row in rows]
    done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, concurrent.futures.CancelledError)):
        concurrent.futures.wait(futures)
        raise error
    yield from (future.result() for future in futures)


def run_with(
    stage: Stage,
    source: Stage,
    work: Callable[[list[Row], Clients, concurrent.futures.Executor], Iterator[Outcome]],
    endpoints: Mapping[str, EndpointSettings],
) -> dict[str, Any]:
    """Runs a stage whose work asks endpoints; adds what they used to STAGE/usage.jsonl.

    One process asks, so that limits are exact; two shards at a time, so that the last clips of one
    do not leave the endpoint idle.
    """
    # Beside the shards, or here when those are in a bucket.
    cache = Path(stage.out if storage.is_local(stage.out) else ".") / "answers" / stage.name
    clients = {name: settings.open(str(cache)) for name, settings in endpoints.items()}
    threads = sum(settings.concurrency for settings in endpoints.values())
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            return run(stage, source, lambda rows: work(rows, clients, pool), at_once=2)
        finally:
            for name, client in clients.items():
                _add_usage(stage, name, client)


def _add_usage(stage: Stage, name: str, client: Endpoint) -> None:
    used = client.usage
    if not (used.asked or used.failed or used.cached):
        return
    path = stage.file("usage.jsonl")
    before = storage.read_lines(path) if storage.exists(path) else []
    now = {"endpoint": name, "model": client.model, **dataclasses.asdict(used)}
    storage.write_lines(path, [*before, now | {"cost": round(client.cost, 6)}])
    print(
        f"{stage.name}, {client.model}: {used.asked} questions answered, {used.cached} known "
        f"before, {used.failed} failed, {used.retries} asked again, {used.tokens} tokens, cost "
        f"{client.cost:.4f}"
    )
