"""The pictures that the filters' contact sheets show."""

import numpy as np
import pytest

pytest.importorskip("cv2", reason="requirements-prep.txt is not installed")

from data_prep.raw import filters
from tests.media_files import write_late_recording


@pytest.mark.parametrize("suffix", [".mkv", ".asf", ".ts", ".mp4"])
def test_a_sheet_shows_the_middle_of_a_video_whose_time_begins_late(tmp_path, suffix):
    path = write_late_recording(tmp_path / f"late{suffix}")
    sheet = np.asarray(filters.sheet([({"clip_id": "", "file": str(path)}, "")]))
    assert (sheet[: filters.TILE] > 250).all()  # At its beginning it is black.
