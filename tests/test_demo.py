"""The demo in a real browser, with a real clip and a model that tells what it was given."""

import concurrent.futures
import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from saber_jax import demo
from saber_jax.data import decode, sed
from saber_jax.data.records import FIELDS
from saber_jax.data.withhold import GREY
from tests import chromium, media_files

pytest.importorskip("gradio", reason="gradio is not installed (requirements-demo.txt)")
browser = chromium.browser


class _Model:
    """A model that concludes contempt from sound and picture, and else what is left suggests."""

    def __init__(self):
        self.records = []
        self.told = ""
        self.finished = 0
        self.wait = None

    def respond(self, records, *, on_text):
        (record,) = records
        self.records.append(record)
        heard, seen = bool(record.audio.any()), bool((record.frames != GREY).any())
        emotion = {(True, True): "contempt", (True, False): "angry", (False, True): "happy"}
        texts = {field: f"{field} <b>markup</b>" for field in FIELDS}
        texts["sentiment_analysis"] = f"So {emotion.get((heard, seen), 'neutral')}."
        answer = sed.target_text(texts)
        for end in range(20, len(answer), 20):
            self.told = answer[:end]
            on_text(0, self.told)
            if self.wait:
                self.wait()
        self.finished += 1
        return [answer]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media_files.write_clip(
        tmp_path_factory.mktemp("clips") / "a b.mp4",
        frames=np.asarray(media_files.gray_frames(24)),
        audio=media_files.tone(2.0),
        codecs=("libx264", "aac"),
        pixels="yuv420p",
    )


@pytest.fixture(scope="module")
def model():
    return _Model()


@pytest.fixture(scope="module")
def address(model, clip):
    limits = demo.Limits(megabytes=1, clip_seconds=30.0)
    describer = demo.Describer(model, {"fps": 2.0}, limits)
    page = demo.build(describer, name="runs/some/cadpo", examples=[clip])
    with socket.socket() as probe:
        probe.bind((demo.LOOPBACK, 0))
        port = probe.getsockname()[1]
    yield demo.serve(page, port=port, limits=limits, block=False)
    page.close()


def _describe(describer, clip, **senses):
    return list(describer.describe(str(clip), "en", **({"sound": True, "picture": True} | senses)))


def test_answers_grow_and_end_whole(model, clip):
    texts = _describe(demo.Describer(model, None, demo.Limits()), clip)
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert sed.conclusion(texts[-1]) == "contempt"


def test_what_is_switched_off_is_gone_from_the_record(model, clip):
    describer = demo.Describer(model, None, demo.Limits())
    texts = _describe(describer, clip, sound=False, picture=False)
    assert sed.conclusion(texts[-1]) == "neutral"
    assert not model.records[-1].audio.any()
    assert (model.records[-1].frames == GREY).all()


def test_clips_beyond_the_limits_are_refused(model, clip):
    with pytest.raises(decode.MediaError, match="longer than allowed"):
        _describe(demo.Describer(model, None, demo.Limits(clip_seconds=1.0)), clip)
    with pytest.raises(decode.MediaError, match="allowed are 0 MB"):
        _describe(demo.Describer(model, None, demo.Limits(megabytes=0)), clip)


def test_an_answer_that_takes_too_long_is_given_up(clip):
    model, never = _Model(), threading.Event()
    model.wait = lambda: never.wait(5)
    describer = demo.Describer(model, None, demo.Limits(answer_seconds=0.5))
    with pytest.raises(TimeoutError, match=r"0\.5 s"):
        _describe(describer, clip)
    never.set()


def test_stopping_ends_the_answer_of_one_visitor_alone(model, clip):
    describer = demo.Describer(model, None, demo.Limits())
    anna, ben = (
        describer.describe(str(clip), "en", sound=True, picture=True, visitor=visitor)
        for visitor in ("anna", "ben")
    )
    steps = threading.Semaphore(0)
    model.wait = lambda: steps.acquire(timeout=30)
    try:
        next(anna)
        describer.stop("anna")
        describer.stop("nobody")
        model.wait = None
        steps.release(1000)
        with pytest.raises(demo.Stopped):
            list(anna)
        assert next(ben)
        describer.stop("anna")
        assert sed.conclusion(list(ben)[-1]) == "contempt"
    finally:
        model.wait = None
        steps.release(1000)


