"""Preference pairs on disk: JSON lines joined to records by clip id, so media is stored once."""

import dataclasses
import hashlib
import json
from pathlib import Path

from saber_jax.data.withhold import MODALITIES

REQUIRED = ("clip_id", "chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one clip; `chosen` weighs all modalities, one of them dominates `rejected`.

    `withheld` is the modality that `rejected` was given without, "" if unknown; `kappa` in 0.0..1.0
    is how strongly the modalities disagree, None to take it from the record.
    """

    clip_id: str
    chosen: str
    rejected: str
    withheld: str = ""
    kappa: float | None = None

    @property
    def key(self) -> bytes:
        """Sixteen bytes that no other pair has: under them its reference log-probs are kept."""
        parts = "\0".join((self.clip_id, self.chosen, self.rejected))
        return hashlib.blake2b(parts.encode(), digest_size=16).digest()


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads pairs.jsonl as `python -m data_prep.preferences` leaves it; other keys are for people.

    `path` is the file or its folder. Raises FileNotFoundError, or ValueError naming the line.
    """
    path = Path(path)
    path = path / "pairs.jsonl" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"No preference pairs at {path}. Mine them with python -m data_prep.preferences."
        )
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if missing := [key for key in REQUIRED if key not in row]:
            raise ValueError(f"{path}:{number} lacks {missing}; a pair has at least {REQUIRED}.")
        pair = Pair(
            **{key: row[key] for key in REQUIRED},
            withheld=_withheld(row, f"{path}:{number}"),
            kappa=row.get("kappa"),
        )
        if pair.chosen == pair.rejected:
            raise ValueError(
                f"{path}:{number} ({pair.clip_id}): chosen and rejected are the same text, which "
                "teaches nothing. Remove the line."
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} holds no pair. Mine some with python -m data_prep.preferences.")
    return pairs


def _withheld(row: dict, where: str) -> str:
    withheld = row.get("withheld") or ""
    if withheld and withheld not in MODALITIES:
        raise ValueError(f"{where}: withheld is {withheld!r}; it must be one of {MODALITIES}.")
    return withheld
