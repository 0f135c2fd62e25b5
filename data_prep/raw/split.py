"""Stage `split`: holds out a balanced test set whose speakers are not in the training set.

Clips that share a speaker or a source video form a group, directly or through other clips. Groups
are never divided. Whole groups are set aside until a test set can be drawn from them that has as
many inconsistent as consistent clips in each language. The remaining clips of these groups are
dropped as `reserved`, because training on them would leak test speakers.

    rows gain    split    train, preference (a share of the inconsistent ones), or test
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from data_prep.raw.shards import Dropped, Outcome, Row

REASONS = {
    "reserved": "shares a speaker or a source video with the test set",
    "published_test": "is in the test set of the corpus it comes from",
}
BALANCED = ("consistent", "inconsistent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """`test` is the wanted number of test clips. A group with more than the share `largest_group`
    of all clips (the cast of a series) stays in training, which would lose too many clips
    otherwise. Published test clips are kept out of training unless `train_on_published_tests`."""

    test: int = 1000
    preference: float = 0.5  # Share of the inconsistent clips outside the test set.
    largest_group: float = 0.1
    train_on_published_tests: bool = False
    seed: int = 0


def groups(rows: Iterable[Row]) -> dict[str, int]:
    """{clip_id: number of its group}. People of one clip are written "a+b"."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        root = key
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[key] != root:
            parent[key], key = root, parent[key]
        return root

    keys = {row["clip_id"]: _keys(row) for row in rows}
    for shared in keys.values():
        first = find(shared[0])
        for key in shared[1:]:
            parent[find(key)] = first
    numbers: dict[str, int] = {}
    return {
        clip_id: numbers.setdefault(find(shared[0]), len(numbers))
        for clip_id, shared in keys.items()
    }


def _keys(row: Row) -> list[str]:
    people = [name for name in row["speaker"].split("+") if name]
    return [f"video {row['corpus']} {row['video']}", *(f"speaker {name}" for name in people)]


def leaks(rows: Iterable[Row]) -> list[str]:
    """Speakers and source videos that are both in test and elsewhere; there should be none."""
    where: dict[str, set[bool]] = collections.defaultdict(set)
    for row in rows:
        for key in _keys(row):
            where[key].add(row["split"] == "test")
    return sorted(key for key, sides in where.items() if len(sides) == 2)


KEYS = ("clip_id", "corpus", "video", "speaker", "language", "split", "relation")
"""The fields of a row that the plan needs."""


def plan(rows: list[Row], settings: SplitSettings) -> Callable[[Row], Outcome]:
    """Splits all rows (with KEYS only); returns a function that sets the split of a whole row.

    Raises RuntimeError if the split leaks.
    """
    group_of = groups(rows)
    members: dict[int, list[Row]] = collections.defaultdict(list)
    for row in rows:
        members[group_of[row["clip_id"]]].append(row)
    candidates = _reserve(members, len(rows), settings)
    chosen = _draw([row for group in candidates for row in members[group]], settings)
    # If one relation is rare, few clips are drawn; groups without any return to training.
    reserved = {group_of[clip_id] for clip_id in chosen}

    def place(row: Row) -> Outcome:
        return _placed(row, chosen, group_of[row["clip_id"]] in reserved, settings)

    placed = (place({**row, "provenance": []}) for row in rows)
    if found := leaks(row for row in placed if not isinstance(row, Dropped)):
        raise RuntimeError(f"The split leaks: {found[:5]} are in test and in training.")
    return place


def _reserve(members: dict[int, list[Row]], total: int, settings: SplitSettings) -> set[int]:
    """Groups to draw the test set from: in seeded order, those that add missing clips."""
    languages = sorted({row["language"] for rows in members.values() for row in rows})
    wanted = {
        (relation, language): settings.test / len(BALANCED) / len(languages)
        for relation in BALANCED
        for language in languages
    }
    have: collections.Counter = collections.Counter()
    taken: set[int] = set()

    def order(number: int) -> int:
        return _draw_key(min(row["clip_id"] for row in members[number]), settings.seed)

    for number in sorted(members, key=order):
        rows = members[number]
        if len(rows) > max(1, settings.largest_group * total):
            continue
        cells = collections.Counter((row["relation"], row["language"]) for row in rows)
        if any(have[cell] < wanted.get(cell, 0) for cell in cells):
            taken.add(number)
            have.update(cells)
    return taken


def _draw(rows: list[Row], settings: SplitSettings) -> set[str]:
    """clip_ids of the test set: for each language, equally many clips of both relations."""
    cells: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: _draw_key(row["clip_id"], settings.seed)):
        cells[row["language"], row["relation"]].append(row["clip_id"])
    languages = sorted({language for language, _ in cells})
    chosen: set[str] = set()
    for language in languages:
        most = settings.test // len(BALANCED) // len(languages)
        count = min(most, *(len(cells[language, relation]) for relation in BALANCED))
        for relation in BALANCED:
            chosen.update(cells[language, relation][:count])
    return chosen


def _placed(row: Row, chosen: set[str], reserved: bool, settings: SplitSettings) -> Outcome:
    if row["clip_id"] in chosen:
        return _with_split(row, "test", settings)
    if reserved:
        return Dropped(row=row, reason="reserved")
    if row["split"] == "test" and not settings.train_on_published_tests:
        return Dropped(row=row, reason="published_test", detail=row["corpus"])
    mined = row["relation"] == "inconsistent" and (
        _draw_key(row["clip_id"], settings.seed + 1) / 2**64 < settings.preference
    )
    return _with_split(row, "preference" if mined else "train", settings)


def _with_split(row: Row, split: str, settings: SplitSettings) -> Row:
    made = {
        "fields": ["split"],
        "tool": "data_prep.split",
        "model": None,
        "prompt": None,
        "parameters": {**dataclasses.asdict(settings), "published": row["split"]},
    }
    return {**row, "split": split, "provenance": [*row["provenance"], made]}


def _draw_key(clip_id: str, seed: int) -> int:
    """A number from 0 to 2**64 that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{seed} {clip_id}".encode()).digest()[:8], "big")


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts by split, relation and language."""
    counts = collections.Counter(
        f"{row['split']} {row['relation']} {row['language']}" for row in rows
    )
    return dict(sorted(counts.items()))


def shortfall(counts: dict[str, int], settings: SplitSettings) -> str | None:
    """A message if the test set of a `summary` is smaller than the settings ask for, else None."""
    drawn = sum(count for what, count in counts.items() if what.startswith("test "))
    if drawn >= settings.test:
        return None
    return (
        f"The test set has {drawn} of the {settings.test} clips asked for: it needs as many "
        "inconsistent as consistent ones in each language, from people and videos that are not "
        "in training."
    )
