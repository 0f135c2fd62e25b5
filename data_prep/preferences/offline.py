"""Scores by rules, without a model, for the embedded corpus and for first experiments.

Texts are read with the lexicon of cues.py, and evidence is compared with the record's annotation
word by word. Neither uses the clip itself, and neither recognises a paraphrase without common words
or cues. For free prose, use a judge.

    consistency = (follows + together) / 2

The evidence conflicts if face and voice suggest different families of emotions, or if the words
suggest another valence than they do, or if the reasoning itself names another emotion for them.

`follows` compares the conclusion with what the evidence suggests:
    1.0 if it does not conflict and the conclusion belongs to the family of face and voice;
    0.5 if the conclusion belongs to another family and both are negative;
    1.0 if it conflicts and the reasoning says so; but 0 if the conclusion is not negative and
        nothing in the evidence suggests it;
    0.0 otherwise: the reasoning does not mention a conflict, so one modality has decided.
`together` is the minimum of what applies, because true claims do not make up for a contradiction:
    each claim of the reasoning about face, voice or words against the evidence (1, 0.5 or 0);
    whether the reasoning says correctly that the modalities agree or conflict (1 or 0).

    alignment = mean over the evidence sections that the answer or the annotation fills

The score of a section is the F1 of its words (in Chinese: of its characters) against the
annotation's. If both suggest the same family of emotions the score is (1 + F1) / 2, if they suggest
different ones F1 / 2.
"""

import collections
import re
from collections.abc import Mapping

from data_prep.preferences import cues
from data_prep.preferences.cues import Channel
from data_prep.preferences.score import EVIDENCE, Scores
from saber_jax.data import emotions, sed
from saber_jax.data.records import Record

VERSION = "offline-3"

_SECTIONS: dict[Channel, tuple[str, ...]] = {
    "face": ("facial_exp_desc", "body_lang_desc"),
    "voice": ("acoustic_feat",),
    "words": ("speech_content",),
}
_TOKEN = re.compile(r"[a-z0-9]+|[\u4e00-\u9fff]")


def score(record: Record, answer: str) -> Scores:
    """Both scores of an answer; see the formulas above."""
    sections = sed.parse_response(answer)
    return Scores(
        consistency=consistency(sections), alignment=alignment(record.annotation, sections)
    )


def consistency(sections: Mapping[str, str]) -> float | None:
    """Whether the reasoning follows from the sections before it; None if neither half applies."""
    reasoning = sections["sentiment_analysis"]
    evidence: dict[Channel, str | None]
    evidence = {modality: _suggested(sections, modality) for modality in _SECTIONS}
    claims: dict[Channel, str | None]
    claims = {modality: cues.claimed(reasoning, modality) for modality in _SECTIONS}
    shown = {m: evidence[m] or claims[m] for m in ("face", "voice") if evidence[m] or claims[m]}
    if not shown and evidence["words"]:
        shown = {"words": evidence["words"]}
    conflict = _conflict(reasoning, [*shown.values()], evidence["words"] or claims["words"])
    halves = [
        _follows(reasoning, [*shown.values()], evidence["words"], conflict),
        _together(reasoning, evidence, claims, conflict),
    ]
    applying = [half for half in halves if half is not None]
    return sum(applying) / len(applying) if applying else None


def alignment(annotation: Mapping[str, str], sections: Mapping[str, str]) -> float | None:
    """How well the stated evidence matches the annotation; None if there is no evidence."""
    worths = [
        _section(field, annotation.get(field, ""), sections[field])
        for field in EVIDENCE
        if annotation.get(field) or sections[field]
    ]
    return sum(worths) / len(worths) if worths and any(annotation.values()) else None


def _suggested(sections: Mapping[str, str], modality: Channel) -> str | None:
    return cues.suggested(" ".join(sections[field] for field in _SECTIONS[modality]), modality)


def _conflict(reasoning: str, shown: list[str | None], words: str | None) -> bool:
    """Whether the evidence conflicts; `shown` are the families of face and voice."""
    if len(set(shown)) != 1 or shown[0] is None:
        return len(set(shown)) > 1
    named = cues.named(reasoning, "words")
    other_valence = words is not None and cues.VALENCES[words] != cues.VALENCES[shown[0]]
    return other_valence or (named is not None and named != shown[0])


def _follows(
    reasoning: str, shown: list[str | None], words: str | None, conflict: bool
) -> float | None:
    concluded = emotions.last_named(reasoning)
    if concluded is None or not shown:
        return None
    family = cues.FAMILIES[concluded]
    if not conflict:
        return _match(family, shown[0])
    if not cues.notes_conflict(reasoning):
        return 0.0
    supported = cues.VALENCES[family] < 0 or family in (*shown, words)
    return 1.0 if supported else 0.0


def _together(
    reasoning: str,
    evidence: Mapping[Channel, str | None],
    claims: Mapping[Channel, str | None],
    conflict: bool,
) -> float | None:
    checks = [
        _match(claims[m], evidence[m]) if m != "words" else _same_sign(claims[m], evidence[m])
        for m in _SECTIONS
        if claims[m] and evidence[m]
    ]
    if evidence["face"] and evidence["voice"]:
        if cues.notes_conflict(reasoning) or cues.notes_agreement(reasoning):
            checks.append(float(cues.notes_conflict(reasoning) == conflict))
        elif conflict:
            checks.append(0.0)
    return min(checks, default=None)


def _match(one: str | None, other: str | None) -> float:
    if one is None or other is None:
        return 0.0
    if one == other:
        return 1.0
    return 0.5 if cues.VALENCES[one] < 0 and cues.VALENCES[other] < 0 else 0.0


def _same_sign(one: str | None, other: str | None) -> float:
    if one is None or other is None:
        return 0.0
    return float(cues.VALENCES[one] == cues.VALENCES[other])


def _section(field: str, truth: str, said: str) -> float:
    worth = _f1(truth, said)
    for modality, fields in _SECTIONS.items():
        if field in fields:
            one, other = cues.suggested(truth, modality), cues.suggested(said, modality)
            if one and other:
                return (1 + worth) / 2 if one == other else worth / 2
    return worth


def _f1(one: str, other: str) -> float:
    a, b = (collections.Counter(_TOKEN.findall(text.lower())) for text in (one, other))
    both = sum((a & b).values())
    return 2 * both / (sum(a.values()) + sum(b.values())) if both else 0.0
