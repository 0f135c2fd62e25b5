"""Preference pairs on disk: JSON lines joined to records by clip id, so media is stored once."""

import dataclasses
import json
from pathlib import Path

REQUIRED = ("clip_id", "chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one clip; `chosen` weighs all modalities, one of them dominates `rejected`."""

    clip_id: str
    chosen: str
    rejected: str


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
        pair = Pair(**{key: row[key] for key in REQUIRED})
        if pair.chosen == pair.rejected:
            raise ValueError(
                f"{path}:{number} ({pair.clip_id}): chosen and rejected are the same text, which "
                "teaches nothing. Remove the line."
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} holds no pair. Mine some with python -m data_prep.preferences.")
    return pairs
