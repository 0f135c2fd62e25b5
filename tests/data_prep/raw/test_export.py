"""The export: which files stand in OUT/saber, and what they hold."""

import errno
import os
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import export
from data_prep.raw.shards import Dropped, Row


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


def test_a_lost_clip_is_dropped_and_a_full_disk_stops_the_export(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"film")
    rows = [make_row(tmp_path / "lost.mp4"), make_row(tmp_path / "a.mp4")]
    lost, kept = export.work(rows, str(tmp_path / "new"))
    assert isinstance(lost, Dropped) and lost.reason == "missing" and "lost.mp4" in lost.detail
    assert kept == rows[1]
    monkeypatch.setattr(export.os, "link", full_disk)
    monkeypatch.setattr(export.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*a\.mp4"):
        list(export.work(rows[1:], str(tmp_path / "full")))


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("linked", [True, False])
def test_a_clip_of_an_earlier_run_is_replaced_and_the_same_clip_is_not(
    tmp_path, monkeypatch, linked
):
    if not linked:
        monkeypatch.setattr(export.os, "link", full_disk)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(f"{name} film".encode())
    exported = tmp_path / "saber/clips/a.mp4"
    made = []
    for name in ("old", "new", "new"):
        list(export.work([make_row(tmp_path / name / "a.mp4")], str(tmp_path / "saber")))
        assert exported.read_text() == f"{name} film"
        made.append(exported.stat().st_ino)
    assert made[1] == made[2]
