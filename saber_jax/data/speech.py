"""How far a transcript is from what was said: word errors, or character errors in Chinese."""

import re
import unicodedata

import jiwer

UNITS = {"en": "word", "zh": "character"}
"""What errors are counted in, by language."""


def words(text: str) -> list[str]:
    """Lower-case words; punctuation and sound events such as <laughter> do not count."""
    return _spoken(text).split()


def characters(text: str) -> list[str]:
    """Characters without spaces, punctuation and sound events."""
    return list("".join(_spoken(text).split()))


def units(text: str, language: str) -> list[str]:
    """`words` or `characters`, as is usual for the language."""
    return words(text) if UNITS[language] == "word" else characters(text)


def errors(reference: str, said: str, language: str) -> tuple[int, int]:
    """(edits, units of the reference); without speech in the reference every unit said is an edit.

    Edits are the fewest substitutions, insertions and deletions (Levenshtein).
    """
    wanted, got = units(reference, language), units(said, language)
    if not wanted:
        return len(got), 0
    out = jiwer.process_words(" ".join(wanted), " ".join(got))
    return out.substitutions + out.insertions + out.deletions, len(wanted)


def _spoken(text: str) -> str:
    text = re.sub(r"<[^<>]*>", " ", unicodedata.normalize("NFKC", text).lower())
    # An apostrophe is part of its word; every other mark separates words.
    text = re.sub("['\\u2019]", "", text)
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