@pytest.fixture
def slow_decoder(monkeypatch):
    """Two events: the decoding of a clip has begun, and it may end."""

    def decoded(*args):
        begun.set()
        assert may_end.wait(30)
        return original(*args)

    original, begun, may_end = demo.record_of_clip, threading.Event(), threading.Event()
    monkeypatch.setattr(demo, "record_of_clip", decoded)
    yield begun, may_end
    may_end.set()


def test_stopping_while_a_clip_is_decoded_asks_the_model_nothing(model, clip, slow_decoder):
    begun, may_end = slow_decoder
    describer, asked = demo.Describer(model, None, demo.Limits()), len(model.records)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_describe, describer, clip, visitor="anna")
        assert begun.wait(30)
        describer.stop("anna")
        may_end.set()
        with pytest.raises(demo.Stopped):
            answer.result(30)
    assert len(model.records) == asked


def test_the_time_for_an_answer_covers_decoding(model, clip, slow_decoder):
    del slow_decoder  # It never ends by itself.
    with pytest.raises(TimeoutError, match=r"0\.2 s"):
        _describe(demo.Describer(model, None, demo.Limits(answer_seconds=0.2)), clip)


def test_an_answer_that_was_given_up_delays_the_next_and_those_given_up_later_never_begin(clip):
    model, may_end = _Model(), threading.Event()
    model.wait = lambda: may_end.wait(30)
    describer = demo.Describer(model, None, demo.Limits(answer_seconds=0.2))
    for _ in range(3):
        with pytest.raises(TimeoutError):
            _describe(describer, clip)
    may_end.set()
    describer._limits = demo.Limits()
    assert sed.conclusion(_describe(describer, clip)[-1]) == "contempt"
    assert len(model.records) <= 2 and model.finished == 1


def test_uploaded_clips_are_deleted_after_an_hour(model):
    assert demo.build(demo.Describer(model, None, demo.Limits())).delete_cache == (3600, 3600)


def _status(url, body=None, host=None):
    headers = {"Content-Type": "application/json"} | ({"Host": host} if host else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_to_this_machine_alone_and_shows_no_file_of_it(address, tmp_path):
    assert address.startswith("http://127.0.0.1:")
    assert _status(address) == 200
    (tmp_path / "secret.txt").write_text("secret")
    for path in (
        "/etc/passwd",
        str(tmp_path / "secret.txt"),
        "../../../../etc/passwd",
        "README.md",
    ):
        assert _status(f"{address}gradio_api/file={path}") in (403, 404)


def test_a_foreign_name_that_points_here_is_refused(address):
    port = address.rstrip("/").rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert _status(address, host=host) == 200
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}"):
        assert _status(address, host=host) == 400
        assert _status(f"{address}gradio_api/info", host=host) == 400


def test_examples_are_a_few_held_out_clips(tmp_path):
    for name in [*(f"test_{i}.mp4" for i in range(20)), "train_0.mp4", "notes.txt"]:
        (tmp_path / name).touch()
    names = [path.name for path in demo.example_clips(tmp_path)]
    assert 1 < len(names) <= demo.MOST_EXAMPLES and all(n.startswith("test") for n in names)
    assert demo.example_clips(tmp_path / "none") == []


