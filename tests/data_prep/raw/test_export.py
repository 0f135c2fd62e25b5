"""The export: which files stand in OUT/saber, and what they hold."""

import errno
import os
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import export, storage
from data_prep.raw.shards import Dropped, Row, ShardedStage
from data_prep.records import clips


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


def make_stage(name: str, out: Path) -> ShardedStage:
    return ShardedStage(name=name, out=str(out), shards=2, settings={}, reasons=export.REASONS)


def run(out: Path, names: str) -> dict:
    """Exports films of these names, as after a split that kept no others."""
    for name in ("split", "export"):
        storage.delete(str(out / name))
    source = make_stage("split", out)
    source.claim("")
    for shard in range(2):
        rows = [make_row(out.parent / f"{name}.mp4") for name in names[shard::2]]
        source.write(shard, rows, rows)
    return export.run(make_stage("export", out), source, str(out / "saber"))


@pytest.fixture
def out(tmp_path) -> Path:
    for name in "abcd":
        (tmp_path / f"{name}.mp4").write_bytes(f"film {name}".encode())
    return tmp_path / "out"


def found(out: Path) -> clips.ClipInputs:
    """What data_prep.build finds in the export."""
    saber = out / "saber"
    return clips.find_inputs(saber / "clips", saber / "annotations", saber / "labels.jsonl")


def test_a_clip_that_a_second_run_drops_leaves_the_export_and_so_cannot_be_trained_on(out, capsys):
    run(out, "abcd")
    (out / "saber/clips/.c.mp4.0123.partial").touch()  # Of a run that was killed.
    (out / "saber/clips/b.mkv").touch()  # As the same clip was called before.
    capsys.readouterr()
    assert run(out, "bd")["kept"] == 2
    assert "deleted 6 files of clips" in capsys.readouterr().out
    left = {path.name for path in (out / "saber").rglob("*") if path.is_file()}
    assert left == {"b.mp4", "b.json", "d.mp4", "d.json", "labels.jsonl", "provenance.jsonl"}
    assert set(found(out).clips.values()) == set(found(out).labels) == {"b", "d"}


def test_an_export_that_is_interrupted_cannot_be_built_until_it_is_finished(out, monkeypatch):
    run(out, "ab")
    monkeypatch.setattr(export, "_remove_others", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out, "bc")
    assert (out / "saber/clips/c.mp4").exists()
    with pytest.raises(FileNotFoundError, match=r"labels\.jsonl"):
        found(out)
    monkeypatch.undo()
    export.run(make_stage("export", out), make_stage("split", out), str(out / "saber"))
    assert set(found(out).clips.values()) == set(found(out).labels) == {"b", "c"}


def test_a_repeated_export_leaves_the_files_whose_time_a_build_goes_by(out):
    run(out, "ab")
    before = {path: path.stat().st_mtime_ns for path in (out / "saber").rglob("*")}
    export.run(make_stage("export", out), make_stage("split", out), str(out / "saber"))
    assert {path: path.stat().st_mtime_ns for path in (out / "saber").rglob("*")} == before


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def test_a_clip_whose_source_is_lost_keeps_its_file_and_no_annotation(out):
    run(out, "ab")
    (out.parent / "a.mp4").unlink()
    assert run(out, "ab")["reasons"] == {"missing": 1}
    assert (out / "saber/clips/a.mp4").read_text() == "film a"
    assert set(found(out).annotations) == {"b"}
