"""The scores of EmoBench-M, by the rules of EmoBench-M-eval.py.

https://github.com/Emo-gml/EmoBench-M compares labels in lower case without surrounding blanks and
leaves out an item whose expected or predicted label is empty. So an unanswered question costs
nothing there; "dropped" counts these, and "accuracy_of_all" takes them as wrong.

Axis letters: R resamples   K classes.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from saber_jax.evaluation import bootstrap
from saber_jax.evaluation.bootstrap import Score
from saber_jax.evaluation.emobench_m import DIMENSIONS, TASKS, Row
from saber_jax.evaluation.judge import LAUGHTER, Judge


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
    # Both bring scipy, pandas and scikit-learn, and --help would wait three seconds for them.
    from nltk.translate.bleu_score import sentence_bleu
    from rouge_score import rouge_scorer

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
    """A judge's 0..5 in two dimensions, and their sum, over the rows on which it replied."""
    pairs = [(str(row.get("reference") or ""), str(row.get("prediction") or "")) for row in rows]
    judged = judge.laughter(pairs)
    columns: dict[str, list[int | None]] = {
        name: [scores[dimension] for scores in judged]
        for name, dimension in zip(("logic", "association"), LAUGHTER, strict=True)
    }
    columns["total"] = [
        None if logic is None or association is None else logic + association
        for logic, association in zip(*columns.values(), strict=True)
    ]
    return {f"judge_{name}": bootstrap.mean_of_known(values) for name, values in columns.items()}


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
