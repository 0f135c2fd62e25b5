"""Texts that come from outside: lines of JSON, and what a text must not hold."""

import re
from collections.abc import Iterator

SPECIAL = re.compile(r"<\|\w+\|>")
"""Special tokens: in a text they would stand for media, or for the end of a turn."""

_HALF = re.compile(r"[\ud800-\udfff]")


def fault(text: str) -> str | None:
    """What a text holds that cannot be stored or would be read as something else, or None."""
    if special := SPECIAL.search(text):
        return f"holds {special[0]}, which has a meaning of its own in training; write it otherwise"
    if half := _HALF.search(text):
        code = f"\\u{ord(half[0]):04x}"
        return f"holds {code}, half of a character; write the whole one, or leave it out"
    return None


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of JSON lines, empty ones left out.

    They end at a newline and nowhere else: str.splitlines also cuts at U+2028 and U+0085, which a
    JSON text may hold.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
