"""Whether answers that were made elsewhere are one for each clip of a benchmark."""

from collections.abc import Iterable, Sequence

SHOWN = 5
"""How many clips a message names."""


def check_once(answers: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if a clip is answered twice; `answers` are (clip, where its answer is)."""
    places: dict[str, list[str]] = {}
    for clip, place in answers:
        places.setdefault(clip, []).append(place)
    twice = [f"{clip} ({', '.join(found)})" for clip, found in places.items() if len(found) > 1]
    if twice:
        raise ValueError(
            f"These clips have more than one answer, and each would count: {named(twice)}. "
            "Keep one answer of each."
        )


def named(clips: Sequence[str]) -> str:
    """The first few of many: "a, b, c, d, e and 7 more"."""
    more = f" and {len(clips) - SHOWN} more" if len(clips) > SHOWN else ""
    return ", ".join(clips[:SHOWN]) + more
