"""Pairs from sampled answers of the model: the best against the worst, as in the paper.

For each clip K answers are sampled from the SED model and scored (score.py). The best is chosen
over the worst if their scores differ by a margin. Only conflicting or ambiguous clips give pairs:
those with a kappa above 0 or, without that label, those whose K conclusions are not all the same.

All answers and scores are kept, so another margin, or more pairs per clip, needs no new answers.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_prep.preferences import summary
from data_prep.preferences.rounds import JobBatch, Line, Records, work_through
from data_prep.preferences.score import Scorer, well_formed
from saber_jax.data import emotions, sed, texts
from saber_jax.data.conflicts import NO_CONFLICT
from saber_jax.data.records import Record
from saber_jax.runs import shares
from saber_jax.runs.journal import Journal

NAME = "answers.jsonl"
"""File with all answers to every clip and their scores, one clip per line."""

KEPT = "kept"
REASONS = {
    KEPT: "the best and the worst answer differ by the margin",
    "no_annotation": "the record has no annotated sections to score against; nothing was generated",
    "no_conflict": "its label says that the modalities agree; nothing was generated",
    "unparsable": "fewer than two answers can be used; see answers_unparsable_by_reason",
    "unscored": "fewer than two of those have both scores",
    "no_spread": "no label, and all answers conclude the same: not ambiguous",
    "tie": "the best and the worst answer have the same score",
    "below_margin": "the best and the worst answer differ by less than the margin",
}

UNPARSABLE = {
    "empty": "no text",
    "special_token": "it contains a token of the chat template",
    "sections": "at least one of the six headings is missing, as in an answer that was cut off",
    "no_emotion": "its reasoning names no emotion",
}
"""Why an answer takes no part in any pair."""

DrawAnswers = Callable[[Iterator[tuple[int, list[Record]]]], Iterator[list[list[str]]]]
"""Maps batches of (index of the first record, records) to the answers to each record."""


def settled(record: Record, *, all_clips: bool) -> str | None:
    """Why no answers are drawn for this clip, or None."""
    if not any(record.annotation.values()):
        return "no_annotation"
    kappa, kind = record.labels.get("kappa"), record.labels.get("conflict_type")
    agrees = float(kappa) <= 0 if kappa else kind == NO_CONFLICT
    return "no_conflict" if agrees and not all_clips else None


def mine(
    records: Records,
    draw: DrawAnswers,
    scorer: Scorer,
    journal: Journal,
    *,
    batch_size: int,
    concurrency: int = 1,
    all_clips: bool = False,
    share: shares.Share | None = None,
) -> list[Line]:
    """A line for every record; see rounds.work_through. `concurrency` answers are scored at once.

    First come the clips that need no answers, then the others.
    """
    quick: list[Line] = []
    jobs: list[int] = []
    for index in range(len(records)):
        record = records.outline(index)
        if why := settled(record, all_clips=all_clips):
            quick.append(_line(record) | {"why": why, "answers": []})
        else:
            jobs.append(index)

    def ask(batches: Iterator[JobBatch[int]]) -> Iterator[list[Line]]:
        ahead: collections.deque[list[Record]] = collections.deque()

        def asked() -> Iterator[tuple[int, list[Record]]]:
            for first, part in batches:
                ahead.append([records[index] for index in part])
                yield first, ahead[-1]

        with ThreadPoolExecutor(concurrency) as pool:
            for drawn in draw(asked()):
                part = ahead.popleft()
                given = [(r, text) for r, texts in zip(part, drawn, strict=True) for text in texts]
                scored = pool.map(lambda one: _answer(scorer, *one), given)
                yield [
                    _line(record) | {"why": None, "answers": [next(scored) for _ in texts]}
                    for record, texts in zip(part, drawn, strict=True)
                ]

    return work_through(quick, jobs, ask, journal, batch_size=batch_size, unit="clip", share=share)


def _line(record: Record) -> Line:
    kappa = record.labels.get("kappa")
    return {
        "clip_id": record.clip_id,
        "language": record.language,
        "conflict_type": record.labels.get("conflict_type"),
        "kappa": float(kappa) if kappa else None,
        "emotion": emotions.canonical_labels(record.labels).get("emotion"),
    }


def _answer(scorer: Scorer, record: Record, text: str) -> dict[str, Any]:
    """One answer with its scores, as written to a line; unparsable answers are not scored."""
    labels = emotions.in_labels([record.labels])
    concluded = None if unparsable(text, labels) else sed.conclusion(text, labels)
    about = {"text": text, "conclusion": concluded, "consistency": None, "alignment": None}
    if concluded is None:
        return about | {"score": None}
    scores = scorer(record, text)
    about |= {"consistency": scores.consistency, "alignment": scores.alignment}
    return about | {"score": scores.total}


def unparsable(text: str, labels: Sequence[str] = ()) -> str | None:
    """Why no pair can have this answer, a key of UNPARSABLE; None if one can. `labels` are emotions
    that it may conclude besides those of `emotions`."""
    if not text.strip():
        return "empty"
    if texts.fault(text):
        return "special_token"
    if not well_formed(text):
        return "sections"
    return "no_emotion" if sed.conclusion(text, labels) is None else None


def spread(line: Line) -> float | None:
    """The share of a clip's conclusions that differ from the most common one. None without any."""
    concluded = [a["conclusion"] for a in line["answers"] if a["conclusion"] is not None]
    if not concluded:
        return None
    return 1 - collections.Counter(concluded).most_common(1)[0][1] / len(concluded)


