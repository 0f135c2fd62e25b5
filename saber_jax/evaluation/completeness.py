"""Whether there is one answer for each clip of a benchmark, where they were made elsewhere."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saber_jax.data import texts

Row = dict[str, Any]


def check_once(answers: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if a clip is answered twice; `answers` are (clip, where its answer is)."""
    places: dict[str, list[str]] = {}
    for clip, place in answers:
        places.setdefault(clip, []).append(place)
    twice = [f"{clip} ({', '.join(found)})" for clip, found in places.items() if len(found) > 1]
    if twice:
        raise ValueError(
            f"These clips have more than one answer, and each would count: {texts.listed(twice)}. "
            "Keep one answer of each."
        )


def completed(answers: Mapping[str, Row], clips: Sequence[str], data: Path) -> list[Row]:
    """A row for each of `clips`, the clips of `data`, in their order.

    One without an answer gets an empty answer and "unanswered". Raises ValueError for an answer to
    a clip that is not there, and for a clip that is there twice.
    """
    counts = collections.Counter(clips)
    if twice := [clip for clip, count in counts.items() if count > 1]:
        raise ValueError(
            f"{data} has these clips more than once, so answers cannot be told apart: "
            f"{texts.listed(twice)}. Give each clip a name of its own."
        )
    if unknown := [clip for clip in answers if clip not in counts]:
        raise ValueError(
            f"{len(unknown)} of {len(answers)} answers are for clips that are not in {data}: "
            f"{texts.listed(unknown)}. Check --data and --split, or remove those answers."
        )
    empty = {"response": "", "unanswered": True}
    return [answers[clip] if clip in answers else {"clip_id": clip} | empty for clip in clips]
