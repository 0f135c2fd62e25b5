"""A finished ingest and folders that change after it."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import ingest
from data_prep.raw.ingest import Source
from data_prep.raw.shards import ShardedStage


def run(folder: Path) -> dict:
    reasons = ingest.REASONS
    out = str(folder.parent / "out")
    stage = ShardedStage(name="ingest", out=out, shards=3, settings={}, reasons=reasons)
    return ingest.ingest(stage, [Source(folder=str(folder))])


def write_labels(folder: Path, speaker: str) -> None:
    label = {"clip_id": "a", "speaker": speaker}
    (folder / "labels.jsonl").write_text(json.dumps(label) + "\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two clips and a label, ingested."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"film")
    write_labels(folder, "anna")
    assert run(folder)["kept"] == 2
    return folder


def test_a_folder_as_it_was_is_ingested_once(folder):
    made = {path: path.stat().st_mtime_ns for path in (folder.parent / "out").rglob("kept-*")}
    (folder / "notes.txt").write_text("no clip")
    write_labels(folder, "anna")  # The same again, later.
    assert run(folder)["kept"] == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made


def add_clip(folder: Path) -> None:
    (folder / "c.mp4").write_bytes(b"film")


def replace_clip(folder: Path) -> None:
    os.utime(folder / "b.mp4", (1e9, 1e9))


def lengthen_clip(folder: Path) -> None:
    before = (folder / "b.mp4").stat()
    (folder / "b.mp4").write_bytes(b"longer film")
    os.utime(folder / "b.mp4", ns=(before.st_atime_ns, before.st_mtime_ns))


def correct_speaker(folder: Path) -> None:
    before = (folder / "labels.jsonl").stat()
    write_labels(folder, "emma")
    os.utime(folder / "labels.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named", "unchanged"),
    [
        (add_clip, r"inputs\..*videos\.clips: 2 there, 3 here", None),
        (replace_clip, r"inputs\..*videos\.files: ", "labels"),
        (lengthen_clip, r"inputs\..*videos\.files: ", "labels"),
        (correct_speaker, r"inputs\..*videos\.labels: ", "files"),
    ],
)
def test_a_folder_that_has_changed_since_is_refused_and_the_change_is_named(
    folder, change, named, unchanged
):
    change(folder)
    with pytest.raises(ValueError, match=rf"{named}.*Delete it and the later stages") as refusal:
        run(folder)
    assert unchanged is None or f".{unchanged}:" not in str(refusal.value)
