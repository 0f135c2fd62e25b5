import concurrent.futures
import email.utils
import json
import threading
import time

import pytest

from saber_jax import endpoint
from saber_jax.endpoint import ChatRequest, Endpoint, EndpointError
from tests.loopback import Answer, chat_server

QUESTION = [{"role": "user", "content": "How sad is this, from 1 to 5?"}]
KEY = "sk-very-secret-0123456789"
NOW = ("Retry-After-Ms", "1")  # The client then waits a millisecond instead of seconds.


def _questions(count):
    return [ChatRequest(messages=[{"role": "user", "content": f"clip {i}"}]) for i in range(count)]


def _echo(request, number):
    return Answer(text="about " + request["messages"][0]["content"])


def test_the_request_carries_model_messages_and_settings_and_the_tokens_are_counted():
    with chat_server(lambda request, number: Answer(text="four")) as server:
        client = Endpoint(url=server.url, model="judge")
        reply = client.ask(QUESTION, temperature=0, max_tokens=7)
    assert server.requests == [
        {"model": "judge", "messages": QUESTION, "temperature": 0, "max_tokens": 7}
    ]
    assert (reply.text, reply.finish_reason, reply.cached) == ("four", "stop", False)
    assert (client.usage.asked, client.usage.prompt_tokens) == (1, len(QUESTION[0]["content"]) // 4)
    assert client.usage.completion_tokens == 1


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=429, body='{"error": {"message": "slow down"}}', headers=(NOW,)),
        Answer(status=500, body="oops", headers=(NOW,)),
        Answer(status=503, body="", headers=(NOW,)),
        Answer(body='{"choices": [{"message": {"cont'),
        Answer(body='{"answer": "four"}'),
        Answer(body="[]"),
    ],
    ids=["429", "500", "503", "half a JSON", "wrong keys", "a list"],
)
def test_trouble_that_passes_is_outlasted(trouble, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    with chat_server(lambda _, number: trouble if number < 2 else Answer(text="5")) as server:
        client = Endpoint(url=server.url, model="judge", retries=3)
        assert client.ask(QUESTION).text == "5"
    assert len(server.requests) == 3
    assert client.usage.retries == 2
    assert client.usage.failed == 0


def test_a_broken_connection_and_a_slow_answer_are_tried_again():
    script = [Answer(text="a long answer", cut=True), Answer(text="late", delay=2.0)]
    with chat_server(lambda _, number: [*script, Answer(text="5")][number]) as server:
        client = Endpoint(url=server.url, model="judge", timeout=0.5)
        assert client.ask(QUESTION).text == "5"
    assert client.usage.retries == 2


@pytest.mark.parametrize(
    ("trouble", "reason", "asked"),
    [
        (Answer(status=429, body="{}", headers=(NOW,)), "rate_limited", 2),
        (Answer(status=502, body="{}", headers=(NOW,)), "server_error", 2),
        (Answer(body="not JSON"), "malformed", 2),
        (Answer(text="much too late", delay=1.0), "timeout", 2),
        (Answer(text="byte by byte", drip=0.05), "timeout", 2),
        (Answer(status=502, body="x" * 100, drip=0.05), "timeout", 2),
        (Answer(text="never whole", cut=True), "disconnected", 2),
        # Asking again would not help these.
        (Answer(status=400, body='{"error": {"message": "too long"}}'), "rejected", 1),
        (Answer(status=401, body="{}"), "unauthorised", 1),
        (Answer(status=404, body="{}"), "not_found", 1),
    ],
)
def test_trouble_that_stays_has_a_name(trouble, reason, asked):
    with chat_server(lambda *_: trouble) as server:
        client = Endpoint(url=server.url, model="judge", retries=1, timeout=0.3)
        with pytest.raises(EndpointError) as caught:
            client.ask(QUESTION)
    assert caught.value.reason == reason
    assert len(server.requests) == asked
    assert client.usage.failed == 1


def test_nobody_listening_is_a_fatal_error_with_a_name():
    with chat_server(_echo) as server:
        gone = server.url
    client = Endpoint(url=gone, model="judge", retries=0)
    with pytest.raises(EndpointError) as caught:
        list(client.ask_all(_questions(3)))
    assert caught.value.reason == "unreachable"
    assert f"at this address: {gone}" in str(caught.value)


def test_outcomes_come_in_order_with_the_failures_among_them():
    def script(request, number):
        i = int(request["messages"][0]["content"].removeprefix("clip "))
        if i == 5:
            return Answer(status=400, body='{"error": {"message": "refused"}}')
        return Answer(text=str(i), delay=0.05 * (i % 4 == 0))

    with chat_server(script) as server:
        client = Endpoint(url=server.url, model="judge", concurrency=4)
        outcomes = list(client.ask_all(_questions(12)))
    said = [o.reason if isinstance(o, EndpointError) else o.text for o in outcomes]
    assert said == ["0", "1", "2", "3", "4", "rejected", *map(str, range(6, 12))]
    assert 1 < server.most_at_once <= 4


def test_no_more_questions_are_under_way_than_allowed_however_many_threads_ask():
    with chat_server(lambda *_: Answer(text="1", delay=0.05)) as server:
        client = Endpoint(url=server.url, model="judge", concurrency=2)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda question: client.ask(question.messages), _questions(6)))
    assert server.most_at_once == 2


def test_a_long_list_of_requests_is_read_as_answers_are_taken():
    made = []

    def requests():
        for request in _questions(1000):
            made.append(request)
            yield request

    with chat_server(_echo) as server:
        outcomes = Endpoint(url=server.url, model="judge", concurrency=2).ask_all(requests())
        for _ in range(3):
            next(outcomes)
        outcomes.close()
    assert len(made) <= 2 * 2 + 3


