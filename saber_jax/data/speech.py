"""Errors of a transcript: word errors, or character errors in Chinese."""

import re
import unicodedata

import jiwer

UNITS = {"en": "word", "zh": "character"}
"""The unit in which errors are counted, by language."""


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
    """(edits, number of units in the reference), in words or characters.

    Edits are the Levenshtein distance; with an empty reference every unit of `said` is one.
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
