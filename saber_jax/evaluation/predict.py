"""Answers all clips of a benchmark, writing them batch by batch so that it can be resumed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saber_jax.data import isolation, sed, timeline
from saber_jax.data.decode import MediaError
from saber_jax.data.records import Record, RecordSource
from saber_jax.generate.generator import record_of_clip
from saber_jax.runs.journal import Journal, batches

Row = dict[str, Any]
Respond = Callable[[Iterator[list[Record]]], Iterator[list[str]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkClips:
    """The clips of a benchmark. `row(i, record, answer)` makes the line of predictions.jsonl.

    Reading `records[i]` may raise MediaError or FileNotFoundError. Its row then has no record, an
    empty answer, and the reason as "error".
    """

    records: Sequence[Record] | RecordSource
    row: Callable[[int, Record | None, str], Row]

    def part(self, indices: Sequence[int]) -> "BenchmarkClips":
        """These of its clips."""

        def row(i: int, record: Record | None, answer: str) -> Row:
            return self.row(indices[i], record, answer)

        return BenchmarkClips(records=_Chosen(self.records, indices), row=row)


class _Chosen(Sequence[Record]):
    """Some records of many, still read one at a time."""

    def __init__(self, records: Sequence[Record] | RecordSource, indices: Sequence[int]):
        self._records, self._indices = records, indices
        self.sizes = getattr(records, "sizes", ())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._indices[index]]


class SpelledOut(Sequence[Record]):
    """The same clips with a request that a model without SED training can answer in sections."""

    def __init__(self, records: Sequence[Record] | RecordSource):
        self._records = records
        self.sizes = getattr(records, "sizes", ())
        self.outline = getattr(records, "outline", records.__getitem__)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        return dataclasses.replace(record, question=sed.spelled_out(record.language))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFile:
    """A clip of a benchmark, decoded when its turn comes. `question` as in Record."""

    clip_id: str
    path: Path
    language: str
    question: str | None = None


class ClipFiles(Sequence[Record]):
    """Video files as records, decoded as a checkpoint's model.json says."""

    def __init__(self, files: Sequence[ClipFile], settings: Mapping[str, Any] | None):
        self._files, self._settings = files, dict(settings or {})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        record = record_of_clip(file.path, file.language, self._settings)
        return dataclasses.replace(record, clip_id=file.clip_id, question=file.question)


def longest_first(files: Sequence[ClipFile]) -> list[int]:
    """An order that starts with the largest clips, so that shapes grow, and compile, only once."""
    return sorted(range(len(files)), key=lambda i: (-_seconds(files[i].path), i))


def predict(
    clips: BenchmarkClips, respond: Respond, journal: Journal, *, batch_size: int
) -> list[Row]:
    """Answers all clips that `journal` lacks. `respond` answers batch by batch."""
    records = clips.records
    plan = batches(len(records), batch_size)
    done = journal.resume([stop for _, stop in plan])
    rest = [range(start, stop) for start, stop in plan if start >= len(done)]
    read: dict[int, Record | Exception] = {}

    def readable(part: range) -> list[Record]:
        for i in part:
            read[i] = _read(records, i)
        return [r for i in part if isinstance(r := read[i], Record)]

    with tqdm(total=len(records), initial=len(done), desc="answers", unit="clip") as bar:
        for part, answers in zip(rest, respond(map(readable, rest)), strict=True):
            said, new = iter(answers), []
            for i in part:
                record = read.pop(i)
                if isinstance(record, Record):
                    new.append(clips.row(i, record, next(said)))
                else:
                    new.append(clips.row(i, None, "") | {"error": str(record)})
            journal.append(new)
            done += new
            bar.update(len(new))
    return done


def _read(records: Sequence[Record] | RecordSource, index: int) -> Record | Exception:
    try:
        return records[index]
    except (MediaError, FileNotFoundError) as error:
        return error


def _seconds(path: Path) -> float:
    """Duration of a file; 0 if it is unknown or the file cannot be opened."""
    try:
        return isolation.call(timeline.stated_seconds, path)
    except (MediaError, OSError):
        return 0.0
