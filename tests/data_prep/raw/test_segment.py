"""Cutting long videos, as the stage `segment` does in its folder."""

import functools
from pathlib import Path

import pytest

pytest.importorskip("faster_whisper", reason="requirements-prep.txt is not installed")

from data_prep.raw import run, segment, storage
from data_prep.raw.ingest import Source
from data_prep.raw.segment import SegmentSettings
from data_prep.raw.settings import Settings
from tests.media_files import gray_frames, tone, write_clip


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
