"""SABER-Test: scores on clips whose modalities agree, on clips where they do not, and the gap.

A prediction is one line of predictions.jsonl, see `saber_jax.evaluation.run`:

    {"clip_id", "language", "response", "conclusion", "labels": {...}, "annotation": {...}}

An answer that names no emotion counts as wrong; nothing is dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from saber_jax.data import sed, speech
from saber_jax.data.conflicts import NO_CONFLICT
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import bootstrap

Prediction = dict[str, Any]
Ratings = Sequence[Mapping[str, float | None]]
"""Per prediction, a judge's 1..5 for each of FIELDS; None where it gave none."""

SPLITS = {"consistent": True, "inconsistent": False}
SPEECH = {"word_error_rate": "en", "character_error_rate": "zh"}
MODALITIES = ("face", "voice", "words")
VALENCE = {"positive": ("happy",), "negative": ("sad", "angry"), "neutral": ("neutral",)}
"""What words suggest of which a corpus gives the valence alone: its plain emotions of that sign."""


def score(predictions: Sequence[Prediction], ratings: Ratings | None = None) -> dict[str, Any]:
    """All scores, as JSON values: rates are fractions, ratings 1..5, intervals 95 %.

    Raises ValueError if there is no prediction, or a clip without the labels that decide.
    """
    _check(predictions)
    agrees = np.array([is_consistent(p["labels"]) for p in predictions])
    scores: dict[str, Any] = {
        "n": len(predictions),
        "unparsable": sum(not is_complete(p["response"]) for p in predictions),
        "accuracy": bootstrap.mean(correct(predictions)),
    }
    for name, wanted in SPLITS.items():
        which = agrees == wanted
        scores[name] = _split(_those(predictions, which), ratings and _those(ratings, which))
    differing = _those(predictions, ~agrees)
    scores["inconsistent"] |= dominance(differing)
    scores["gap"] = _gap(predictions, ratings, agrees)
    types = sorted({conflict_type(p) for p in differing})
    scores["conflict_types"] = {
        name: bootstrap.mean(correct([p for p in differing if conflict_type(p) == name]))
        for name in types
    }
    scores["confusion"] = confusion(predictions)
    return scores


def is_consistent(labels: Mapping[str, str]) -> bool:
    """By conflict_type where given, else by whether face, voice and the words, if they are
    labelled, suggest one emotion."""
    if "conflict_type" in labels:
        return labels["conflict_type"] == NO_CONFLICT
    face, words = labels["face"], labels.get("words")
    return face == labels["voice"] and (not words or face in _suggested(words))


def is_complete(response: str) -> bool:
    """Whether all six sections are there; one may be empty, as for a clip without speech."""
    return all(sed.heading(field) in response for field in FIELDS)


def conflict_type(prediction: Prediction) -> str:
    return prediction["labels"].get("conflict_type", "unlabelled")


def correct(predictions: Sequence[Prediction]) -> Bool[np.ndarray, "n"]:
    return np.array([p["conclusion"] == p["labels"]["emotion"] for p in predictions], bool)


def follows(predictions: Sequence[Prediction], *modalities: str) -> Bool[np.ndarray, "n"]:
    """Whether each conclusion is wrong, and what one of these modalities suggests by itself."""
    return np.array(
        [
            any(misled(p["conclusion"], p["labels"], modality) for modality in modalities)
            for p in predictions
        ],
        bool,
    )


def misled(conclusion: str | None, labels: Mapping[str, str], modality: str) -> bool:
    """Whether a conclusion is wrong and follows `modality`, one of MODALITIES."""
    return conclusion != labels["emotion"] and conclusion in _suggested(labels.get(modality, ""))


def _suggested(label: str) -> tuple[str, ...]:
    """The emotions that a modality with this label suggests by itself."""
    return VALENCE.get(label, (label,))


def dominance(differing: Sequence[Prediction]) -> dict[str, Any]:
    """How often one modality decides where they disagree: any of them, and each that is known.

    Two modalities may suggest the same, so the single shares may add up to more than the whole.
    """
    known = [m for m in MODALITIES if any(p["labels"].get(m) for p in differing)]
    return {"dominance": bootstrap.mean(follows(differing, *MODALITIES))} | {
        f"follows_{modality}": bootstrap.mean(follows(differing, modality)) for modality in known
    }


def confusion(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """{"truth": [...], "said": [...], "counts": rows of truth}; said ends with "none named"."""
    truth = sorted({p["labels"]["emotion"] for p in predictions})
    others = {p["conclusion"] for p in predictions if p["conclusion"]} - set(truth)
    said = [*truth, *sorted(others), None]
    counts = np.zeros((len(truth), len(said)), int)
    for p in predictions:
        counts[truth.index(p["labels"]["emotion"]), said.index(p["conclusion"] or None)] += 1
    return {"truth": truth, "said": [*said[:-1], "none named"], "counts": counts.tolist()}


def _split(predictions: Sequence[Prediction], ratings: Ratings | None) -> dict[str, Any]:
    scores: dict[str, Any] = {"accuracy": bootstrap.mean(correct(predictions))}
    for name, language in SPEECH.items():
        edits, units = _speech(predictions, language).T
        scores[name] = bootstrap.ratio(edits, units) | {"units": int(units.sum())}
    if ratings is not None:
        scores["judge"] = {field: bootstrap.mean(_rated(ratings, field)) for field in FIELDS}
        scores["judge"]["mean"] = bootstrap.mean(_mean_rating(ratings))
    return scores


def _gap(
    predictions: Sequence[Prediction], ratings: Ratings | None, agrees: Bool[np.ndarray, "n"]
) -> dict[str, Any]:
    """Every score of both splits, consistent minus inconsistent."""
    groups = [_those(predictions, agrees), _those(predictions, ~agrees)]
    gaps: dict[str, Any] = {"accuracy": bootstrap.mean_gap(*map(correct, groups))}
    for name, language in SPEECH.items():
        gaps[name] = bootstrap.ratio_gap(*(_speech(group, language) for group in groups))
    if ratings is not None:
        rated = [_those(ratings, agrees), _those(ratings, ~agrees)]
        gaps["judge"] = {
            field: bootstrap.mean_gap(*(_rated(group, field) for group in rated))
            for field in FIELDS
        }
        gaps["judge"]["mean"] = bootstrap.mean_gap(*map(_mean_rating, rated))
    return gaps


def _those(items: Sequence[Any], which: Bool[np.ndarray, "n"]) -> list[Any]:
    return [item for item, chosen in zip(items, which, strict=True) if chosen]


def _rated(ratings: Ratings, field: str) -> np.ndarray:
    return np.array([r[field] for r in ratings if r[field] is not None], float)


def _mean_rating(ratings: Ratings) -> np.ndarray:
    """Over the six sections of the answers in which all were rated."""
    rows = [[rating for rating in r.values() if rating is not None] for r in ratings]
    return np.array([np.mean(row) for row in rows if len(row) == len(FIELDS)], float)


def _speech(predictions: Sequence[Prediction], language: str) -> Int[np.ndarray, "n 2"]:
    """(edits, units) of every clip of a language that has speech."""
    counts = []
    for p in predictions:
        if p["language"] == language:
            said = sed.parse_response(p["response"])["speech_content"]
            counts.append(speech.errors(p["annotation"]["speech_content"], said, language))
    return np.array([c for c in counts if c[1]], int).reshape(-1, 2)


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
