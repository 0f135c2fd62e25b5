"""JSON answers from a chat endpoint: requests, checks, and one correction.

`saber_jax.endpoint` retries temporary errors (429, 5xx, timeouts, broken connections). This module
handles the others: refusals, truncated answers, wrong keys. All of them raise `Unanswered` with a
reason.
"""

import concurrent.futures
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from data_prep.raw import storage, wording
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage, run
from saber_jax import endpoint
from saber_jax.endpoint import Endpoint, EndpointError, Message

T = TypeVar("T")
P = ParamSpec("P")

Clients = Mapping[str, Endpoint]
"""The endpoints of a stage, by purpose."""

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
    """Address, model and limits of an endpoint. The API key is read from SABER_API_KEY only.

    `most_tokens` and `most_cost` limit one run of the stage. `prices` are per million prompt and
    completion tokens, in the currency of `most_cost`. `json_mode` uses the endpoint's own JSON
    mode, which vLLM and most others have.
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

    def open(self, cache: str, stopped: threading.Event | None = None) -> Endpoint:
        """A client that caches answers in the local folder `cache` and ends with `stopped`."""
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
            stopped=stopped,
        )

    def of_request(self) -> dict[str, Any]:
        """The settings that are sent with every request."""
        mode = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **mode}

    def of_result(self) -> dict[str, Any]:
        """The settings that affect answers, for manifests; speed and limits may change any time."""
        return {"model": self.model, **self.of_request()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """A checked answer. `tokens` counts prompts and completions, including the correction."""

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
    """Sends a request and, if the answer is wrong, sends it back once with the error.

    `check` turns the JSON value into the result, or raises ValueError saying what is wrong with it.
    Raises Unanswered, or EndpointError if further requests would fail too.
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
    """The JSON object in an answer, which may have other text around it. Raises NoJsonError."""
    for match in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        return value
    raise NoJsonError("there is no complete JSON object in it.")


class RequestThreads(concurrent.futures.ThreadPoolExecutor):
    """The threads of one run that make requests.

    The first error of any call sets `stopped`, and so does the run when it ends early. Calls that
    have not begun then raise CancelledError.
    """

    def __init__(self, count: int):
        super().__init__(count)
        self.stopped = threading.Event()

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        def call() -> T:
            if self.stopped.is_set():
                raise concurrent.futures.CancelledError
            try:
                return fn(*args, **kwargs)
            except BaseException:
                self.stopped.set()
                raise

        return super().submit(call)


def each_row(
    rows: list[Row],
    answer: Callable[[Row], Outcome],
    pool: concurrent.futures.Executor,
) -> Iterator[Outcome]:
    """The outcomes of `answer`, in order; a row without an answer is dropped with the reason.

    Any other error ends the iteration, and with RequestThreads those of the whole run.
    """

    def outcome(row: Row) -> Outcome:
        try:
            return answer(row)
        except Unanswered as error:
            return Dropped(row=row, reason=error.reason, detail=str(error))

    futures = [pool.submit(outcome, row) for row in rows]
    concurrent.futures.wait(futures)
    # Rows that were cancelled tell nothing; the error that cancelled them is raised if it is here.
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, concurrent.futures.CancelledError)):
        raise error
    yield from (future.result() for future in futures)


def run_with(
    stage: ShardedStage,
    source: ShardedStage,
    work: Callable[[list[Row], Clients, concurrent.futures.Executor], Iterator[Outcome]],
    endpoints: Mapping[str, EndpointSettings],
) -> dict[str, Any]:
    """Runs a stage that uses endpoints; appends their usage to STAGE/usage.jsonl.

    One process sends all requests, so that limits are exact. It works on two shards at a time, so
    that the last clips of a shard do not leave the endpoint idle. If the run ends early, the
    requests under way are finished and no others are begun.
    """
    # Next to the shards, or in the current folder if those are in a bucket.
    cache = Path(stage.out if storage.is_local(stage.out) else ".") / "answers" / stage.name
    threads = sum(settings.concurrency for settings in endpoints.values())
    with RequestThreads(max(1, threads)) as pool:
        clients = {
            name: settings.open(str(cache), pool.stopped) for name, settings in endpoints.items()
        }
        try:
            return run(
                stage,
                source,
                lambda rows: work(rows, clients, pool),
                at_once=2,
                stopped=pool.stopped,
            )
        finally:
            for name, client in clients.items():
                _add_usage(stage, name, client)


def _add_usage(stage: ShardedStage, name: str, client: Endpoint) -> None:
    used = client.usage
    if not (used.asked or used.failed or used.cached):
        return
    path = stage.file("usage.jsonl")
    before = storage.read_lines(path) if storage.exists(path) else []
    now = {"endpoint": name, "model": client.model, **dataclasses.asdict(used)}
    storage.write_lines(path, [*before, now | {"cost": round(client.cost, 6)}])
    print(
        f"{stage.name}, {client.model}: {used.asked} requests answered, {used.cached} from the "
        f"cache, {used.failed} failed, {used.retries} retried, {used.tokens} tokens, cost "
        f"{client.cost:.4f}"
    )
