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

    def __init__(self, path: Path, *, total: int, limit: float, writes: bool):
        """`limit` is the most that may be left out, as a share of `total` examples."""
        self._path, self._total, self._limit, self._writes = path, total, limit, writes
        self._entries: dict[int, LeftOut] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def indices(self) -> list[int]:
        return sorted(self._entries)

    def recall(self, indices: Iterable[int]) -> None:
        """Leaves out the examples `indices` that were left out before the run was resumed."""
        known = read_jsonl(self._path) if exists(self._path) else []
        entries = {row["index"]: LeftOut(**row) for row in known}
        for index in indices:
            lost = LeftOut(index=index, clip_id="", file="", reason="bad_record", detail="")
            self._entries[index] = entries.get(index, lost)

    def note(self, entries: Iterable[LeftOut]) -> None:
        """Adds entries without checking the limit."""
        for entry in entries:
            self._entries[entry.index] = entry

    def add(self, entries: Iterable[LeftOut]) -> None:
        """Adds entries and writes the list; raises TooManyBadError if there are too many then."""
        before = len(self._entries)
        for entry in entries:
            self._entries.setdefault(entry.index, entry)
        if self._writes and (len(self._entries) > before or not exists(self._path)):
            make_folder(self._path.parent)
            rows = [dataclasses.asdict(self._entries[index]) for index in self.indices]
            write_jsonl(self._path, rows)
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
