"""The tables of the report: stage against stage, by split, by conflict, by probe."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import bootstrap, saber_test
from saber_jax.evaluation import probes as probing

Row = dict[str, Any]
Line = dict[str, Any]

PROBE_NAMES = {
    probing.PLAIN: "unchanged",
    "audio_muted": "sound muted",
    "frames_blanked": "picture blanked",
    "audio_swapped": "another clip's voice",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Scores and predictions by stage, first to last. Raises ValueError for different clips."""

    stages: Mapping[str, str]
    scores: Mapping[str, dict[str, Any]]
    rows: Mapping[str, Sequence[Row]]

    def __post_init__(self):
        clips = {stage: [row["clip_id"] for row in rows] for stage, rows in self.rows.items()}
        first = next(iter(clips))
        for stage, ids in clips.items():
            if ids != clips[first]:
                raise ValueError(
                    f"The predictions of {first} and {stage} are for different clips. Evaluate "
                    "both checkpoints on the same records and split."
                )

    @property
    def clips(self) -> Sequence[Row]:
        """The rows of the first stage, for what is true of the clips."""
        return next(iter(self.rows.values()))

    def values(self, *path: str) -> list[dict[str, Any] | None]:
        """One score of each stage, by its path in scores.json; None where there is none."""
        found = []
        for score in self.scores.values():
            value: Any = score
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            found.append(value)
        return found

    def gain(
        self, hits: Callable[[Sequence[Row]], Bool[np.ndarray, "n"]], which: Bool[np.ndarray, "n"]
    ) -> dict[str, Any] | None:
        """What the last stage gains over the first on the same clips; None with one stage."""
        if len(self.stages) < 2:
            return None
        first, *_, last = (hits(rows)[which] for rows in self.rows.values())
        return bootstrap.paired_gain(first, last)


def summary(results: Results) -> list[Line]:
    """The main table."""
    agrees = _agrees(results)
    lines = []
    for split, which in _splits(agrees):
        gain = results.gain(saber_test.correct, which)
        lines.append(_line(results, f"Accuracy, {split} clips", (split, "accuracy"), 1, gain))
    lines.append(_line(results, "… gap between the two", ("gap", "accuracy"), -1))
    whose = {"dominance": saber_test.MODALITIES}
    whose |= {f"follows_{modality}": (modality,) for modality in saber_test.MODALITIES}
    for key, modalities in whose.items():
        name = "Unimodal dominance, inconsistent clips"
        if len(modalities) == 1:
            name = f"… following the {modalities[0]}"
        gain = results.gain(lambda rows, m=modalities: saber_test.follows(rows, *m), ~agrees)
        lines.append(_line(results, name, ("inconsistent", key), -1, gain))
    for key in saber_test.SPEECH:
        name = key.replace("_", " ").capitalize()
        for split in saber_test.SPLITS:
            lines.append(_line(results, f"{name}, {split} clips", (split, key), -1))
        # More errors on inconsistent clips make this gap negative.
        lines.append(_line(results, "… gap between the two", ("gap", key), 1))
    return [line for line in lines if any(v and v["value"] is not None for v in line["values"])]


def cards(results: Results) -> list[Line]:
    """What the page opens with, one card each: accuracy where modalities agree and where not, and
    dominance."""
    agrees = _agrees(results)
    agreement, conflict = (which for _, which in _splits(agrees))
    led = results.gain(lambda rows: saber_test.follows(rows, *saber_test.MODALITIES), conflict)
    return [
        _line(results, title, path, better, gain)
        for title, path, better, gain in [
            (
                "Right where the modalities agree",
                ("consistent", "accuracy"),
                1,
                results.gain(saber_test.correct, agreement),
            ),
            (
                "Right where they conflict",
                ("inconsistent", "accuracy"),
                1,
                results.gain(saber_test.correct, conflict),
            ),
            ("Misled by a single modality", ("inconsistent", "dominance"), -1, led),
        ]
    ]


def worse(results: Results) -> list[Line]:
    """Where a later stage is right less often than the first, beyond chance: the interval of the
    change on the same clips lies below zero. Each line has "stage", "split" and "gain"."""
    first, *later = results.rows.items()
    lines = []
    for stage, rows in later:
        for split, which in _splits(_agrees(results)):
            before, after = (saber_test.correct(r)[which] for r in (first[1], rows))
            gain = bootstrap.paired_gain(before, after)
            if gain["interval"] and gain["interval"][1] < 0:
                lines.append({"stage": results.stages[stage], "split": split, "gain": gain})
    return lines


def missing(results: Results) -> dict[str, list[str]]:
    """What could not be scored -> the stages that lack it."""
    lacking: dict[str, list[str]] = {}
    for stage, name in results.stages.items():
        for line in results.scores[stage].get("missing", []):
            lacking.setdefault(line, []).append(name)
    return lacking


CONFLICT_MEANINGS = {
    "sarcasm": "the words are not meant as they are said",
    "masking": "the face hides what the voice tells",
    "suppression": "a neutral face, a feeling voice",
    "leakage": "one modality betrays what another hides",
    "other": "any other conflict",
}


