"""Modality probes: the same clips with one modality muted, blanked or exchanged.

How often the conclusion changes, and to what, shows how much a model uses each modality. The
conclusions of a model that ignores the voice do not change without it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saber_jax.data.records import Record, RecordSource
from saber_jax.data.withhold import withhold
from saber_jax.evaluation import bootstrap, saber_test

PROBES = ("audio_muted", "frames_blanked", "audio_swapped")
PLAIN = "unchanged"

Row = dict[str, Any]


class Probed(Sequence[Record]):
    """Records under a probe; `donors[i]` is the record whose sound record i gets when swapped."""

    def __init__(self, records: Sequence[Record] | RecordSource, probe: str, donors: Sequence[int]):
        if probe not in PROBES:
            raise ValueError(f"There is no probe {probe!r}; use one of {', '.join(PROBES)}.")
        self._records, self._probe, self._donors = records, probe, donors

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        if self._probe == "audio_muted":
            return withhold(record, "audio")
        if self._probe == "frames_blanked":
            return withhold(record, "video")
        return dataclasses.replace(record, audio=self._records[self._donors[index]].audio)


def donors(rows: Sequence[Row]) -> list[int]:
    """For each clip the next one of its language whose voice says something else.

    Without such a clip, simply the next one. Only labels and languages of `rows` are read.
    """
    chosen = []
    for i, row in enumerate(rows):
        others = [(i + step) % len(rows) for step in range(1, len(rows))] or [i]
        fitting = (
            j
            for j in others
            if rows[j]["language"] == row["language"]
            and rows[j]["labels"].get("voice") != row["labels"].get("voice")
        )
        chosen.append(next(fitting, others[0]))
    return chosen


def score(plain: Sequence[Row], probed: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Per probe, and for the unchanged clips: accuracy, dominance, and "moved".

    moved is the share of clips whose conclusion is another than with the clip unchanged. With
    swapped sound, "follows_donor" is the share that concludes what the foreign voice suggests,
    among the clips where that is not what the own voice suggests. Raises ValueError if the clips
    differ.
    """
    result = {PLAIN: _scores(plain)}
    for name, rows in probed.items():
        if [row["clip_id"] for row in rows] != [row["clip_id"] for row in plain]:
            raise ValueError(f"The probe {name} was made on other clips than the plain answers.")
        moved = [a["conclusion"] != b["conclusion"] for a, b in zip(plain, rows, strict=True)]
        result[name] = _scores(rows) | {"moved": bootstrap.mean(np.array(moved, bool))}
    if "audio_swapped" in probed:
        rows = probed["audio_swapped"]
        foreign = [rows[j]["labels"].get("voice") for j in donors(plain)]
        follows = [
            row["conclusion"] == voice
            for row, voice in zip(rows, foreign, strict=True)
            if voice is not None and voice != row["labels"].get("voice")
        ]
        result["audio_swapped"]["follows_donor"] = bootstrap.mean(np.array(follows, bool))
    return result


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    differing = [row for row in rows if not saber_test.is_consistent(row["labels"])]
    agreeing = [row for row in rows if saber_test.is_consistent(row["labels"])]
    return {
        "accuracy": bootstrap.mean(saber_test.correct(rows)),
        "consistent": bootstrap.mean(saber_test.correct(agreeing)),
        "inconsistent": bootstrap.mean(saber_test.correct(differing)),
        "dominance": bootstrap.mean(saber_test.follows(differing, *saber_test.MODALITIES)),
    }
