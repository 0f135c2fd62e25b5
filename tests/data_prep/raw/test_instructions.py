"""Conversations for other trainers, and where their media are found."""

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import instructions
from data_prep.raw.shards import Row, ShardedStage
from data_prep.records import importers
from saber_jax.data.records import RecordSource
from tests.media_files import gray_frames, tone, write_clip


def make_row(file: str) -> Row:
    text = "A person speaks."
    return {
        "clip_id": "a",
        "file": file,
        "language": "en",
        "split": "train",
        "annotation": {
            "audio_desc": {"speech_content": "one two", "acoustic_feat": text},
            "video_desc": text,
            "facial_exp_desc": text,
            "body_lang_desc": "",
            "sentiment_analysis": text,
        },
    }


def asked(row: Row) -> Row:
    outcome = instructions.plan([row], instructions.InstructionSettings())(row)
    assert isinstance(outcome, dict)
    return outcome


def test_conversations_of_relative_folders_are_imported_from_another_folder(
    tmp_path, monkeypatch, tokenizer
):
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos/a.mkv", frames=gray_frames(24), audio=tone(2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stage = ShardedStage(name="instructions", out="runs/data", shards=1, settings={}, reasons={})
    row = asked(make_row("videos/a.mkv"))
    stage.write(0, [row], [row])
    instructions.write(stage)
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = ["--input", str(tmp_path / "runs/data/instructions/conversations.jsonl")]
    flags += ["--out", "records", "--tokenizer", str(tokenizer.path)]
    assert importers.main(["--format", "ms-swift", *flags]) == 0
    [record] = RecordSource(tmp_path / "elsewhere/records", "train")
    assert len(record.frames) and len(record.audio)


def test_the_address_of_a_clip_in_a_bucket_stays_as_it_is():
    line = instructions.conversation(asked(make_row("gs://bucket/a.mp4")))
    assert line["videos"] == line["audios"] == ["gs://bucket/a.mp4"]
