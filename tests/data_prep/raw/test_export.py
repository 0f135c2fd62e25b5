"""The export: which files stand in OUT/saber, and what they hold."""

from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import export
from data_prep.raw.shards import Row


def make_row(path: Path, **more) -> Row:
    base = {
        "clip_id": path.stem,
        "file": str(path),
        "corpus": "",
        "video": path.stem,
        "speaker": "",
        "language": "en",
        "split": "train",
        "labels": {},
        "annotation": {"video_desc": "A person speaks."},
        "provenance": [],
    }
    return base | more


def test_a_clip_that_is_a_symlink_is_exported_as_the_file_it_points_to(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/3f2a").write_bytes(b"film")
    link = tmp_path / "snapshot/a.mp4"
    link.parent.mkdir()
    link.symlink_to("../blobs/3f2a")  # As in the cache of HuggingFace and in git-annex.
    [kept] = export.work([make_row(link)], str(tmp_path / "saber"))
    assert kept["clip_id"] == "a"
    exported = tmp_path / "saber/clips/a.mp4"
    assert not exported.is_symlink() and exported.samefile(tmp_path / "blobs/3f2a")
