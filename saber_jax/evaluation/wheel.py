"""The emotion-wheel score of free emotion words, MER2025 track 2 (wheel.py in MERTools).

Words count as equal when they fall into one group of an emotion wheel, in five published wheels at
two levels. From a word to its group:

    "joyfully" --format.csv--> joyful, joyous --synonym.csv--> happy, joyful, ... --wheel--> "happy"

A form without an entry has no group and is left out. Of several words of the wheel, the
alphabetically first one decides.
"""

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saber_jax.evaluation import bootstrap
from saber_jax.evaluation.bootstrap import Score

FOLDER = Path(__file__).parent / "emotion_wheel"
WHEELS = ("wheel1", "wheel2", "wheel3", "wheel4", "wheel5")
LEVELS = ("level1", "level2")
SYNONYM_RUNS = 8

FLOOR = 0.296
"""Level-1 F on the 332 official clips when the predictions are shuffled between clips, measured
with the official functions: a score near it says nothing about the clips."""


def parse_words(text: str) -> list[str]:
    """Words of a list as language models write it: "['happy', 'sad']" -> ["happy", "sad"].

    Quotation marks and commas all separate, so "don't care" gives "don" and "t care"; one bracket
    is dropped at either end. Lower case, in the order given.
    """
    text = text.removeprefix("[").removesuffix("]")
    return [word for part in re.split("['\",]", text) if (word := part.strip().lower())]


def groups(words: Sequence[str], wheel: str, level: str) -> set[str]:
    """The groups of `words` on one wheel; unknown words have none."""
    forms, meanings, members = _forms(), _meanings(), _members(wheel, level)
    found = set()
    for word in words:
        candidates = sorted(m for form in forms.get(word, ()) for m in meanings[form])
        found |= {members[c] for c in [c for c in candidates if c in members][:1]}
    return found


def known(word: str) -> bool:
    """Whether any wheel can have a group for a word."""
    return word in _forms()


def score(
    truth: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]]
) -> dict[str, Score]:
    """{"level1", "level2", "mean"}: F over clips, the mean of five wheels, and of both levels.

    Per wheel, precision and recall are means over clips and F is of these means. A clip whose truth
    has no group on a wheel is not counted there; an answer without any group scores 0. Levels also
    carry "precision" and "recall". Raises ValueError when the two hold different clips.
    """
    if set(truth) != set(said):
        missing = sorted(set(truth) ^ set(said))
        raise ValueError(
            f"Truth and predictions differ in {len(missing)} clips, e.g. {missing[:3]}."
        )
    names = list(truth)
    picks = np.random.default_rng(bootstrap.SEED).multinomial(
        len(names), np.full(len(names), 1 / max(len(names), 1)), bootstrap.RESAMPLES
    )
    weights = np.concatenate([np.ones((1, len(names))), picks])  # Row 0 is the sample itself.
    levels = {level: _level(level, names, truth, said, weights) for level in LEVELS}
    result = {}
    for level, (f, precision, recall) in levels.items():
        result[level] = bootstrap.score(len(names), float(f[0]), f[1:])
        result[level] |= {"precision": float(precision[0]), "recall": float(recall[0])}
    both = np.mean([f for f, _, _ in levels.values()], axis=0)
    return result | {"mean": bootstrap.score(len(names), float(both[0]), both[1:])}


def _level(level, names, truth, said, weights) -> np.ndarray:
    """[3 (F, precision, recall), 1 + R] means over the wheels."""
    wheels = []
    for wheel in WHEELS:
        counted, precision, recall = (np.zeros(len(names)) for _ in range(3))
        for i, name in enumerate(names):
            right, claimed = groups(truth[name], wheel, level), groups(said[name], wheel, level)
            counted[i] = bool(right)
            if right and claimed:
                precision[i] = len(right & claimed) / len(claimed)
                recall[i] = len(right & claimed) / len(right)
        clips = np.maximum(weights @ counted, 1e-300)
        p, r = weights @ precision / clips, weights @ recall / clips
        wheels.append([2 * p * r / np.maximum(p + r, 1e-300), p, r])
    return np.mean(wheels, axis=0)


@functools.cache
def _forms() -> dict[str, list[str]]:
    """Any form of a word -> the words whose form it may be."""
    forms: dict[str, list[str]] = {}
    for row in _rows("format"):
        for form in [*_split(row["format"]), row["name"]]:
            forms.setdefault(form, []).append(row["name"])
    return forms


@functools.cache
def _meanings() -> dict[str, set[str]]:
    """A word -> the wheels' words of which it is one or a synonym, in any of eight runs."""
    meanings: dict[str, set[str]] = {}
    for row in _rows("synonym"):
        for run in range(1, SYNONYM_RUNS + 1):
            word = row[f"word_run{run}"].strip().lower()
            for synonym in [word, *parse_words(row[f"synonym_run{run}"])]:
                meanings.setdefault(synonym, set()).add(word)
    return meanings


@functools.cache
def _members(wheel: str, level: str) -> dict[str, str]:
    """Words of a wheel -> their group. Where a word stands twice, the later branch has it."""
    tree: dict[str, dict[str, list[str]]] = {}
    branch = {"level1": "", "level2": "", "level3": ""}
    for row in _rows(wheel):
        # A blank cell continues the one above it.
        branch |= {name: cell.strip().lower() for name, cell in row.items() if cell}
        leaves = tree.setdefault(branch["level1"], {}).setdefault(branch["level2"], [])
        leaves.append(branch["level3"])
    members: dict[str, str] = {}
    for inner, middle in tree.items():
        # At level 2 an innermost word goes to its alphabetically first child.
        members[inner] = inner if level == "level1" else min(middle)
        for name, leaves in middle.items():
            for word in [name, *leaves]:
                members[word] = inner if level == "level1" else name
    return members


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def _split(text: str) -> list[str]:
    """As `parse_words`, but the case is kept: format.csv is read as it is."""
    return [word for part in re.split("['\",]", text) if (word := part.strip())]
