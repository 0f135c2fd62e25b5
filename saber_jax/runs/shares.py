"""Shares: several hosts that answer independently; batch b belongs to share b mod N.

    COMMAND --share 1/4 --out OUT     on the first of four hosts, and so on
    COMMAND --out OUT                 anywhere, when all are done: joins them

COMMAND is saber_jax.evaluation.run or data_prep.preferences. Batches are the same as with a single
host, so the joined results are too.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from saber_jax.runs.files import exists, listed, read_jsonl
from saber_jax.runs.journal import batches


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
        """The indices of this share among `total` answers."""
        mine = batches(total, batch_size)[self.number - 1 :: self.count]
        return [i for start, stop in mine for i in range(start, stop)]


def joined(out: Path, name: str, total: int, batch_size: int) -> list[dict[str, Any]] | None:
    """All lines of the file `name` in order, if `out` holds shares; those of the first number of
    hosts that finished theirs.

    Raises ValueError naming those not finished.
    """
    counts = {int(p.name.split("-of-")[1]) for p in listed(out / "shares", "*-of-*")}
    unfinished = []
    for count in sorted(counts):
        rows: dict[int, dict[str, Any]] = {}
        lacking = []
        for number in range(1, count + 1):
            share = Share(number, count)
            indices, path = share.indices(total, batch_size), share.folder(out) / name
            found = read_jsonl(path) if exists(path) else []
            if len(found) < len(indices):
                lacking.append(f"{number}/{count} ({len(found)} of {len(indices)} answers)")
            rows |= dict(zip(indices, found, strict=False))
        if not lacking:
            return [rows[i] for i in range(total)]
        unfinished += lacking
    if unfinished:
        raise ValueError(f"Not all shares are finished: {', '.join(unfinished)}. Run them first.")
    return None
