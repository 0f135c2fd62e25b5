"""EmoBench-M (https://arxiv.org/abs/2502.04424): thirteen tasks, what they ask, and their files.

A row, one line of predictions.jsonl or an element of the official result files:

    {"task": "MELD", "video", "expected_value", "predicted_value"}
    {"task": "MC-EIU", "modal_path", "expected_emotion", "expected_intent", "predicted_..." twice}
    {"task": "SMILE", "video", "reference", "prediction"}

DATA holds one list of items per task, MELD.json and so on (JSON or JSON lines), with the expected_
and reference entries of these rows, "video" or "modal_path", and what is asked: "instruction", or
"text", the words that are said. The clips lie beside it, in a folder of the task's name or in
videos/.
"""

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from saber_jax.data import sed, texts

Row = dict[str, Any]
TaskKind = Literal["classification", "joint", "generation"]

DIMENSIONS = {
    "FER": "foundational emotion recognition",
    "CEU": "conversational emotion understanding",
    "SCEA": "socially complex emotion analysis",
}

_POLARITY = ("neutral", "negative", "positive")
_TRUTH = ("true", "false")
_SONG = ("neutral", "calm", "happy", "sad", "angry", "fearful")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One data set of the benchmark. `labels` by what is asked: emotion, intent, or the claim."""

    title: str
    dimension: str
    kind: TaskKind = "classification"
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def _classify(title: str, dimension: str, labels: tuple[str, ...], asked: str = "emotion") -> Task:
    return Task(title=title, dimension=dimension, labels={asked: labels})


TASKS: dict[str, Task] = {
    "RAVDSS-song": _classify("song emotion", "FER", _SONG),
    "RAVDSS-speech": _classify("speech emotion", "FER", (*_SONG, "surprised", "disgust")),
    "MOSI": _classify("opinion sentiment", "FER", _POLARITY),
    "MOSEI": _classify("emotion intensity", "FER", _POLARITY),
    "FGMSA": _classify(
        "stock comment emotion",
        "FER",
        ("weak negative", "strong negative", "neutral", "strong positive", "weak positive"),
    ),
    "mer2023": _classify(
        "fine-grained dialogue emotion",
        "CEU",
        ("happy", "sad", "neutral", "angry", "worried", "surprise"),
    ),
    "SIMS": _classify("presentation emotion", "CEU", _POLARITY),
    "ch-simsv2s": _classify("face-centric dialogue emotion", "CEU", _POLARITY),
    "MC-EIU": Task(
        title="conversational emotion and intent",
        dimension="CEU",
        kind="joint",
        labels={
            "emotion": ("happy", "surprise", "sad", "disgust", "anger", "fear", "neutral"),
            "intent": (
                *("questioning", "agreeing", "acknowledging", "encouraging"),
                *("consoling", "suggesting", "wishing", "neutral"),
            ),
        },
    ),
    "MELD": _classify(
        "multi-party dialogue emotion",
        "CEU",
        ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    ),
    "funny": _classify("humour", "SCEA", _TRUTH, "humour"),
    "MUSTARD": _classify("sarcasm", "SCEA", _TRUTH, "sarcasm"),
    "SMILE": Task(title="reason of laughter", dimension="SCEA", kind="generation"),
}
"""By the names that the official scripts give the data sets."""

EXPECTED = {
    "classification": ("expected_value",),
    "joint": ("expected_emotion", "expected_intent"),
    "generation": ("reference",),
}
MEDIA = ("video", "modal_path")

LAUGHED = "The audience laughed because "


def read(folder: Path) -> list[Row]:
    """The items of all tasks that `folder` has, as rows without predictions, with "question" and
    "path" added.

    Raises FileNotFoundError without any task, ValueError naming an item that lacks something.
    """
    rows = []
    for name in TASKS:
        for path in (folder / f"{name}.json", folder / f"{name}.jsonl"):
            if path.exists():
                rows += [_item(folder, name, path, i, item) for i, item in enumerate(items(path))]
                break
    if not rows:
        raise FileNotFoundError(
            f"{folder} has none of {', '.join(f'{name}.json' for name in TASKS)}. "
            "docs/evaluation.md shows the layout of EmoBench-M."
        )
    counts = collections.Counter(row["clip_id"] for row in rows)
    for row in rows:
        if counts[row["clip_id"]] > 1:  # Files of one name, in several folders.
            folders = str(Path(_media(row)).with_suffix("")).lstrip("/")
            row["clip_id"] = f"{row['task']}/{folders}"
    return rows


def results(path: Path) -> list[tuple[str, Row]]:
    """Rows with predictions made elsewhere, each after the place where it was found: official
    result files named by task in a folder, one such file, or the predictions.jsonl of a run.

    Raises ValueError naming a row without a task, or two files of one task.
    """
    rows = []
    for file in _result_files(path) if path.is_dir() else [path]:
        for number, row in enumerate(items(file), start=1):
            task = row.get("task") or (file.stem if file.stem in TASKS else None)
            if task is None:
                raise ValueError(
                    f'{file}, entry {number}, has no "task"; add it, or name the file after one: '
                    f"{', '.join(TASKS)}."
                )
            rows.append((f"{file}, entry {number}", {"task": task} | row))
    return rows


def clip_name(row: Row) -> str | None:
    """Everything that a row calls its clip, None if it names none, as official files may.

    Not the clip_id alone: tasks have files of one name in several folders.
    """
    names = [str(row[key]) for key in ("clip_id", *MEDIA) if row.get(key)]
    return " ".join([row["task"], *names]) if names else None


def matched(results: Sequence[tuple[str, Row]], items: Sequence[Row]) -> list[str]:
    """For each of `results` the clip_id of the item that it answers; without any, its own name.

    An item is known by its clip_id, or by its file: of files with one name, the one in the same
    folders. Raises ValueError naming a result that fits several items or names no clip.
    """
    own = {item["clip_id"] for item in items}
    files: dict[tuple[str, str], list[Row]] = {}
    for item in items:
        files.setdefault((item["task"], Path(_media(item)).name), []).append(item)
    clips = []
    for place, row in results:
        name = clip_name(row)
        if name is None:
            raise ValueError(
                f"{place}, names no clip (video, modal_path or clip_id), so answers cannot be "
                "compared with --data. Add the names, or leave out --data."
            )
        clip = row.get("clip_id")
        if clip not in own:
            fitting = _nearest(_media(row), files.get((row["task"], Path(_media(row)).name), []))
            if len(fitting) > 1:
                raise ValueError(
                    f"{place}, fits several clips of --data: {', '.join(fitting)}. Name the file "
                    "with its folders."
                )
            clip = fitting[0] if fitting else name
        clips.append(str(clip))
    return clips


def _nearest(media: str, items: Sequence[Row]) -> list[str]:
    """The clip_ids of those of `items` whose path ends most like `media`."""
    tails = [_common_tail(Path(media), Path(_media(item))) for item in items]
    return [i["clip_id"] for i, tail in zip(items, tails, strict=True) if tail == max(tails)]


def _common_tail(one: Path, other: Path) -> int:
    """How many parts two paths have in common at their ends."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _media(row: Row) -> str:
    return next((str(row[key]) for key in MEDIA if row.get(key)), "")


