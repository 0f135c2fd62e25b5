"""EmoBench-M (https://arxiv.org/abs/2502.04424): thirteen tasks and their scores.

Scores follow EmoBench-M-eval.py of https://github.com/Emo-gml/EmoBench-M: labels are compared in
lower case without surrounding blanks, and an item whose expected or predicted label is empty is
left out of the official numbers. So an unanswered question costs nothing there; "dropped" counts
these, and "accuracy_of_all" takes them as wrong.

A row, one line of predictions.jsonl or an element of the official result files:

    {"task": "MELD", "video", "expected_value", "predicted_value"}
    {"task": "MC-EIU", "modal_path", "expected_emotion", "expected_intent", "predicted_..." twice}
    {"task": "SMILE", "video", "reference", "prediction"}
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from nltk.translate.bleu_score import sentence_bleu
from rouge_score import rouge_scorer

from saber_jax.data import sed
from saber_jax.evaluation import bootstrap
from saber_jax.evaluation.bootstrap import Score
from saber_jax.evaluation.judge import LAUGHTER, Judge

Row = dict[str, Any]
Kind = Literal["classification", "joint", "generation"]

DIMENSIONS = {
    "FER": "foundational emotion recognition",
    "CEU": "conversational emotion understanding",
    "SCEA": "socially complex emotion analysis",
}

_POLARITY = ("neutral", "negative", "positive")
_TRUTH = ("true", "false")
_SONG = ("neutral", "calm", "happy", "sad", "angry", "fearful")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One data set of the benchmark. `labels` by what is asked: emotion, intent, or the claim."""

    title: str
    dimension: str
    kind: Kind = "classification"
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def _classify(title: str, dimension: str, labels: tuple[str, ...], asked: str = "emotion") -> Task:
    return Task(title=title, dimension=dimension, labels={asked: labels})


TASKS: dict[str, Task] = {
    "RAVDSS-song": _classify("song emotion", "FER", _SONG),
    "RAVDSS-speech": _classify("speech emotion", "FER", (*_SONG, "surprised", "disgust")),
    "MOSI": _classify("opinion sentiment", "FER", _POLARITY),
    "MOSEI": _classify("emotion intensity", "FER", _POLARITY),
    "FGMSA": _classify(
        "stock comment emotion",
        "FER",
        ("weak negative", "strong negative", "neutral", "strong positive", "weak positive"),
    ),
    "mer2023": _classify(
        "fine-grained dialogue emotion",
        "CEU",
        ("happy", "sad", "neutral", "angry", "worried", "surprise"),
    ),
    "SIMS": _classify("presentation emotion", "CEU", _POLARITY),
    "ch-simsv2s": _classify("face-centric dialogue emotion", "CEU", _POLARITY),
    "MC-EIU": Task(
        title="conversational emotion and intent",
        dimension="CEU",
        kind="joint",
        labels={
            "emotion": ("happy", "surprise", "sad", "disgust", "anger", "fear", "neutral"),
            "intent": (
                *("questioning", "agreeing", "acknowledging", "encouraging"),
                *("consoling", "suggesting", "wishing", "neutral"),
            ),
        },
    ),
    "MELD": _classify(
        "multi-party dialogue emotion",
        "CEU",
        ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    ),
    "funny": _classify("humour", "SCEA", _TRUTH, "humour"),
    "MUSTARD": _classify("sarcasm", "SCEA", _TRUTH, "sarcasm"),
    "SMILE": Task(title="reason of laughter", dimension="SCEA", kind="generation"),
}
"""By the names that the official scripts give the data sets."""

LAUGHED = "The audience laughed because "


