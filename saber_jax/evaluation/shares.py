"""A benchmark answered by several hosts, each by itself: batch b belongs to share b mod N.

    ... evaluation.run --share 1/4 --out OUT     on the first of four hosts, and so on
    ... evaluation.run --out OUT                 anywhere, when all are done: joins and scores

Batches keep their composition, so the joined predictions are those of a single host.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saber_jax.data.journal import batches, read_jsonl
from saber_jax.data.records import Record, RecordSource
from saber_jax.evaluation.predict import Material, Row


@dataclasses.dataclass(frozen=True)
class Share:
    """Share `number` of `count`, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "2/4" -> Share(2, 4). Raises ValueError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        share = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= share.number <= share.count:
            raise ValueError(f"a share is I/N with 1 <= I <= N, got {text!r}")
        return share

    def folder(self, out: Path) -> Path:
        return out / "shares" / f"{self.number}-of-{self.count}"

    def indices(self, total: int, batch_size: int) -> list[int]:
        """The clips of this share."""
        mine = batches(total, batch_size)[self.number - 1 :: self.count]
        return [i for start, stop in mine for i in range(start, stop)]

    def of(self, material: Material, batch_size: int) -> Material:
        """What this share has to answer."""
        indices = self.indices(len(material.records), batch_size)

        def row(i: int, record: Record | None, answer: str) -> Row:
            return material.row(indices[i], record, answer)

        return Material(records=_Chosen(material.records, indices), row=row)


class _Chosen(Sequence[Record]):
    """Some records of many, still read one at a time."""

    def __init__(self, records: Sequence[Record] | RecordSource, indices: Sequence[int]):
        self._records, self._indices = records, indices
        self.sizes = getattr(records, "sizes", ())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._indices[index]]


def joined(
    out: Path, total: int, batch_size: int, *, name: str = "predictions.jsonl"
) -> list[dict[str, Any]] | None:
    """All lines in order, if `out` holds shares; of the first number of hosts that finished theirs.

    Raises ValueError naming those not finished.
    """
    counts = {int(p.name.split("-of-")[1]) for p in (out / "shares").glob("*-of-*")}
    unfinished = []
    for count in sorted(counts):
        rows: dict[int, dict[str, Any]] = {}
        lacking = []
        for number in range(1, count + 1):
            share = Share(number, count)
            indices, path = share.indices(total, batch_size), share.folder(out) / name
            found = read_jsonl(path) if path.exists() else []
            if len(found) < len(indices):
                lacking.append(f"{number}/{count} ({len(found)} of {len(indices)} clips)")
            rows |= dict(zip(indices, found, strict=False))
        if not lacking:
            return [rows[i] for i in range(total)]
        unfinished += lacking
    if unfinished:
        raise ValueError(f"Not all shares are finished: {', '.join(unfinished)}. Run them first.")
    return None
