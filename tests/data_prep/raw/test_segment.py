"""Cutting long videos, as the stage `segment` does in its folder."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faster_whisper", reason="requirements-prep.txt is not installed")

from data_prep.raw import measure, run, segment, storage
from data_prep.raw.ingest import Source
from data_prep.raw.segment import SegmentSettings
from data_prep.raw.settings import Settings
from tests.media_files import RATE, gray_frames, tone, write_clip, write_late_recording


def test_other_settings_cut_other_clips_once_the_folder_of_the_stage_is_deleted(
    tmp_path, monkeypatch
):
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos/film.mkv", frames=gray_frames(48), audio=tone(4))
    sources = (Source(folder=str(tmp_path / "videos")),)
    settings = functools.partial(Settings, out=str(tmp_path / "out"), sources=sources, processes=1)
    run.run_stage(settings(), "ingest")
    for longest, span in ((2.0, (0.0, 1.0)), (3.0, (1.0, 3.0))):
        monkeypatch.setattr(segment, "plan", lambda *_, span=span: [span])
        wanted = settings(segment=SegmentSettings(longest=longest))
        storage.delete(str(tmp_path / "out/segment"))
        run.run_stage(wanted, "segment")
        [row] = run.stage_of(wanted, "segment").rows()
        assert (row["start"], row["end"]) == span
        seconds = segment.length(Path(row["file"]))
        assert seconds == pytest.approx(span[1] - span[0], abs=0.1)


def test_scenes_change_where_they_do_in_a_recording_whose_time_begins_late(tmp_path):
    path = write_late_recording(tmp_path / "late.ts")
    _, changes = segment.boundaries(path, SegmentSettings())
    assert changes == [pytest.approx(1.0, abs=0.05)]
    segment.write_clip(path, path, tmp_path / "cut.mp4", (changes[0], 4.0))
    assert segment.length(tmp_path / "cut.mp4") == pytest.approx(3.0, abs=0.1)


SILENCE = np.zeros(2 * RATE, np.int16)


@pytest.mark.parametrize(
    ("audio", "stamps", "expected"),
    [
        (tone(1), {"audio_start": 2.0}, 2.0),
        (np.concatenate([SILENCE, tone(1)]), {"hole": (1.5, 1.0)}, 3.0),
    ],
    ids=["late", "with a pause"],
)
def test_speech_is_where_the_timestamps_of_the_sound_say(
    tmp_path, monkeypatch, audio, stamps, expected
):
    path = write_clip(tmp_path / "a.mkv", frames=gray_frames(48), audio=audio, **stamps)
    heard = []
    monkeypatch.setattr(measure, "speech", lambda sound: heard.append(sound) or [])
    segment.boundaries(path, SegmentSettings())
    assert np.flatnonzero(np.abs(heard[0]) > 0.1)[0] / RATE == pytest.approx(expected, abs=0.07)


@pytest.mark.parametrize("suffix", [".mkv", ".asf", ".ts", ".mp4"])
def test_a_video_is_not_longer_for_a_time_that_begins_late(tmp_path, suffix):
    path = write_late_recording(tmp_path / f"late{suffix}")
    assert segment.length(path) == pytest.approx(4.0, abs=0.2)