def _result_files(folder: Path) -> list[Path]:
    # Not "*.json*", which also finds the copies that editors leave, such as MELD.json~.
    files = sorted(f for end in ("json", "jsonl") for f in folder.glob(f"*.{end}"))
    files = [file for file in files if file.stem in TASKS]
    if not files:
        raise FileNotFoundError(f"{folder} has no result file named after a task, like MELD.json.")
    stems = [file.stem for file in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"{folder} has two result files, .json and .jsonl, of {', '.join(twice)}, and each "
            "would count. Keep one of each."
        )
    return files


def items(path: Path) -> list[Row]:
    """A JSON list, the "examples" of an official example file, or JSON lines."""
    text = path.read_text(encoding="utf-8").strip()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for _, line in texts.lines(text)]
    if isinstance(found, dict):
        found = found.get("examples", [found])
    return found


def _item(folder: Path, name: str, file: Path, index: int, item: Row) -> Row:
    wanted = EXPECTED[TASKS[name].kind]
    media = _media(item)
    if missing := [key for key in wanted if key not in item] + ["video"] * (not media):
        raise ValueError(f"{file}, item {index}: no {', '.join(missing)}.")
    base = Path(media).name
    places = [folder / media, folder / name / media, folder / name / base, folder / "videos" / base]
    found = next((str(place) for place in places if place.is_file()), str(places[0]))
    asked = item.get("instruction") or question(name, str(item.get("text") or ""))
    return (
        {"task": name, "clip_id": f"{name}/{Path(media).stem}"}
        | item
        | {
            "question": asked,
            "path": found,
        }
    )


def question(name: str, spoken: str) -> str:
    """What a model is asked about a clip in which `spoken` is said.

    In our words; an item that brings its own instruction is asked with that instead.
    """
    task = TASKS[name]
    said = f'In the video someone says: "{spoken}". ' if spoken else ""
    if task.kind == "generation":
        return (
            f"{said}Explain in at most 40 words why the audience laughed. Begin with "
            f'"{LAUGHED.strip()}".'
        )
    if task.kind == "joint":
        lists = " ".join(
            f"The {asked} is one of: {', '.join(labels)}." for asked, labels in task.labels.items()
        )
        form = "{'emotion label': 'label', 'intent label': 'label'}"
        return f"{said}Which emotion is expressed, and with which intent? {lists} Answer as {form}."
    ((asked, labels),) = task.labels.items()
    what = "Which emotion is expressed?" if asked == "emotion" else f"Is this {asked}?"
    return (
        f"{said}{what} Choose one of: {', '.join(labels)}. Answer with nothing but "
        f"{{'{asked}': 'label'}}."
    )


def answered(name: str, response: str) -> Row:
    """The predicted_... or prediction entries of a row, read from a model's answer.

    A label is what stands in the answer's {'emotion': 'label'}, whatever it is; without that, the
    only label of the task that the answer (or its reasoning, if it has sections) mentions. Else "".
    """
    task = TASKS[name]
    if task.kind == "generation":
        return {"prediction": response.strip()}
    found = {asked: _label(asked, labels, response) for asked, labels in task.labels.items()}
    if task.kind == "joint":
        return {f"predicted_{asked}": label for asked, label in found.items()}
    return {"predicted_value": next(iter(found.values()))}


def _label(asked: str, labels: Sequence[str], response: str) -> str:
    text = sed.parse_response(response)["sentiment_analysis"] or response
    key = rf"""['"](?:{asked}(?: label)?|label|answer)['"]\s*:\s*['"]?([^'"{{}},]*)"""
    if match := re.search(key, text, re.IGNORECASE):
        return match[1].strip()
    rest, mentioned = text.lower(), []
    # Longest first, so that "weak negative" is not taken for "negative".
    for label in sorted(labels, key=len, reverse=True):
        rest, count = re.subn(rf"(?<![a-z]){re.escape(label)}(?![a-z])", " ", rest)
        mentioned += [label] * bool(count)
    return mentioned[0] if len(mentioned) == 1 else ""