def test_a_cached_answer_is_not_asked_again_and_another_question_is(tmp_path):
    with chat_server(lambda _, number: Answer(text=str(number))) as server:
        first = Endpoint(url=server.url, model="judge", cache=tmp_path)
        assert first.ask(QUESTION, temperature=0).text == "0"
        again = Endpoint(url=server.url, model="judge", cache=tmp_path)
        reply = again.ask(QUESTION, temperature=0)
        assert (reply.text, reply.cached, again.usage.cached, again.usage.tokens) == (
            "0",
            True,
            1,
            0,
        )
        assert again.ask(QUESTION, temperature=1).text == "1"
        assert again.ask(QUESTION, temperature=0, draw=1).text == "2"
        assert Endpoint(url=server.url, model="b", cache=tmp_path).ask(QUESTION).text == "3"


def test_a_failure_is_not_cached(tmp_path):
    script = [Answer(status=400, body="{}"), Answer(text="fine")]
    with chat_server(lambda _, number: script[number]) as server:
        client = Endpoint(url=server.url, model="judge", cache=tmp_path)
        with pytest.raises(EndpointError):
            client.ask(QUESTION)
        assert client.ask(QUESTION).text == "fine"


def test_the_key_is_sent_and_shows_up_nowhere_else(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    caplog.set_level("DEBUG")
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    script = [Answer(text="fine"), Answer(status=401, body=body), Answer(body=f"no {KEY}")]
    with chat_server(lambda _, number: script[number]) as server:
        client = Endpoint(url=server.url, model="judge", cache=tmp_path, retries=0)
        client.ask(QUESTION)
        errors = []
        for draw in (1, 2):
            with pytest.raises(EndpointError) as caught:
                client.ask(QUESTION, draw=draw)
            errors.append(caught.value)
    assert server.keys == [f"Bearer {KEY}"] * 3
    assert [error.reason for error in errors] == ["unauthorised", "malformed"]
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    shown = "".join(map(str, [*errors, caplog.text, *capfd.readouterr(), written, vars(errors[0])]))
    assert "<key>" in shown
    assert KEY not in shown
    assert errors[0].__suppress_context__


def test_a_run_stops_when_its_tokens_are_spent():
    with chat_server(lambda *_: Answer(text="x" * 400)) as server:
        client = Endpoint(url=server.url, model="judge", concurrency=1, most_tokens=250)
        with pytest.raises(EndpointError) as caught:
            list(client.ask_all(_questions(10)))
    assert caught.value.reason == "budget_spent"
    assert len(server.requests) == 3


def test_questions_are_spread_over_the_minute():
    with chat_server(_echo) as server:
        client = Endpoint(url=server.url, model="judge", requests_per_minute=600)
        clock = time.monotonic()
        list(client.ask_all(_questions(4)))
        assert time.monotonic() - clock >= 0.3


def test_retries_are_requests_too_and_wait_for_their_minute():
    def script(_, number):
        arrived.append(time.monotonic())
        return Answer(status=429, body="{}", headers=(NOW,)) if number < 3 else Answer(text="5")

    arrived = []
    with chat_server(script) as server:
        client = Endpoint(url=server.url, model="judge", requests_per_minute=600, retries=3)
        assert client.ask(QUESTION).text == "5"
    # 0.1 s apart, though the endpoint asks for a millisecond; the first may have come late.
    assert arrived[-1] - arrived[0] >= 0.25
    assert client.usage.retries == 3


def test_a_pause_doubles_unless_the_endpoint_names_one():
    class NoWaiting(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    pauses = []
    later = email.utils.formatdate(time.time() + 30)
    script = [
        *[Answer(status=503, body="")] * 6,
        Answer(status=429, body="", headers=(("Retry-After", "7"),)),
        Answer(status=429, body="", headers=(("Retry-After", later),)),
        Answer(text="5"),
    ]
    with chat_server(lambda _, number: script[number]) as server:
        Endpoint(url=server.url, model="judge", retries=8, stopped=NoWaiting()).ask(QUESTION)
    waited = [pause for pause in pauses if pause]
    for pause, longest in zip(waited, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0], strict=False):
        assert 0.75 * longest <= pause <= longest
    assert waited[6] == 7.0
    assert waited[7] == pytest.approx(30, abs=2.0)


@pytest.mark.parametrize("waits_for", ["its turn", "its retry"])
def test_a_stopped_endpoint_begins_no_request_that_is_waiting(waits_for):
    def script(*_):
        if waits_for == "its retry":
            stopped.set()
            return Answer(status=503, body="", headers=(("Retry-After", "100"),))
        return Answer(text="5")

    stopped = threading.Event()
    with chat_server(script) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        client = Endpoint(url=server.url, model="judge", requests_per_minute=0.1, stopped=stopped)
        if waits_for == "its turn":
            client.ask(QUESTION)
        waiting = pool.submit(client.ask, QUESTION)
        if waits_for == "its turn":
            stopped.set()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result()
    assert len(server.requests) == 1
    assert client.usage.failed == 0


def test_an_endpoint_that_asks_for_a_long_wait_is_not_waited_for():
    busy = Answer(status=429, body="{}", headers=(("Retry-After", "3600"),))
    with chat_server(lambda *_: busy) as server, pytest.raises(EndpointError, match="too often"):
        Endpoint(url=server.url, model="judge").ask(QUESTION)
    assert len(server.requests) == 1


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="concurrency"):
        Endpoint(url="http://127.0.0.1:1/v1", model="judge", concurrency=0)