@chromium.needed
def test_a_clip_is_dropped_described_and_asked_again_without_sound(browser, address, model, clip):
    with chromium.opened(browser, address) as page:
        assert "runs/some/cadpo" in page.inner_text("#checkpoint")
        page.set_input_files("#clip input[type=file]", str(clip))
        page.wait_for_selector("#clip video")
        page.click("#ask")
        page.wait_for_function(_conclusion_is("contempt"))
        assert page.locator("#sentiment_analysis textarea").input_value() == "So contempt."
        # What a model says is text and never markup.
        assert page.locator("#video_desc textarea").input_value() == "video_desc <b>markup</b>"
        page.locator("#sound input").uncheck()
        page.wait_for_function(_conclusion_is("happy"))
        said = page.locator("#history").inner_text()
        assert "sound and picture" in said and "picture alone" in said
    assert not model.records[-1].audio.any()


@chromium.needed
def test_sections_fill_one_after_the_other_and_stop_ends_it(browser, address, model, clip):
    """The model writes its next 20 characters only when the test allows it."""
    asks, steps = threading.Semaphore(0), threading.Semaphore(0)
    model.wait = lambda: (asks.release(), steps.acquire(timeout=30))
    finished, model.told = model.finished, ""
    try:
        with chromium.opened(browser, address) as page:
            page.set_input_files("#clip input[type=file]", str(clip))
            page.wait_for_selector("#clip video")
            page.click("#ask")
            for field in FIELDS[:3]:
                while asks.acquire(timeout=30) and f"{field} <b>" not in model.told:
                    steps.release()
                asks.release()
                page.wait_for_function(_shows(field, f"{field} <b>"))
                assert page.locator(f"#{FIELDS[-1]} textarea").input_value() == ""
            page.wait_for_function(_conclusion_is("…"))
            page.click("#stop")
            page.wait_for_function(_conclusion_is("stopped"))
            said = len(model.told)
            model.wait = None
            steps.release(1000)
            time.sleep(0.3)
            # It comes to the next token, and no further.
            assert len(model.told) <= said + 20 and model.finished == finished
            page.click("#ask")
            page.wait_for_function(_conclusion_is("contempt"))
            assert model.finished == finished + 1
    finally:
        model.wait = None
        steps.release(1000)


def _shows(field, text):
    return f"document.querySelector('#{field} textarea').value.startsWith({text!r})"


def _conclusion_is(word):
    box = "document.querySelector('#conclusion textarea, #conclusion input')"
    return f"{box} && {box}.value === '{word}'"


@chromium.needed
def test_a_file_that_is_no_clip_gives_a_message_and_the_page_goes_on(browser, address, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    with chromium.opened(browser, address) as page:
        page.set_input_files("#clip input[type=file]", str(tmp_path / "broken.mp4"))
        page.wait_for_selector("#clip video")
        page.click("#ask")
        page.wait_for_selector("text=cannot be decoded")


def _uploaded(address, content):
    """The server's path of a file that a page sends."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    form = head + content + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{address}gradio_api/upload", form, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)[0]


def test_a_file_beyond_the_limit_is_not_taken(address):
    with pytest.raises(urllib.error.HTTPError) as refused:
        _uploaded(address, bytes(2 << 20))
    assert refused.value.code == 413


def _answered(address, path, session):
    """Whether the page's own request about a file ends with an answer."""
    with urllib.request.urlopen(f"{address}config") as page:
        handlers = {d["api_name"]: d["id"] for d in json.load(page)["dependencies"]}
    video = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    data = [video, "en", True, True, None]
    job = {"data": data, "fn_index": handlers["ask"], "session_hash": session}
    assert _status(f"{address}gradio_api/queue/join", job) == 200
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}") as events:
        lines = [line for line in events.read().decode().splitlines() if line.startswith("data:")]
    (done,) = [
        e for e in map(json.loads, (x[5:] for x in lines)) if e["msg"] == "process_completed"
    ]
    return done["success"]


def test_a_clip_that_was_uploaded_is_answered_and_one_named_by_its_path_is_not(
    address, model, clip
):
    """Whoever leaves out the page and sends a path gets an error, even for a real clip."""
    asked = len(model.records)
    assert not _answered(address, clip, "path")
    assert len(model.records) == asked
    assert _answered(address, _uploaded(address, clip.read_bytes()), "upload")
    assert len(model.records) == asked + 1
