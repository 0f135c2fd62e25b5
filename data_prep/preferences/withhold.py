"""Pairs from the model's answers with one modality withheld.

Chosen is the record's own six-section target. Rejected is the model's answer with one modality
withheld, if it is well formed but concludes what the remaining modality alone suggests. Such an
answer shows the error of letting one modality dominate, as the model itself makes it. This method
is ours; the paper's is in sample.py.

All of these clips are in conflict. A model trained on nothing else learns to conclude a conflict
wherever it is asked. With `all_clips` there are pairs of the opposite kind too. Of a clip whose
remaining modality suggests the right conclusion, the other modality is replaced by that of a
conflicting clip in the same language with another conclusion. The answer is rejected if it is
wrong: as a rule it then describes a conflict that is not in the clip. The clip is a conflicting one
because the voice and the words of such a sound may disagree too.

The kappa of a pair (how strongly the modalities disagree) is the record's label. Without a label it
is 1 if the model's conclusions from the picture alone and from the sound alone differ, else 0.
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data_prep.preferences import summary
from data_prep.preferences.rounds import JobBatch, Records, work_through
from data_prep.preferences.score import well_formed
from saber_jax.data import emotions, sed, texts
from saber_jax.data.records import Record
from saber_jax.data.withhold import MODALITIES, Modality, has_modality, replace, withhold
from saber_jax.runs import shares
from saber_jax.runs.journal import Journal

NAME = "decisions.jsonl"
"""File with every answer and the decision about it, one per line."""

# The label that says what the modality still present suggests.
SEEN: dict[Modality, str] = {"audio": "face", "video": "voice"}

KEPT = "kept"
KEPT_INVENTED = "kept_invented"
KEPT_WITHOUT_LABELS = "kept_without_labels"
REASONS = {
    KEPT: "concludes what the remaining modality suggests, and the record does not",
    KEPT_INVENTED: "follows another clip's sound or picture, which is not in the clip",
    KEPT_WITHOUT_LABELS: "concludes something else; no label says what the modality suggests",
    "no_conflict": "the remaining modality suggests the right conclusion; nothing was generated",
    "no_other_clip": "the same, and no conflicting clip could stand in; nothing was generated",
    "nothing_to_withhold": "the record lacks that modality; nothing was generated",
    "no_target": "the record itself names no emotion; nothing was generated",
    "unparsable": "one of the six sections is missing, or the answer contains a special token",
    "no_conclusion": "the reasoning names no known emotion",
    "same_conclusion": "right although the modality was withheld",
    "other_conclusion": "wrong, but not what the remaining modality suggests",
}

PAIR_KEYS = (
    "clip_id",
    "language",
    "chosen",
    "rejected",
    "withheld",
    "conclusion",
    "rejected_conclusion",
    "conflict_type",
    "kappa",
)

Decision = dict[str, Any]


def settled(record: Record, withheld: Modality) -> str | None:
    """Why no answer is needed, or None: then `judge` decides."""
    target = _target(record)
    if not has_modality(record, withheld):
        return "nothing_to_withhold"
    if target is None:
        return "no_target"
    return "no_conflict" if _suggested(record, withheld) == target else None


def judge(record: Record, withheld: Modality, answer: str) -> str:
    """The decision about an answer given without one modality: a key of REASONS."""
    if texts.fault(answer) or not well_formed(answer):
        return "unparsable"
    concluded, right = _concluded(record, answer), _target(record)
    if concluded is None:
        return "no_conclusion"
    if concluded == right:
        return "same_conclusion"
    suggested = _suggested(record, withheld)
    if suggested is None:
        return KEPT_WITHOUT_LABELS
    if suggested == right:
        return KEPT_INVENTED
    return KEPT if concluded == suggested else "other_conclusion"


def decision(
    record: Record, withheld: Modality, why: str, answer: str | None, other: str | None = None
) -> Decision:
    """One line of decisions.jsonl; kappa and conflict_type are null where no label gives them.

    `other` is the id of the clip whose modality took the place of the withheld one.
    """
    kept = why in (KEPT, KEPT_INVENTED, KEPT_WITHOUT_LABELS)
    kappa = record.labels.get("kappa")
    return {
        "clip_id": record.clip_id,
        "language": record.language,
        "withheld": withheld,
        "replaced_by": other,
        "why": why,
        "conclusion": _target(record),
        "rejected_conclusion": None if answer is None else _concluded(record, answer),
        "suggested": _suggested(record, withheld),
        "conflict_type": record.labels.get("conflict_type"),
        "kappa": None if kappa is None else float(kappa),
        "chosen": sed.target_text(record.annotation) if kept else None,
        "rejected": answer,
    }


@dataclasses.dataclass(frozen=True)
class Job:
    """Indices of the record and, if its modality is to be replaced, of the record that gives it."""

    record: int
    withheld: Modality
    other: int | None


def mine(
    records: Records,
    respond: Callable[[Iterator[list[Record]]], Iterator[list[str]]],
    journal: Journal,
    *,
    batch_size: int,
    all_clips: bool = False,
    share: shares.Share | None = None,
) -> list[Decision]:
    """Decides about every record and modality; see rounds.work_through.

    First come the decisions that need no answer, then the others. `respond` answers a batch at a
    time.
    """
    quick, jobs = _divided(records, all_clips)

    def ask(batches: Iterator[JobBatch[Job]]) -> Iterator[list[Decision]]:
        ahead: collections.deque[list[tuple[Job, Record, Record | None]]] = collections.deque()

        def hidden() -> Iterator[list[Record]]:
            for _, part in batches:
                asked = [
                    (job, records[job.record], None if job.other is None else records[job.other])
                    for job in part
                ]
                ahead.append(asked)
                yield [_shown(record, job.withheld, other) for job, record, other in asked]

        for answers in respond(hidden()):
            yield [
                decision(
                    record,
                    job.withheld,
                    judge(record, job.withheld, answer),
                    answer,
                    None if other is None else other.clip_id,
                )
                for (job, record, other), answer in zip(ahead.popleft(), answers, strict=True)
            ]

    return work_through(
        quick, jobs, ask, journal, batch_size=batch_size, unit="answer", share=share
    )


def _shown(record: Record, withheld: Modality, other: Record | None) -> Record:
    return withhold(record, withheld) if other is None else replace(record, other, withheld)


def _divided(records: Records, all_clips: bool) -> tuple[list[Decision], list[Job]]:
    """The decisions that need no answer, and the jobs."""
    stand_ins = StandIns(_outlines(records)) if all_clips else None
    quick: list[Decision] = []
    jobs: list[Job] = []
    for index, record in enumerate(_outlines(records)):
        for withheld in MODALITIES:
            why, other = settled(record, withheld), None
            if why == "no_conflict" and stand_ins is not None:
                other = stand_ins.behind(index, record, withheld)
                why = "no_other_clip" if other is None else None
            if why:
                quick.append(decision(record, withheld, why, None))
            else:
                jobs.append(Job(index, withheld, other))
    return quick, jobs


def _outlines(records: Records) -> Iterator[Record]:
    return (records.outline(index) for index in range(len(records)))


class StandIns:
    """Conflicting clips whose sound or picture can take the place of an agreeing clip's."""

    def __init__(self, outlines: Iterable[Record]):
        # Ascending indices by language and withheld modality, and then by conclusion.
        self._found: dict[tuple[str, Modality], dict[str | None, list[int]]] = {}
        self._count = 0
        for index, record in enumerate(outlines):
            self._count += 1
            for withheld in MODALITIES:
                if settled(record, withheld) is None:
                    alike = self._found.setdefault((record.language, withheld), {})
                    alike.setdefault(_target(record), []).append(index)

    def behind(self, index: int, record: Record, withheld: Modality) -> int | None:
        """The next clip behind `index`, in a circle, that is in the same language and concludes
        something else than `record`; None if there is none."""
        nearest = []
        for conclusion, places in self._found.get((record.language, withheld), {}).items():
            if conclusion != _target(record):
                nearest.append(places[bisect.bisect_right(places, index) % len(places)])
        return min(nearest, key=lambda place: (place - index) % self._count, default=None)


