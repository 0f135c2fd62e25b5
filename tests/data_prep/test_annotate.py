"""A folder of clips, annotated by an endpoint on loopback."""

import json
import threading

import pytest

from data_prep import annotate
from saber_jax.endpoint import Endpoint
from tests import loopback, media_files

ANNOTATION = {
    "video_desc": "A panel of one colour.",
    "audio_desc": {"speech_content": "", "acoustic_feat": "A steady tone."},
    "facial_exp_desc": "No face can be seen.",
    "body_lang_desc": "none",
    "sentiment_analysis": "Picture and sound agree. Emotion: neutral",
}


@pytest.fixture
def folder(tmp_path):
    # Two lengths: the same bytes twice would be one question, answered from the cache.
    for name, frames in (("a/001", 12), ("b/001", 15)):
        path = tmp_path / "clips" / f"{name}.mp4"
        path.parent.mkdir(parents=True)
        sound = media_files.tone(frames / 12)
        media_files.write_clip(
            path,
            frames=media_files.gray_frames(frames),
            audio=sound,
            codecs=("mpeg4", "aac"),
            pixels="yuv420p",
        )
    return tmp_path


def run(folder, url):
    arguments = ["--clips", str(folder / "clips"), "--out", str(folder / "annotations")]
    return annotate.main([*arguments, "--url", url, "--model", "m"])


def test_every_clip_gets_the_annotation_that_a_build_looks_for(folder):
    with loopback.chat_server(lambda *_: loopback.Answer(text=json.dumps(ANNOTATION))) as server:
        assert run(folder, server.url) == 0
        assert len(server.requests) == 2
        # A file that is there, as one corrected by hand, is kept, and only what lacks is asked.
        (folder / "annotations/a/001.json").write_text("mine")
        (folder / "annotations/b/001.json").unlink()
        assert run(folder, server.url) == 0
    assert (folder / "annotations/a/001.json").read_text() == "mine"
    made = json.loads((folder / "annotations/b/001.json").read_text())
    assert made["audio_desc"]["acoustic_feat"] == "A steady tone."


def test_a_clip_without_a_usable_answer_is_named(folder, capsys):
    with loopback.chat_server(lambda *_: loopback.Answer(text="I would rather not.")) as server:
        assert run(folder, server.url) == 1
    said = capsys.readouterr()
    assert "0 of 2 clips annotated" in said.out
    assert "a/001: not_json" in said.err and "b/001: not_json" in said.err


def test_ctrl_c_finishes_the_requests_under_way_and_begins_no_other(folder, monkeypatch, capsys):
    def interrupted(*_, **__):
        both.wait(60)
        raise KeyboardInterrupt

    def kept(**settings):
        clients.append(Endpoint(**settings))
        return clients[0]

    def refuse(*_):
        both.wait(60)
        assert clients[0].stopped.wait(60)
        return loopback.Answer(text="I would rather not.")  # The model would be asked again.

    both, clients = threading.Barrier(3), []
    monkeypatch.setattr(annotate, "tqdm", interrupted)
    monkeypatch.setattr("data_prep.raw.answers.Endpoint", kept)
    with loopback.chat_server(refuse) as server:
        assert run(folder, server.url) == 130
    assert len(server.requests) == 2
    assert "the same command continues" in capsys.readouterr().err
