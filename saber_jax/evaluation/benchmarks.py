"""The common interface of all benchmarks: their requests, and the scoring of answers."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saber_jax.data import emotions, sed
from saber_jax.data.records import Record, RecordSource
from saber_jax.evaluation import completeness, emer, emobench_m, emobench_m_scores, saber_test
from saber_jax.evaluation.judge import Judge
from saber_jax.evaluation.predict import BenchmarkClips, ClipFile, ClipFiles, Row, longest_first
from saber_jax.runs.files import numbered_jsonl
from saber_jax.runs.manifest import fingerprint

Settings = dict[str, Any] | None
"""How clips are decoded: the sampling of a checkpoint's model.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`data` gives a fingerprint of a folder's requests; `made_elsewhere` reads --predictions."""

    clips: Callable[[Path, str, Settings], BenchmarkClips]
    data: Callable[[Path], str]
    made_elsewhere: Callable[[Path, Path | None, str], list[Row]]
    score: Callable[[Sequence[Row], Judge | None], dict[str, Any]]


def _saber_clips(data: Path, split: str, settings: Settings) -> BenchmarkClips:
    del settings  # Records were decoded when they were built.
    source = RecordSource(data, split)
    names = emotions.in_labels(source.outline(i).labels for i in range(len(source)))

    def row(_: int, record: Record | None, answer: str) -> Row:
        assert record is not None
        return {
            "clip_id": record.clip_id,
            "language": record.language,
            "response": answer,
            "conclusion": sed.conclusion(answer, names),
            "labels": emotions.canonical_labels(record.labels),
            "annotation": dict(record.annotation),
        }

    return BenchmarkClips(records=source, row=row)


def _saber_elsewhere(path: Path, data: Path | None, split: str) -> list[Row]:
    """Lines with clip_id and response; labels and annotation come from DATA if they lack them."""
    truth = ("labels", "annotation", "language")
    rows = _lines(path, () if data else truth)
    if data:
        source = RecordSource(data, split)
        clips = [source.outline(i).clip_id for i in range(len(source))]
        rows = completeness.completed({row["clip_id"]: row for row in rows}, clips, data)
        for i, row in enumerate(rows):
            if not set(truth) <= set(row):
                record = source.outline(i)
                row |= {"labels": dict(record.labels), "annotation": dict(record.annotation)}
                row["language"] = record.language
    names = emotions.in_labels(row["labels"] for row in rows)
    for row in rows:
        row["labels"] = emotions.canonical_labels(row["labels"])
        said = row["conclusion"] if "conclusion" in row else sed.conclusion(row["response"], names)
        row["conclusion"] = said and emotions.canonical(said)
    return rows


def _saber_score(rows: Sequence[Row], judge: Judge | None) -> dict[str, Any]:
    ratings = (
        judge.rate_sections([(row["annotation"], row["response"]) for row in rows])
        if judge
        else None
    )
    scores = saber_test.score(rows, ratings)
    if judge:
        return scores | {"judge": judge.about, "missing": []}
    return scores | {"missing": ["judge scores of the six sections: need a judge (--judge)"]}


def _emer_clips(data: Path, split: str, settings: Settings) -> BenchmarkClips:
    del split
    clips = emer.read(data)
    files = [
        ClipFile(clip_id=clip.clip_id, path=_video(data, clip.clip_id), language=clip.language)
        for clip in clips
    ]
    order = longest_first(files)

    def row(i: int, _: Record | None, answer: str) -> Row:
        return emer.row(clips[order[i]], answer)

    return BenchmarkClips(records=ClipFiles([files[i] for i in order], settings), row=row)


def _video(data: Path, name: str) -> Path:
    found = [p for folder in ("video", "videos") for p in sorted((data / folder).glob(f"{name}.*"))]
    return found[0] if found else data / "video" / f"{name}.mp4"


def _emer_elsewhere(path: Path, data: Path | None, split: str) -> list[Row]:
    """Lines with clip_id and response; the ground truth comes from DATA if they lack it."""
    del split
    rows = _lines(path, () if data else ("reason",))
    if data:
        clips = emer.read(data)
        answers = {row["clip_id"]: row for row in rows}
        rows = completeness.completed(answers, [clip.clip_id for clip in clips], data)
        for clip, row in zip(clips, rows, strict=True):
            if "reason" not in row:
                row |= emer.row(clip, row["response"])
    for row in rows:
        row.setdefault("openset", None)
    return rows


def _lines(path: Path, truth: Sequence[str]) -> list[Row]:
    """Answers with clip_id, response and the entries `truth`, one for each clip.

    Raises ValueError naming the line of what lacks something, or is there twice.
    """
    rows, places = [], []
    for number, row in numbered_jsonl(path):
        if missing := [key for key in ("clip_id", "response", *truth) if key not in row]:
            raise ValueError(
                f"{path}:{number} lacks {', '.join(missing)}. A line has clip_id and response; "
                "the ground truth comes from --data."
            )
        rows.append(row)
        places.append(f"{path}:{number}")
    completeness.check_once(
        (row["clip_id"], place) for row, place in zip(rows, places, strict=True)
    )
    return rows


def _emobench_clips(data: Path, split: str, settings: Settings) -> BenchmarkClips:
    del split
    items = emobench_m.read(data)
    files = [
        ClipFile(
            clip_id=item["clip_id"],
            path=Path(item["path"]),
            language="en",
            question=item["question"],
        )
        for item in items
    ]
    order = longest_first(files)

    def row(i: int, _: Record | None, answer: str) -> Row:
        item = {key: value for key, value in items[order[i]].items() if key != "path"}
        return item | {"response": answer} | emobench_m.answered(item["task"], answer)

    return BenchmarkClips(records=ClipFiles([files[i] for i in order], settings), row=row)


def _emobench_elsewhere(path: Path, data: Path | None, split: str) -> list[Row]:
    """Rows with predictions, or with a response from which they are read. What is expected comes
    from DATA if they lack it."""
    del split
    results = emobench_m.results(path)
    if data:
        rows = _emobench_completed(results, data)
    else:
        named = [(emobench_m.clip_name(row), place) for place, row in results]
        completeness.check_once((clip, place) for clip, place in named if clip)
        rows = [row for _, row in results]
    for row in rows:
        task = emobench_m.TASKS.get(row["task"])
        said = any(key.startswith("predict") for key in row)
        if task and not said and "response" in row:
            row |= emobench_m.answered(row["task"], row["response"])
    return rows


def _emobench_completed(results: Sequence[tuple[str, Row]], data: Path) -> list[Row]:
    """A row for each of DATA's items of the tasks that these results are for."""
    # One result file is for one task; the others then count as not done, not as done badly.
    tasks = {row["task"] for _, row in results}
    items = [item for item in emobench_m.read(data) if item["task"] in tasks]
    clips = emobench_m.matched(results, items)
    places = [place for place, _ in results]
    completeness.check_once(zip(clips, places, strict=True))
    answers = {clip: row for clip, (_, row) in zip(clips, results, strict=True)}
    rows = completeness.completed(answers, [item["clip_id"] for item in items], data)
    return [
        {key: value for key, value in item.items() if key != "path"} | row
        for item, row in zip(items, rows, strict=True)
    ]


def _tables(data: Path) -> str:
    return fingerprint(data, "*.csv", "*.json", "*.jsonl")


BENCHMARKS = {
    "saber_test": Benchmark(
        clips=_saber_clips,
        data=lambda data: fingerprint(data, "**/*.array_record*"),
        made_elsewhere=_saber_elsewhere,
        score=_saber_score,
    ),
    "emer": Benchmark(
        clips=_emer_clips, data=_tables, made_elsewhere=_emer_elsewhere, score=emer.score
    ),
    "emobench_m": Benchmark(
        clips=_emobench_clips,
        data=_tables,
        made_elsewhere=_emobench_elsewhere,
        score=emobench_m_scores.score,
    ),
}


def digest(path: Path) -> str:
    """A short hash of a file, or of the JSON files of a folder."""
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