def conflict_types(results: Results) -> list[Line]:
    """Accuracy by type of conflict."""
    names = [saber_test.conflict_type(row) for row in results.clips]
    lines = []
    for name in next(iter(results.scores.values()))["conflict_types"]:
        which = np.array([n == name for n in names])
        gain = results.gain(saber_test.correct, which)
        meaning = CONFLICT_MEANINGS.get(name)
        shown = f"{name}: {meaning}" if meaning else name
        lines.append(_line(results, shown, ("conflict_types", name), 1, gain))
    return lines


def judged(results: Results) -> list[Line]:
    """A judge's 1..5 by section: "values" holds each stage's splits and gap; empty without one."""
    lines = []
    for field in (*FIELDS, "mean"):
        splits = [results.values(part, "judge", field) for part in (*saber_test.SPLITS, "gap")]
        if any(value for split in splits for value in split):
            values = [score for stage in zip(*splits, strict=True) for score in stage]
            lines.append({"name": sed.TITLES.get(field, field), "values": values})
    return lines


def outcomes(results: Results) -> list[dict[str, Any]]:
    """How many clips of each split are right before and after; empty with one stage."""
    if len(results.stages) < 2:
        return []
    agrees = _agrees(results)
    first, *_, last = (saber_test.correct(rows) for rows in results.rows.values())
    return [
        {
            "split": split,
            "kept": int((first & last & which).sum()),
            "won": int((~first & last & which).sum()),
            "lost": int((first & ~last & which).sum()),
            "never": int((~first & ~last & which).sum()),
        }
        for split, which in _splits(agrees)
    ]


def confusions(results: Results) -> list[dict[str, Any]]:
    """A confusion matrix per stage, with each cell's share of its row for shading."""
    tables = []
    for stage, name in results.stages.items():
        table = results.scores[stage]["confusion"]
        rows = []
        for truth, counts in zip(table["truth"], table["counts"], strict=True):
            total = max(sum(counts), 1)
            cells = [
                {"count": count, "share": count / total, "right": said == truth}
                for said, count in zip(table["said"], counts, strict=True)
            ]
            rows.append({"truth": truth, "cells": cells})
        tables.append({"stage": name, "said": table["said"], "rows": rows})
    return tables


def probes(results: Results) -> list[dict[str, Any]]:
    """Per probe: the scores of each stage that was probed; empty if none was."""
    probed = {s: score["probes"] for s, score in results.scores.items() if "probes" in score}
    lines = []
    for probe, name in PROBE_NAMES.items():
        stages = [
            {"stage": results.stages[stage]} | scores[probe]
            for stage, scores in probed.items()
            if probe in scores
        ]
        if stages:
            lines.append({"probe": probe, "name": name, "stages": stages})
    return lines


def flat(scores: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Scores of any benchmark as lines {"name", "n", "value", "interval"}, notes as {"name",
    "note"}."""
    lines: list[dict[str, Any]] = []
    for key, value in scores.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and "counts" not in value:
            if "value" in value:
                shown = {"n": value.get("n"), "value": value["value"]}
                lines.append({"name": name, "interval": value.get("interval")} | shown)
            else:
                lines += flat(value, f"{prefix}{key}, ")
        elif isinstance(value, list):
            lines += [{"name": name, "note": "; ".join(map(str, value))}] if value else []
        elif isinstance(value, int | float | str):
            lines.append({"name": name, "note": str(value)})
    return lines


def percent(value: float | None) -> str:
    """0.4167 -> "41.7"."""
    return "–" if value is None else _signed(f"{100 * value:.1f}")


def points(value: float | None) -> str:
    """A difference of fractions in percentage points; what rounds to zero has no sign."""
    if value is None or not round(100 * value, 1):
        return "–" if value is None else "0.0"
    return _signed(f"{100 * value:+.1f}")


def plain(value: float | None, places: int = 2) -> str:
    """4.1667 -> "4.17"; what rounds to zero has no sign."""
    return "–" if value is None else _signed(f"{round(value, places) + 0.0:.{places}f}")


def _line(
    results: Results,
    name: str,
    path: tuple[str, ...],
    better: int,
    gain: dict[str, Any] | None = None,
) -> Line:
    """`better` is 1 where more is better, else -1. Without `gain` it is the plain difference."""
    values = results.values(*path)
    known = [v["value"] if v else None for v in values]
    first, last = known[0], known[-1]
    if gain is None and len(known) > 1 and first is not None and last is not None:
        gain = {"value": last - first, "interval": None}
    return {"name": name, "values": values, "gain": gain, "better": better}


def _agrees(results: Results) -> Bool[np.ndarray, "n"]:
    return np.array([saber_test.is_consistent(row["labels"]) for row in results.clips], bool)


def _splits(agrees: Bool[np.ndarray, "n"]) -> list[tuple[str, Bool[np.ndarray, "n"]]]:
    return [("consistent", agrees), ("inconsistent", ~agrees)]


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")
