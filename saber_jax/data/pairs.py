"""Preference pairs on disk: JSON lines joined to records by clip id, so media is stored once."""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saber_jax.data import texts
from saber_jax.data.withhold import MODALITIES
from saber_jax.runs import checksums
from saber_jax.runs.files import exists, numbered_jsonl, write_jsonl

REQUIRED = ("clip_id", "chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one clip: `chosen` weighs all modalities, `rejected` follows a single one.

    `withheld` is the modality without which `rejected` was generated, "" if unknown. `kappa` in
    0.0..1.0 is how strongly the modalities disagree; None means the record's label.
    """

    clip_id: str
    chosen: str
    rejected: str
    withheld: str = ""
    kappa: float | None = None

    @property
    def key(self) -> bytes:
        """Sixteen bytes that identify the pair; its reference log-probs are stored under them."""
        parts = "\0".join((self.clip_id, self.chosen, self.rejected))
        return hashlib.blake2b(parts.encode(), digest_size=16).digest()


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads pairs.jsonl as `python -m data_prep.preferences` writes it; other keys are ignored.

    `path` is the file or its folder. Raises FileNotFoundError, or ValueError naming the line. Says
    on stderr if the file has no checksums.
    """
    path = Path(path)
    inside = path / "pairs.jsonl"
    path = inside if exists(inside) or path.is_dir() else path
    if not exists(path):
        raise FileNotFoundError(
            f"No preference pairs at {path}. Mine them with python -m data_prep.preferences."
        )
    if not checksums.check(path):
        print(checksums.unchecked(path), file=sys.stderr)
    pairs = [_pair(row, f"{path}:{number}") for number, row in numbered_jsonl(path)]
    if not pairs:
        raise ValueError(f"{path} holds no pair. Mine some with python -m data_prep.preferences.")
    return pairs


def write_pairs(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes pairs.jsonl, with checksums of its lines."""
    with checksums.written(path):
        write_jsonl(path, rows)


def _pair(row: dict[str, Any], where: str) -> Pair:
    if missing := [key for key in REQUIRED if key not in row]:
        raise ValueError(f"{where} lacks {missing}; a pair has at least {REQUIRED}.")
    for key in REQUIRED:
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: {key} is {row[key]!r}; it must be text.")
        if not row[key].strip():
            raise ValueError(f"{where}: {key} is empty, which teaches nothing. Remove the line.")
        if fault := texts.fault(row[key]):
            raise ValueError(f"{where}: {key} {fault}.")
    withheld, kappa = row.get("withheld") or "", row.get("kappa")
    if withheld and withheld not in MODALITIES:
        raise ValueError(f"{where}: withheld is {withheld!r}; it must be one of {MODALITIES}.")
    number = isinstance(kappa, int | float) and not isinstance(kappa, bool)
    if kappa is not None and not (number and 0 <= kappa <= 1):
        raise ValueError(f"{where}: kappa is {kappa!r}; it must be a number from 0 to 1.")
    if row["chosen"] == row["rejected"]:
        raise ValueError(
            f"{where} ({row['clip_id']}): chosen and rejected are the same text, which teaches "
            "nothing. Remove the line."
        )
    return Pair(**{key: row[key] for key in REQUIRED}, withheld=withheld, kappa=kappa)
