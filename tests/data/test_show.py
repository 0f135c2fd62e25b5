"""A record drawn for a person."""

import subprocess
import sys

import numpy as np
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