def question(name: str, spoken: str) -> str:
    """What a model is asked about a clip in which `spoken` is said.

    In our words; an item that brings its own instruction is asked with that instead.
    """
    task = TASKS[name]
    said = f'In the video someone says: "{spoken}". ' if spoken else ""
    if task.kind == "generation":
        return (
            f"{said}Explain in at most 40 words why the audience laughed. Begin with "
            f'"{LAUGHED.strip()}".'
        )
    if task.kind == "joint":
        lists = " ".join(
            f"The {asked} is one of: {', '.join(labels)}." for asked, labels in task.labels.items()
        )
        form = "{'emotion label': 'label', 'intent label': 'label'}"
        return f"{said}Which emotion is expressed, and with which intent? {lists} Answer as {form}."
    ((asked, labels),) = task.labels.items()
    what = "Which emotion is expressed?" if asked == "emotion" else f"Is this {asked}?"
    return (
        f"{said}{what} Choose one of: {', '.join(labels)}. Answer with nothing but "
        f"{{'{asked}': 'label'}}."
    )


def answered(name: str, response: str) -> Row:
    """The predicted_... or prediction entries of a row, read from a model's answer.

    A label is what stands in the answer's {'emotion': 'label'}, whatever it is; without that, the
    only label of the task that the answer (or its reasoning, if it has sections) mentions. Else "".
    """
    task = TASKS[name]
    if task.kind == "generation":
        return {"prediction": response.strip()}
    found = {asked: _label(asked, labels, response) for asked, labels in task.labels.items()}
    if task.kind == "joint":
        return {f"predicted_{asked}": label for asked, label in found.items()}
    return {"predicted_value": next(iter(found.values()))}


def _label(asked: str, labels: Sequence[str], response: str) -> str:
    text = sed.parse_response(response)["sentiment_analysis"] or response
    key = rf"""['"](?:{asked}(?: label)?|label|answer)['"]\s*:\s*['"]?([^'"{{}},]*)"""
    if match := re.search(key, text, re.IGNORECASE):
        return match[1].strip()
    rest, mentioned = text.lower(), []
    # Longest first, so that "weak negative" is not taken for "negative".
    for label in sorted(labels, key=len, reverse=True):
        rest, count = re.subn(rf"(?<![a-z]){re.escape(label)}(?![a-z])", " ", rest)
        mentioned += [label] * bool(count)
    return mentioned[0] if len(mentioned) == 1 else ""


def score(rows: Sequence[Row], judge: Judge | None) -> dict[str, Any]:
    """Scores by task, the mean accuracy by dimension, and the mean of the three dimensions.

    The mean of a dimension is over its tasks with labels: how the reasons of laughter enter it is
    not published. Raises ValueError for a task that does not exist or without any row.
    """
    if not rows:
        raise ValueError("There is no EmoBench-M prediction to score.")
    if unknown := {row["task"] for row in rows} - set(TASKS):
        raise ValueError(
            f"EmoBench-M has no task {sorted(unknown)}; its tasks: {', '.join(TASKS)}."
        )
    scores: dict[str, Any] = {"n": len(rows), "missing": [], "tasks": {}}
    for name, task in TASKS.items():
        own = [row for row in rows if row["task"] == name]
        if not own:
            scores["missing"].append(f"{name}: no predictions for it")
        elif task.kind == "generation":
            scores["tasks"][name] = generation(own)
            scores["missing"].append(f"{name}, BERTScore: its model is not part of this package")
            if judge:
                scores["tasks"][name] |= laughter(own, judge)
                scores["judge"] = judge.about
            else:
                scores["missing"].append(f"{name}, judged 0 to 10: needs a judge (--judge)")
        else:
            scores["tasks"][name] = classification(own, joint=task.kind == "joint")
    scores["dimensions"] = _dimensions(scores["tasks"])
    means = [d["value"] for d in scores["dimensions"].values()]
    whole = len(means) == len(DIMENSIONS)
    scores["average"] = {"value": float(np.mean(means)) if whole else None, "interval": None}
    return scores