def pairs_of(
    line: Line, *, margin: float, most: int, all_clips: bool
) -> tuple[str, list[dict[str, Any]]]:
    """The outcome of a clip, a key of REASONS, and at most `most` lines for pairs.jsonl.

    The best answer is paired with the worst, the second best with the second worst, and so on, as
    long as they differ by `margin`. Of answers with equal scores the earlier counts as better.
    """
    if line["why"]:
        return line["why"], []
    parsed = [a for a in line["answers"] if a["conclusion"] is not None]
    if len(parsed) < 2:
        return "unparsable", []
    scored = [a for a in parsed if a["score"] is not None]
    if len(scored) < 2:
        return "unscored", []
    torn = spread(line)
    if line["kappa"] is None and line["conflict_type"] is None and not torn and not all_clips:
        return "no_spread", []
    ranked = sorted(scored, key=lambda answer: -answer["score"])
    couples = [(ranked[i], ranked[-1 - i]) for i in range(len(ranked) // 2)][:most]
    best, worst = couples[0]
    if best["score"] == worst["score"]:
        return "tie", []
    kept = [(a, b) for a, b in couples if a["score"] - b["score"] >= margin and a is not b]
    kept = [(a, b) for a, b in kept if a["score"] > b["score"] and a["text"] != b["text"]]
    pairs = [_pair(line, torn, chosen, rejected) for chosen, rejected in kept]
    return (KEPT, pairs) if pairs else ("below_margin", [])


def _pair(
    line: Line, torn: float | None, chosen: Mapping[str, Any], rejected: Mapping[str, Any]
) -> dict[str, Any]:
    kappa = torn if line["kappa"] is None else line["kappa"]
    return {
        "clip_id": line["clip_id"],
        "language": line["language"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "conclusion": chosen["conclusion"],
        "rejected_conclusion": rejected["conclusion"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "conflict_type": line["conflict_type"],
        "kappa": None if kappa is None else round(kappa, 4),
    }


def summarise(
    lines: Sequence[Line], *, margin: float, most: int, all_clips: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The contents of summary.json and pairs.jsonl.

    `agrees_with_label` is the share of chosen, of rejected and of all answers whose conclusion is
    the clip's label. Scoring does not use the label, so this shows how reliable the scores are.
    """
    outcomes = [pairs_of(line, margin=margin, most=most, all_clips=all_clips) for line in lines]
    pairs = [pair for _, found in outcomes for pair in found]
    labels = {line["clip_id"]: line["emotion"] for line in lines if line["emotion"]}
    answers = [(line, answer) for line in lines for answer in line["answers"]]
    labelled = [pair for pair in pairs if pair["clip_id"] in labels]

    def right(key: str) -> float | None:
        return _share(pair[key] == labels[pair["clip_id"]] for pair in labelled)

    drawn = [a["conclusion"] == line["emotion"] for line, a in answers if line["emotion"]]
    return (
        summary.of_pairs(pairs)
        | {
            "answers": len(answers),
            "answers_unparsable": sum(a["conclusion"] is None for _, a in answers),
            "answers_unparsable_by_reason": summary.ordered(
                collections.Counter(
                    unparsable(a["text"]) or "no_emotion"
                    for _, a in answers
                    if a["conclusion"] is None
                ),
                UNPARSABLE,
            ),
            "answers_unscored": sum(
                a["conclusion"] is not None and a["score"] is None for _, a in answers
            ),
            "mean_score": {
                name: _mean([a[name] for _, a in answers if a[name] is not None])
                for name in ("consistency", "alignment", "score")
            },
            "decisions": summary.ordered(collections.Counter(why for why, _ in outcomes), REASONS),
            "agrees_with_label": {
                "chosen": right("conclusion"),
                "rejected": right("rejected_conclusion"),
                "answers": _share(drawn),
            },
        },
        pairs,
    )


def _share(found: Any) -> float | None:
    return _mean([float(one) for one in found])


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
