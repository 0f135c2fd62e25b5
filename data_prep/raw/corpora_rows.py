"""Helpers of the corpus readers: rows, tables, and names of emotions."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

EMOTIONS = {
    **dict.fromkeys(("angry", "anger", "ang", "a", "annoyance"), "angry"),
    **dict.fromkeys(("happy", "happiness", "joy", "hap", "h", "serenity"), "happy"),
    **dict.fromkeys(("sad", "sadness", "s"), "sad"),
    **dict.fromkeys(("neutral", "neu", "n", "calm"), "neutral"),
    **dict.fromkeys(("fear", "fearful", "fea", "f"), "fear"),
    **dict.fromkeys(("disgust", "disgusted", "disgusting", "dis", "d"), "disgust"),
    **dict.fromkeys(("surprise", "surprised", "surprising", "sur"), "surprise"),
    **dict.fromkeys(("contempt",), "contempt"),
    **dict.fromkeys(("worried", "worry"), "worried"),
}
_VIDEO = (".mp4", ".mkv", ".avi", ".flv", ".webm", ".mov")


def row(
    path: Path,
    *,
    clip_id: str,
    corpus: str,
    video: str,
    speaker: str = "",
    language: str = "",
    split: str = "",
    transcript: str = "",
    labels: Mapping[str, str] | None = None,
    **more: Any,
) -> Row:
    """A row as `ingest` yields it. Several people in a clip are one `speaker` joined by "+"."""
    return {
        "clip_id": clip_id,
        "file": str(path),
        "corpus": corpus,
        "video": video,
        "speaker": speaker,
        "language": language,
        "split": split,
        "transcript": transcript,
        "labels": {key: value for key, value in (labels or {}).items() if value},
        **more,
    }


def emotion(word: str) -> str:
    """Our word for an emotion; "" for an empty one."""
    word = word.strip().lower()
    return EMOTIONS.get(word, word)


def videos_in(root: Path, folder: str = "") -> list[Path]:
    """Video files below `folder`, or below `root` if that folder is not there."""
    below = root / folder
    paths = below.rglob("*") if below.is_dir() else root.rglob("*")
    return sorted(path for path in paths if path.suffix.lower() in _VIDEO)


def find(root: Path, *names: str) -> Path | None:
    """The first file of one of the names, at any depth."""
    for name in names:
        if paths := sorted(root.rglob(name)):
            return paths[0]
    return None


def read_table(path: Path | None) -> list[dict[str, str]]:
    """The lines of a CSV file with a header; none without a file."""
    if path is None or not path.exists():
        return []
    # utf-8-sig: several of these tables begin with a byte order mark.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [{k: v or "" for k, v in line.items() if k} for line in csv.DictReader(file)]
