"""The list of examples that are left out of training, quarantine.jsonl, and its limit.

    {"index": 1207, "clip_id": "dia3_utt2", "file": "1.0.0/*-train.*-00002-of-00008[17]",
     "reason": "too_large", "detail": "text 5120 > 4096"}

An example is left out before training if its record is damaged or it does not fit into a row. Every
process finds the same ones, and they are not planned. A record that turns out to be bad during
training leaves an empty segment in its row: no shape depends on it, so no process waits for
another. At the end of that step, all processes exchange the names of what they left out.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from saber_jax.runs.files import exists, make_folder, read_jsonl, write_jsonl

REASONS = {
    "bad_record": "the stored record cannot be used",
    "too_large": "a row cannot hold the example",
    "nonfinite": "a step that had it in its batch was not finite",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One example that was left out. `index` numbers the records of all sources."""

    index: int
    clip_id: str
    file: str
    reason: str
    detail: str


class TooManyBadError(ValueError):
    """More of the data is bad than the configuration allows."""


class Quarantine:
    """The list of left-out examples, stored in `path` by the process with `writes`."""

    def __init__(
        self, path: Path, *, total: int, limit: float, writes: bool, resumes: bool = False
    ):
        """`limit` is the most that may be left out, as a share of `total` examples. A run that
        `resumes` has a checkpoint, and will `recall` what was left out before it."""
        self._path, self._total, self._limit, self._writes = path, total, limit, writes
        self._entries: dict[int, LeftOut] = {}
        self._listed = _read(path)
        self._before = self._listed or {}
        # Only the checkpoint tells which of them count. If the run is stopped again before it is
        # read, their names must still be in the list.
        self._undecided = self._before if resumes else {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def indices(self) -> list[int]:
        return sorted(self._entries)

    def recall(self, indices: Iterable[int]) -> None:
        """Leaves out the examples `indices` that were left out before the run was resumed."""
        for index in indices:
            lost = LeftOut(index=index, clip_id="", file="", reason="bad_record", detail="")
            self._entries.setdefault(index, self._before.get(index, lost))
        self._undecided = {}
        self._write()

    def note(self, entries: Iterable[LeftOut]) -> None:
        """Adds entries and writes the list, without checking the limit."""
        for entry in entries:
            self._entries[entry.index] = entry
        self._write()

    def add(self, entries: Iterable[LeftOut]) -> None:
        """Adds entries and writes the list; raises TooManyBadError if there are too many then."""
        for entry in entries:
            self._entries.setdefault(entry.index, entry)
        self._write()
        if len(self._entries) > self._limit * self._total:
            first = self._entries[self.indices[0]]
            raise TooManyBadError(
                f"{len(self._entries)} of {self._total} examples cannot be used, more than the "
                f"share config.data.max_bad_fraction={self._limit} allows; the first is "
                f"{first.clip_id} in {first.file}: {REASONS[first.reason]} ({first.detail}). All "
                f"are in {self._path}. Repair or rebuild those records, raise the budgets in "
                "config.data (python -m saber_jax.data.budgets prints some that suit), or raise "
                "the share."
            )

    def _write(self) -> None:
        """Writes the list if it is not what the file has."""
        entries = self._undecided | self._entries
        if self._writes and entries != self._listed:
            make_folder(self._path.parent)
            rows = [dataclasses.asdict(entries[index]) for index in sorted(entries)]
            write_jsonl(self._path, rows)
            self._listed = entries


def _read(path: Path) -> dict[int, LeftOut] | None:
    """The entries of an earlier start by index; None if there is no list."""
    if not exists(path):
        return None
    return {row["index"]: LeftOut(**row) for row in read_jsonl(path)}
