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
from tests.media_files import RATE, copy_packets, gray_frames, tone, write_clip


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


def write_recording(path: Path) -> Path:
    """A recording of 4 s, black and after 2 s white, whose timestamps begin at 600 s."""
    frames = np.zeros((100, 84, 84, 3), np.uint8)
    frames[50:] = 255
    rate = {"fps": 25, "rate": 48_000, "codecs": ("mpeg2video", "aac"), "pixels": "yuv420p"}
    whole = write_clip(path.with_name(f"whole{path.suffix}"), frames=frames, audio=tone(4), **rate)
    return copy_packets(whole, path, shift=600.0)


def test_scenes_change_where_they_do_in_a_recording_whose_time_begins_late(tmp_path):
    path = write_recording(tmp_path / "late.ts")
    _, changes = segment.boundaries(path, SegmentSettings())
    assert changes == [pytest.approx(2.0, abs=0.05)]
    segment.write_clip(path, path, tmp_path / "cut.mp4", (changes[0], 4.0))
    assert segment.length(tmp_path / "cut.mp4") == pytest.approx(2.0, abs=0.1)


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
