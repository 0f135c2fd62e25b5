"""Scores on clips whose modalities agree, and on clips where they do not.

A prediction is one line of predictions.jsonl, see `saber_jax.evaluation.run`:

    {"clip_id", "language", "response", "conclusion", "labels": {...}, "annotation": {...}}

An answer that names no emotion counts as wrong; nothing is dropped.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from saber_jax.data import sed
from saber_jax.data.records import FIELDS

RESAMPLES = 2000
SEED = 0

Prediction = dict[str, Any]


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """All scores, as JSON values. Rates are fractions; intervals are 95 % bootstrap percentiles.

    Raises ValueError if there is no prediction, or a clip without the labels that decide.
    """
    _check(predictions)
    agreeing = [p for p in predictions if is_consistent(p["labels"])]
    differing = [p for p in predictions if not is_consistent(p["labels"])]
    types = sorted({p["labels"].get("conflict_type", "unlabelled") for p in differing})
    return {
        "n": len(predictions),
        "unparsable": sum(not is_complete(p["response"]) for p in predictions),
        "accuracy": rate(_correct(predictions)),
        "consistent": {"accuracy": rate(_correct(agreeing))},
        "inconsistent": {
            "accuracy": rate(_correct(differing)),
            "dominance": rate(_follows(differing, "face") | _follows(differing, "voice")),
            "follows_face": rate(_follows(differing, "face")),
            "follows_voice": rate(_follows(differing, "voice")),
        },
        "gap": gap(_correct(agreeing), _correct(differing)),
        "conflict_types": {
            name: rate(_correct([p for p in differing if _conflict_type(p) == name]))
            for name in types
        },
        "speech": {
            "word_error_rate": _speech(predictions, "en", words),
            "character_error_rate": _speech(predictions, "zh", characters),
        },
    }


def is_consistent(labels: dict[str, str]) -> bool:
    """By conflict_type where given, else by whether face and voice agree."""
    if "conflict_type" in labels:
        return labels["conflict_type"] == "none"
    return labels["face"] == labels["voice"]


def is_complete(response: str) -> bool:
    """Whether all six sections are there; one may be empty, as for a clip without speech."""
    return all(sed.heading(field) in response for field in FIELDS)


def rate(hits: Bool[np.ndarray, "n"]) -> dict[str, Any]:
    """{"n", "value", "interval"}; value and interval are None when there is nothing to count."""
    if not len(hits):
        return {"n": 0, "value": None, "interval": None}
    return {
        "n": len(hits),
        "value": float(hits.mean()),
        "interval": _interval(_resampled(hits, np.random.default_rng(SEED))),
    }


def gap(agreeing: Bool[np.ndarray, "n"], differing: Bool[np.ndarray, "m"]) -> dict[str, Any]:
    """How much accuracy is lost when modalities disagree."""
    if not len(agreeing) or not len(differing):
        return {"value": None, "interval": None}
    rng = np.random.default_rng(SEED)
    lost = _resampled(agreeing, rng) - _resampled(differing, rng)
    return {"value": float(agreeing.mean() - differing.mean()), "interval": _interval(lost)}


def paired_gain(before: Bool[np.ndarray, "n"], after: Bool[np.ndarray, "n"]) -> dict[str, Any]:
    """What a second model gains over a first one on the same clips, in the same order."""
    if not len(before):
        return {"n": 0, "value": None, "interval": None}
    difference = after.astype(np.float64) - before
    return {
        "n": len(difference),
        "value": float(difference.mean()),
        "interval": _interval(_resampled(difference, np.random.default_rng(SEED))),
    }


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            substituted = previous[j - 1] + (x != y)
            current.append(min(previous[j] + 1, current[j - 1] + 1, substituted))
        previous = current
    return previous[-1]


def words(text: str) -> list[str]:
    """Lower-case words; punctuation and sound events such as <laughter> do not count."""
    return _spoken(text).split()


def characters(text: str) -> list[str]:
    """Characters without spaces, punctuation and sound events."""
    return list("".join(_spoken(text).split()))


def _spoken(text: str) -> str:
    text = re.sub(r"<[^<>]*>", " ", unicodedata.normalize("NFKC", text).lower())
    # An apostrophe is part of its word; every other mark separates words.
    text = re.sub("['\\u2019]", "", text)
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)


def _speech(
    predictions: Sequence[Prediction], language: str, units: Callable[[str], list[str]]
) -> dict[str, Any]:
    """Edits per reference unit over all clips of a language that have speech."""
    edits = total = clips = 0
    for p in predictions:
        reference = units(p["annotation"]["speech_content"])
        if p["language"] != language or not reference:
            continue
        said = units(sed.parse_response(p["response"])["speech_content"])
        edits, total, clips = (
            edits + edit_distance(reference, said),
            total + len(reference),
            clips + 1,
        )
    return {"n": clips, "units": total, "value": edits / total if total else None}


def _conflict_type(prediction: Prediction) -> str:
    return prediction["labels"].get("conflict_type", "unlabelled")


def _correct(predictions: Sequence[Prediction]) -> Bool[np.ndarray, "n"]:
    return _follows(predictions, "emotion")


def _follows(predictions: Sequence[Prediction], label: str) -> Bool[np.ndarray, "n"]:
    return np.array([p["conclusion"] == p["labels"].get(label, "") for p in predictions], bool)


def _resampled(values: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "resamples"]:
    """Means of bootstrap resamples."""
    picks = rng.integers(0, len(values), (RESAMPLES, len(values)))
    return values[picks].mean(axis=1)


def _interval(means: Float[np.ndarray, "resamples"]) -> list[float]:
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def _check(predictions: Sequence[Prediction]) -> None:
    if not predictions:
        raise ValueError("There is no prediction to score. Is the split empty?")
    for p in predictions:
        labels = p["labels"]
        if "emotion" not in labels or not (
            {"conflict_type"} & set(labels) or {"face", "voice"} <= set(labels)
        ):
            raise ValueError(
                f"Clip {p['clip_id']} has labels {sorted(labels)}; scoring needs emotion, and "
                "conflict_type or both face and voice. Add them to labels.jsonl and build again."
            )
