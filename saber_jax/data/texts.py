"""Reading JSON lines, checks of texts from outside, and short lists for messages."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SPECIAL = re.compile(r"<\|\w+\|>|<tts_\w+>|</?tool_call>")
"""Special tokens of the released vocabulary, which reads them in a text as media, as the end of a
turn, or as commands."""

_HALF = re.compile(r"[\ud800-\udfff]")


def fault(text: str) -> str | None:
    """Describes content that cannot be stored or would be misread in training; None if fine."""
    if special := SPECIAL.search(text):
        return f"holds {special[0]}, which has a meaning of its own in training; write it otherwise"
    if half := _HALF.search(text):
        code = f"\\u{ord(half[0]):04x}"
        return f"holds {code}, half of a character; write the whole one, or leave it out"
    return None


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first `most` of many: "a, b, c, d, e and 7 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises ValueError naming a
    file in another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of JSON lines, empty ones left out.

    Lines end only at newline characters; str.splitlines also splits at U+2028 and U+0085, which
    JSON strings may contain.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