def classification(rows: Sequence[Row], *, joint: bool = False) -> dict[str, Any]:
    """Accuracy and weighted precision, recall and F1 of the rows that have both labels."""
    names = ("emotion", "intent") if joint else ("value",)
    sides = [
        [[str(row.get(f"{side}_{name}") or "").strip().lower() for name in names] for row in rows]
        for side in ("expected", "predicted")
    ]
    pairs = [
        ("_".join(truth), "_".join(said))
        for truth, said in zip(*sides, strict=True)
        if all(truth) and all(said)
    ]
    asked = sum(all(truth) for truth in sides[0])
    classes = sorted({label for pair in pairs for label in pair})
    counts = np.zeros((len(classes), len(classes)), int)
    for truth, said in pairs:
        counts[classes.index(truth), classes.index(said)] += 1
    right = np.zeros(asked, bool)
    right[: int(counts.trace())] = True
    return {
        "accuracy": bootstrap.of_groups(counts, accuracy),
        "precision": bootstrap.of_groups(counts, lambda c: weighted(c)[0]),
        "recall": bootstrap.of_groups(counts, lambda c: weighted(c)[1]),
        "f1": bootstrap.of_groups(counts, lambda c: weighted(c)[2]),
        "accuracy_of_all": bootstrap.mean(right),
        "dropped": len(rows) - len(pairs),
        "confusion": {"truth": classes, "said": classes, "counts": counts.tolist()},
    }


def accuracy(counts: Float[np.ndarray, "R K K"]) -> Float[np.ndarray, "R"]:
    return np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))


def weighted(counts: Float[np.ndarray, "R K K"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision, recall, F1) of confusion matrices [truth, said], classes weighted by their truth.

    A class that is never said has precision 0, as scikit-learn's zero_division=0 has it.
    """
    hits = np.diagonal(counts, axis1=1, axis2=2)
    truth, said = counts.sum(axis=2), counts.sum(axis=1)
    precision = np.divide(hits, said, out=np.zeros_like(hits), where=said > 0)
    recall = np.divide(hits, truth, out=np.zeros_like(hits), where=truth > 0)
    f1 = 2 * hits / np.maximum(truth + said, 1)
    share = truth / truth.sum(axis=1, keepdims=True)
    return tuple((share * each).sum(axis=1) for each in (precision, recall, f1))


def generation(rows: Sequence[Row]) -> dict[str, Any]:
    """BLEU-4 without smoothing and ROUGE-L F with stems, means over the rows with both texts."""
    texts = [(str(row.get("reference") or ""), str(row.get("prediction") or "")) for row in rows]
    texts = [(ref.strip(), said.strip()) for ref, said in texts if ref.strip() and said.strip()]
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # No common 4-gram is a score of 0, not a problem.
        bleu = [sentence_bleu([ref.split()], said.split()) for ref, said in texts]
    rouge_l = [rouge.score(ref, said)["rougeL"].fmeasure for ref, said in texts]
    return {
        "bleu": bootstrap.mean(np.array(bleu, float)),
        "rouge_l": bootstrap.mean(np.array(rouge_l, float)),
        "dropped": len(rows) - len(texts),
    }


def laughter(rows: Sequence[Row], judge: Judge) -> dict[str, Score]:
    """A judge's 0..5 in two dimensions and their sum, over all rows."""
    pairs = [(str(row.get("reference") or ""), str(row.get("prediction") or "")) for row in rows]
    judged = judge.laughter(pairs)
    columns = {
        name: np.array([j[dimension] for j in judged], float)
        for name, dimension in zip(("logic", "association"), LAUGHTER, strict=True)
    }
    columns["total"] = sum(columns.values(), np.zeros(len(rows)))
    return {f"judge_{name}": bootstrap.mean(values) for name, values in columns.items()}


def _dimensions(tasks: Mapping[str, Any]) -> dict[str, Any]:
    means = {}
    for dimension in DIMENSIONS:
        values = [
            tasks[name]["accuracy"]["value"]
            for name, task in TASKS.items()
            if task.dimension == dimension and name in tasks and "accuracy" in tasks[name]
        ]
        values = [value for value in values if value is not None]
        if values:
            means[dimension] = {"tasks": len(values), "value": float(np.mean(values))}
    return means
