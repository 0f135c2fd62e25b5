"""EMER: free-form descriptions of emotional states, and their three published metrics.

overlap  a judge's 1..10 for the overlap of clues, and of the emotions named
         (AffectGPT/evaluation.py): the "clue overlap / label overlap" of published tables
sets     accuracy and recall of emotion words, synonyms grouped by a judge (MER2024/main-ov.py)
wheel    the emotion-wheel F of MER2025, see `saber_jax.evaluation.wheel`; needs no judge once there
         are words

DATA is laid out as AffectGPT and MER2024 publish it:

    gt-eng.csv | gt-chi.csv | gt.csv    columns names and eng_reasons | chi_reasons
    check-openset.csv                   columns name and openset, "[happy, relieved]"; optional
    video/NAME.mp4 | .avi | ...         the clips

A row, one line of predictions.jsonl: {"clip_id", "language", "response", "reason", "openset"}.
"""

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saber_jax.data import emotions, sed
from saber_jax.evaluation import bootstrap, wheel
from saber_jax.evaluation.judge import Judge

Row = dict[str, Any]

TRUTHS = {"gt-eng.csv": "eng_reasons", "gt-chi.csv": "chi_reasons", "gt.csv": "chi_reasons"}
LANGUAGES = {"eng_reasons": "en", "chi_reasons": "zh"}
OPENSET = "check-openset.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmerClip:
    """`openset` is None where the data has no list of emotion words for the clip."""

    clip_id: str
    language: str
    reason: str
    openset: str | None


def read(folder: Path) -> list[EmerClip]:
    """The clips of an EMER folder, in the order of its table.

    Raises FileNotFoundError without a table, ValueError for one with other columns.
    """
    table = next((folder / name for name in TRUTHS if (folder / name).exists()), None)
    if table is None:
        raise FileNotFoundError(
            f"{folder} has none of {', '.join(TRUTHS)}. docs/evaluation.md shows EMER's layout."
        )
    column = TRUTHS[table.name]
    if table.name == "gt.csv" and "eng_reasons" in _columns(table):
        column = "eng_reasons"
    openset: dict[str, str] = {}
    if (folder / OPENSET).exists():
        openset = dict(_pairs(folder / OPENSET, "name", "openset"))
    return [
        EmerClip(clip_id=name, language=LANGUAGES[column], reason=text, openset=openset.get(name))
        for name, text in _pairs(table, "names", column)
    ]


def row(clip: EmerClip, response: str) -> Row:
    """One line of predictions.jsonl."""
    return {
        "clip_id": clip.clip_id,
        "language": clip.language,
        "response": response,
        "reason": clip.reason,
        "openset": clip.openset,
    }


def score(rows: Sequence[Row], judge: Judge | None) -> dict[str, Any]:
    """All scores that can be computed; "missing" lists the others with reasons.

    Raises ValueError without any row.
    """
    if not rows:
        raise ValueError("There is no EMER prediction to score.")
    empty = [not row["response"].strip() for row in rows]
    scores: dict[str, Any] = {"n": len(rows), "empty": sum(empty), "missing": []}
    said = [reason_of(row["response"]) for row in rows]
    if judge:
        scores["clue_overlap"] = bootstrap.mean_of_known(judge.overlap("clues", _pair(rows, said)))
    truth = _truth(rows, judge)
    words = _extracted(said, judge) if judge else [named_words(text) for text in said]
    scores["words"] = "judge" if judge else "last sentence"
    # None is not "no emotion": nobody read these words, so they say nothing about the model.
    known = [(t, w) for t, w in zip(truth, words, strict=True) if t is not None and w is not None]
    dropped = len(rows) - len(known)
    if judge:
        scores |= _judged_words(known, dropped, judge)
        scores["judge"] = judge.about
    else:
        scores["missing"].append("clue_overlap, label_overlap, sets: need a judge (--judge)")
    if known:
        scores["wheel"] = wheel.score(
            {str(i): t for i, (t, _) in enumerate(known)},
            {str(i): w for i, (_, w) in enumerate(known)},
        )
        scores["wheel"] |= {"floor": wheel.FLOOR, "dropped": dropped}
    elif judge:
        scores["missing"].append("wheel: the judge gave no usable reply about the emotion words")
    else:
        scores["missing"].append(f"wheel: needs {OPENSET}, or a judge to find words in the truth")
    return scores


