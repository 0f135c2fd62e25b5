"""What the report's browser shows: clips with truth and answers, and preference pairs."""

import base64
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import saber_test
from saber_jax.evaluation.report_tables import Results, Row

T = TypeVar("T")

MOST_CLIPS, MOST_PAIRS = 400, 60
MOST_CLIP_BYTES = 4 << 20
KINDS = ("mp4", "webm")
"""Containers that browsers play."""
PAIRS_SHARE = 0.2
"""Of the room for media, what is kept for preference pairs."""


def browser(
    results: Results, pairs: Sequence[Row], clips: Path | None, most_media: int
) -> dict[str, Any]:
    """The JSON that the page's script reads.

    All kinds of outcome take turns, so what does not fit (text beyond MOST_CLIPS and MOST_PAIRS,
    media beyond `most_media` bytes) is left out of every kind alike.
    """
    examples = [_example(results, i) for i in range(len(results.clips))]
    shown = in_turns(examples, lambda e: (e["type"], e["tags"][0]))[:MOST_CLIPS]
    chosen = [_pair(pair) for pair in pairs]
    chosen = in_turns(chosen, lambda p: (p["type"], p["withheld"]))[:MOST_PAIRS]
    for_pairs = int(most_media * PAIRS_SHARE) if chosen else 0
    _embed(shown, clips, most_media - for_pairs)
    _embed(chosen, clips, for_pairs)
    return {
        "stages": list(results.stages.values()),
        "fields": [sed.TITLES[field] for field in FIELDS],
        "clips": sorted(shown, key=lambda e: e["id"]),
        "pairs": sorted(chosen, key=lambda p: (p["id"], p["withheld"])),
        "left_out": {"clips": len(examples) - len(shown), "pairs": len(pairs) - len(chosen)},
    }


def in_turns(items: Iterable[T], kind: Callable[[T], Hashable]) -> list[T]:
    """a1 a2 a3 b1 c1 c2 -> a1 b1 c1 a2 c2 a3: every kind is among the first."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    turns = itertools.zip_longest(*groups.values())
    return [item for turn in turns for item in turn if item is not None]


def tags(labels: dict[str, str], answers: Sequence[Row], models: Sequence[str] = ()) -> list[str]:
    """What a clip can be filtered by; the first says what became of it from stage to stage. With
    several `models` a fault is there twice: of any answer, and with whose it is."""
    right = [row["conclusion"] == labels["emotion"] for row in answers]
    if len(right) == 1:
        found = ["right" if right[0] else "wrong"]
    else:
        names = {(True, True): "right in all", (False, False): "wrong in all"}
        names |= {(False, True): "corrected", (True, False): "lost"}
        found = [names[right[0], right[-1]]]
    faults = [_faults(labels, row) for row in answers]
    found += dict.fromkeys(fault for each in faults for fault in each)
    if len(models) > 1:
        pairs = zip(models, faults, strict=True)
        found += [f"{model} {fault}" for model, each in pairs for fault in each]
    return found


def _faults(labels: dict[str, str], row: Row) -> list[str]:
    """What is wrong with one answer."""
    followed = [m for m in saber_test.MODALITIES if saber_test.misled(row["conclusion"], labels, m)]
    faults = [f"follows the {modality}" for modality in followed]
    if row["conclusion"] is None:
        faults.append("names no emotion")
    if not saber_test.is_complete(row["response"]):
        faults.append("lacks a section")
    return faults


def _example(results: Results, index: int) -> dict[str, Any]:
    row = results.clips[index]
    answers = [rows[index] for rows in results.rows.values()]
    labels = row["labels"]
    shown = {key: labels[key] for key in ("emotion", "face", "voice", "words") if key in labels}
    return {
        "id": row["clip_id"],
        "language": row["language"],
        "type": saber_test.conflict_type(row)
        if not saber_test.is_consistent(labels)
        else "no conflict",
        "labels": shown,
        "tags": tags(labels, answers, list(results.stages.values())),
        "truth": [row["annotation"][field] for field in FIELDS],
        "answers": [_answer(answer, labels) for answer in answers],
    }


def _answer(answer: Row, labels: dict[str, str]) -> dict[str, Any]:
    sections = sed.parse_response(answer["response"])
    word = answer["conclusion"]
    return {
        "word": word,
        "right": word == labels["emotion"],
        "follows": [m for m in saber_test.MODALITIES if saber_test.misled(word, labels, m)],
        # None: the heading is not there; "" is an empty section.
        "sections": [
            sections[field] if sed.heading(field) in answer["response"] else None
            for field in FIELDS
        ],
    }


def _pair(pair: Row) -> dict[str, Any]:
    sides = [sed.parse_response(pair[side]) for side in ("chosen", "rejected")]
    return {
        "id": pair["clip_id"],
        "language": pair.get("language", ""),
        "type": pair.get("conflict_type") or "unlabelled",
        "withheld": pair.get("withheld") or "unknown",
        "words": [pair.get("conclusion"), pair.get("rejected_conclusion")],
        "chosen": [sides[0][field] for field in FIELDS],
        "rejected": [sides[1][field] for field in FIELDS],
    }


def _embed(items: Sequence[dict[str, Any]], clips: Path | None, room: int) -> None:
    """Sets "video" to a data: URI while there is room, else None."""
    for item in items:
        item["video"] = None
        kinds = [kind for kind in KINDS if clips and (clips / f"{item['id']}.{kind}").is_file()]
        if not clips or not kinds:
            continue
        path = clips / f"{item['id']}.{kinds[0]}"
        size = path.stat().st_size
        if size <= MOST_CLIP_BYTES and size * 4 // 3 + 4 <= room:  # 4 characters for 3 bytes.
            data = base64.b64encode(path.read_bytes()).decode()
            item["video"] = f"data:video/{kinds[0]};base64,{data}"
            room -= len(data)
