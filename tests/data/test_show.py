"""A record drawn for a person."""

import base64
import io
import re
import subprocess
import sys
import wave

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.records import dataset
from saber_jax.data import records, show
from saber_jax.data.examples import encode_record
from tests import synthetic


def test_the_command_draws_fields_frames_sound_and_tokens(tmp_path, tokenizer, capsys):
    dataset.write(tmp_path, {"train": [synthetic.record(3)]}, lambda record: record)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    out = tmp_path / "drawn"
    assert show.main([str(tmp_path), "--clip", "clip3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "[0]; see" in text and "sarcasm" in text and "sentiment_analysis" in text
    page = (out / "record.html").read_text()
    assert "frames.png" in page and "waveform.png" in page and 'class="video ' in page
    with Image.open(out / "frames.png") as sheet:
        assert sheet.size == (4 * 164, 164)
    with Image.open(out / "waveform.png") as plot:
        assert len(np.unique(np.asarray(plot))) > 2
    assert show.main([str(tmp_path), "--clip", "nobody", "--out", str(out)]) == 1
    assert "nobody" in capsys.readouterr().err


def test_the_page_plays_the_record_and_needs_no_other_file(tmp_path, tokenizer):
    record = synthetic.record(3)
    show.write(record, tokenizer, tmp_path)
    page = (tmp_path / "record.html").read_text("utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:") for source in sources)
    assert "prefers-color-scheme: dark" in page and "http" not in page
    film = base64.b64decode(sources[0].removeprefix("data:video/mp4;base64,"))
    with av.open(io.BytesIO(film)) as container:
        assert len(container.streams.audio) == 1
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    with av.open(io.BytesIO(film)) as container:
        heard = [f.to_ndarray() for f in container.decode(audio=0)]
    assert np.abs(np.stack(shown).mean((1, 2, 3)) - record.frames.mean((1, 2, 3))).max() < 4
    samples = np.concatenate(heard, axis=1)[0]
    assert len(samples) == pytest.approx(len(record.audio), abs=1024)


def test_a_record_of_sound_alone_is_heard(tmp_path, tokenizer):
    record = synthetic.record(5, frames=0)
    show.write(record, tokenizer, tmp_path)
    (heard,) = re.findall(r"data:audio/wav;base64,([^\"]*)", (tmp_path / "record.html").read_text())
    with wave.open(io.BytesIO(base64.b64decode(heard))) as file:
        assert file.readframes(file.getnframes()) == record.audio.tobytes()


def test_the_layout_weighs_exactly_the_answer(tokenizer):
    record = synthetic.record(4)
    runs = show.layout(record, tokenizer)
    example = encode_record(record, tokenizer)
    learnt = [run for run in runs if run["loss"] == "1"]
    ids = [int(run["id"]) for run in learnt]
    assert ids == example.responses[0].tokens.tolist()
    assert [run["kind"] for run in runs if run["kind"] != "text"] == ["video", "audio"]
    assert {run["section"] for run in learnt} == set(records.FIELDS)
    assert sum(int(r["token"].split()[0]) for r in runs if r["kind"] == "video") == 18


def test_a_record_without_media_is_drawn_without_pictures(tokenizer, tmp_path):
    show.write(synthetic.record(5, frames=0, seconds=0.0), tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.html", "record.txt"]


def test_the_older_name_of_the_command_still_works(tmp_path):
    command = [sys.executable, "-m", "saber_jax.data.records", "--show", str(tmp_path / "none")]
    done = subprocess.run([*command, "--clip", "a"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "saber_jax.data.show: No records in" in done.stderr