def disagreements(decisions: Iterable[Decision]) -> dict[str, float]:
    """kappa of clips without that label: 1.0 if the conclusions without sound and without picture
    differ, 0.0 if they agree.

    Clips without a conclusion in one of the two cases are left out.
    """
    concluded: dict[str, list[str]] = {}
    for d in decisions:
        if d["kappa"] is None and d["rejected_conclusion"] is not None:
            concluded.setdefault(d["clip_id"], []).append(d["rejected_conclusion"])
    both = {clip: found for clip, found in concluded.items() if len(found) == len(MODALITIES)}
    return {clip: float(len(set(found)) > 1) for clip, found in both.items()}


def pairs_of(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Lines of pairs.jsonl, with kappa from the labels or else from `disagreements`."""
    mined = disagreements(decisions)
    kept = [{key: d[key] for key in PAIR_KEYS} for d in decisions if d["chosen"] is not None]
    return [
        pair | {"kappa": mined.get(pair["clip_id"]) if pair["kappa"] is None else pair["kappa"]}
        for pair in kept
    ]


def summarise(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Counts for summary.json."""
    decisions = list(decisions)
    kept = [d for d in decisions if d["chosen"] is not None]
    count = collections.Counter
    mined = count(map(str, disagreements(decisions).values()))
    return summary.of_pairs(kept) | {
        "answers": sum(d["rejected"] is not None for d in decisions),
        "decisions": summary.ordered(count(d["why"] for d in decisions), REASONS),
        "pairs_by_withheld": summary.ordered(count(d["withheld"] for d in kept), MODALITIES),
        "mined_kappa": dict(sorted(mined.items())),
    }


def _target(record: Record) -> str | None:
    """The label if there is one, else the conclusion of the record's own reasoning."""
    labels = emotions.canonical_labels(record.labels)
    return labels.get("emotion") or _concluded(record, sed.target_text(record.annotation))


def _concluded(record: Record, answer: str) -> str | None:
    return sed.conclusion(answer, emotions.in_labels([record.labels]))


def _suggested(record: Record, withheld: Modality) -> str | None:
    return emotions.canonical_labels(record.labels).get(SEEN[withheld])
