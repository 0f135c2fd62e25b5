"""Stage `ingest`: lists the clips of a folder of videos or of a published corpus.

A folder may hold `labels.jsonl`, one object a line: {"clip_id": path below the folder or file name,
without the suffix, "speaker", "language", "split", "video", "transcript", and any of
saber_jax.data.records.LABELS}. A corpus is read by the layout it is published in, see
data_prep.raw.corpora.

Rows of one source video are in the same shard, so that clips cut from it stay together.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.raw import corpora, corpora_rows, storage
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage
from data_prep.records import clips
from saber_jax.data import texts
from saber_jax.data.records import LABELS, LANGUAGES

REASONS = {
    "duplicate_id": "another file gives the same clip_id",
    "missing": "the corpus lists a file that is not there",
}


_FILES = ("file", "sound")
"""The keys of a row that name a file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A folder and the corpus whose layout it has, or "" for any folder of videos.

    The folder is listed on this machine; `url` is where the workers of a cluster find the files.
    """

    folder: str
    url: str = ""
    corpus: str = ""
    language: str = ""  # Of the annotations to be written; "" is English, or what labels say.

    def __post_init__(self):
        if self.corpus and self.corpus not in corpora.CORPORA:
            known = ", ".join(corpora.CORPORA)
            raise ValueError(f"Unknown corpus {self.corpus!r}; known are {known}.")
        if self.language and self.language not in LANGUAGES:
            raise ValueError(f"Unknown language {self.language!r}; use one of {LANGUAGES}.")

    @property
    def name(self) -> str:
        """The folder and what it is read as."""
        return f"{self.folder} as {self.corpus}" if self.corpus else self.folder

    def found_by_workers(self, row: Row) -> Row:
        """The row with the addresses that a cluster uses."""
        if not self.url:
            return row
        keys = [key for key in _FILES if key in row]
        inside = {key: Path(row[key]).relative_to(self.folder).as_posix() for key in keys}
        return {**row, **{key: storage.join(self.url, path) for key, path in inside.items()}}

    def rows(self) -> Iterator[Row]:
        """All clips, in a fixed order. Raises FileNotFoundError for a wrong or empty folder."""
        root = Path(self.folder)
        if not root.is_dir():
            raise FileNotFoundError(f"The folder of videos {root} does not exist.")
        listed = corpora.CORPORA[self.corpus](root) if self.corpus else _folder(root)
        row = None
        for row in listed:
            language = self.language or row["language"] or "en"
            yield {**row, "language": language, "provenance": [_made(self, row)]}
        if row is None:
            what = f"the layout of {self.corpus}" if self.corpus else "any video"
            raise FileNotFoundError(f"{root} does not hold {what}.")


def ingest(stage: ShardedStage, sources: Iterable[Source]) -> dict[str, Any]:
    """Runs the stage, which reads no media. Returns the summary.

    A finished stage lists its sources again: ValueError if clips or labels have changed since.
    """
    unfinished = bool(stage.missing())
    parts: list[list[Row]] = [[] for _ in range(stage.shards)]
    outcomes: list[list[Outcome]] = [[] for _ in range(stage.shards)]
    seen: dict[str, str] = {}
    inputs: dict[str, Any] = {}
    for source in sources:
        listing = _Listing()
        for row in source.rows():
            listing.add(row)
            if unfinished:
                shard = shard_of(row, stage.shards)
                parts[shard].append(row)
                outcomes[shard].append(_outcome(row, source, seen))
        inputs[source.name] = listing.summary()
    stage.claim("", inputs)
    for shard in range(stage.shards) if unfinished else ():
        stage.write(shard, parts[shard], outcomes[shard])
    return stage.summarise()


class _Listing:
    """What the rows of a source were made from, in a few values that change with it."""

    def __init__(self):
        self._clips = 0
        self._files, self._labels = hashlib.sha256(), hashlib.sha256()

    def add(self, row: Row) -> None:
        self._clips += 1
        for key in _FILES:
            if key in row:
                self._files.update(ascii((row[key], _size_and_time(row[key]))).encode())
        known = {key: row[key] for key in row if key not in (*_FILES, "provenance")}
        self._labels.update(json.dumps(known, sort_keys=True).encode())

    def summary(self) -> dict[str, Any]:
        """Digests of the files' names, sizes and times, and of what labels and tables say."""
        files, labels = self._files.hexdigest()[:16], self._labels.hexdigest()[:16]
        return {"clips": self._clips, "files": files, "labels": labels}


def _size_and_time(file: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _outcome(row: Row, source: Source, seen: dict[str, str]) -> Outcome:
    """The row for the workers, or dropped. `seen` is the file of every clip_id so far."""
    first = seen.setdefault(row["clip_id"], row["file"])
    if first != row["file"]:
        return Dropped(row=row, reason="duplicate_id", detail=first)
    if lost := _lost(row):
        return Dropped(row=row, reason="missing", detail=lost)
    return source.found_by_workers(row)


def _lost(row: Row) -> str | None:
    """A listed file that does not exist, the clip or its separate sound; None if all exist."""
    files = (row[key] for key in _FILES if key in row)
    return next((file for file in files if not Path(file).is_file()), None)


def shard_of(row: Row, shards: int) -> int:
    digest = hashlib.sha256(f"{row['corpus']}\0{row['video']}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % shards


def _folder(root: Path) -> Iterator[Row]:
    paths = clips.find_videos(root, "videos")
    labels = _labels_by_clip(paths, root)
    for path in paths:
        relative = path.relative_to(root).with_suffix("")
        known = labels.get(path, {})
        yield corpora_rows.row(
            path,
            clip_id=re.sub(r"[^\w.-]+", "_", str(relative)),
            corpus="",
            video=known.get("video", str(relative)),
            speaker=known.get("speaker", ""),
            language=known.get("language", ""),
            split=known.get("split", ""),
            transcript=known.get("transcript", ""),
            labels={k: known[k] for k in LABELS if k in known and k != "speaker"},
        )


def _labels_by_clip(paths: list[Path], root: Path) -> dict[Path, dict[str, str]]:
    """The line of labels.jsonl about each file, by its path below `root` or by its name alone.

    Prints the labels that no file has. Raises ValueError for a wrong line, and for a name that
    several files in different folders have.
    """
    listing = root / "labels.jsonl"
    if not listing.exists():
        return {}
    labels = clips.read_labels(listing, also=("video", "transcript"))
    by_name: dict[str, Path] = {}
    for path in paths:  # Of two files with one name the first is kept, see `ingest`.
        by_name.setdefault(clips.name_of(path, root), path)
    by_stem: dict[str, list[str]] = collections.defaultdict(list)
    for name in by_name:
        by_stem[name.rpartition("/")[2]].append(name)
    found: dict[Path, dict[str, str]] = {}
    unused: list[str] = []
    for key, label in labels.items():
        names = [key] if key in by_name else by_stem[key]
        if len(names) > 1:
            raise ValueError(
                f"{listing} has a label of {key!r}, which fits {names[0]} and {names[1]}. Write "
                "the path below the folder, without the suffix, as its clip_id."
            )
        unused += [] if names else [key]
        found |= {by_name[name]: label for name in names}
    if unused:
        print(f"{listing} has labels without a video: {texts.listed(unused)}.")
    return found


def _made(source: Source, row: Row) -> dict[str, Any]:
    given = [key for key in ("speaker", "language", "transcript", "labels") if row.get(key)]
    return {
        "fields": given,
        "tool": "data_prep.ingest",
        "model": None,
        "prompt": None,
        "parameters": dataclasses.asdict(source),
    }