def _judged_words(
    known: Sequence[tuple[list[str], list[str]]], dropped: int, judge: Judge
) -> dict[str, Any]:
    """Scores of (truth, said) emotion words; of `dropped` more clips the words are not known."""
    named = [(", ".join(t or ["none"]), ", ".join(w or ["none"])) for t, w in known]
    overlap = bootstrap.mean_of_known(judge.overlap("labels", named))
    overlap["unscored"] += dropped
    synonyms = judge.synonyms([sorted({*t, *w}) for t, w in known])
    sets = set_scores([t for t, _ in known], [w for _, w in known], synonyms)
    sets["dropped"] += dropped
    return {"label_overlap": overlap, "sets": sets}


def set_scores(
    truth: Sequence[Sequence[str]],
    said: Sequence[Sequence[str]],
    groups: Sequence[Sequence[Sequence[str]] | None],
) -> dict[str, Any]:
    """Accuracy |G & P| / |P|, recall |G & P| / |G| and their mean, over clips.

    A word stands for the first word of its group, of the last group if it is in several. No word
    said scores 0. Clips without words in the truth, or with words said but without groups, are
    counted as "dropped".
    """
    accuracy, recall = [], []
    for right, claimed, synonyms in zip(truth, said, groups, strict=True):
        if not right or (claimed and synonyms is None):
            continue
        first = {word: group[0] for group in synonyms or [] for word in group}
        g = {first.get(word, word) for word in right}
        p = {first.get(word, word) for word in claimed}
        accuracy.append(len(g & p) / len(p) if p else 0.0)
        recall.append(len(g & p) / len(g) if p else 0.0)
    both = np.array([accuracy, recall])
    return {
        "accuracy": bootstrap.mean(both[0]),
        "recall": bootstrap.mean(both[1]),
        "mean": bootstrap.mean(both.mean(axis=0)),
        "dropped": len(truth) - len(accuracy),
    }


def reason_of(response: str) -> str:
    """The part of an answer that is compared: its reasoning, or all of it without sections."""
    return sed.parse_response(response)["sentiment_analysis"] or response.strip()


def named_words(text: str) -> list[str]:
    """Emotion words of the last sentence, without a language model: words that a wheel may know."""
    sentences = [part for part in re.split(r"[.!?。！？\n]+", text) if part.strip()]
    last = sentences[-1].lower() if sentences else ""
    words = [word for word in re.findall(r"[a-z][a-z-]*", last) if wheel.known(word)]
    if concluded := emotions.last_named(text):
        words.append(concluded)
    return list(dict.fromkeys(words))


def _truth(rows: Sequence[Row], judge: Judge | None) -> list[list[str] | None]:
    """Words of the data where it has them, else of a judge, else None."""
    words: list[list[str] | None] = [
        None if row["openset"] is None else wheel.parse_words(row["openset"]) for row in rows
    ]
    unknown = [i for i, found in enumerate(words) if found is None]
    if judge and unknown:
        extracted = _extracted([rows[i]["reason"] for i in unknown], judge)
        for i, found in zip(unknown, extracted, strict=True):
            words[i] = found
    return words


def _extracted(texts: Sequence[str], judge: Judge) -> list[list[str] | None]:
    answers = judge.emotion_words(texts)
    return [None if text is None else wheel.parse_words(_last_list(text)) for text in answers]


def _last_list(text: str) -> str:
    lists = re.findall(r"\[[^\[\]]*\]", text)
    return lists[-1] if lists else text.strip().splitlines()[-1] if text.strip() else ""


def _pair(rows: Sequence[Row], said: Sequence[str]) -> list[tuple[str, str]]:
    return [(row["reason"], text or "(nothing)") for row, text in zip(rows, said, strict=True)]


def _columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        return next(csv.reader(f), [])


def _pairs(path: Path, key: str, value: str) -> list[tuple[str, str]]:
    if missing := {key, value} - set(_columns(path)):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, only {', '.join(_columns(path))}."
        )
    with path.open(encoding="utf-8-sig", newline="") as f:
        return [(row[key].strip(), (row[value] or "").strip()) for row in csv.DictReader(f)]
