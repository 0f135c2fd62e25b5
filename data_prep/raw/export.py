"""Stage `export`: clips, annotations and labels as `python -m data_prep.build` takes them.

OUT/saber/clips/ID.mp4           the clips (links where the disk allows it)
          annotations/ID.json    SABER JSON
          labels.jsonl           split, language, emotion, face, voice, conflict_type, kappa ...
          provenance.jsonl       per clip and field: the tool, model, prompt and parameters

Clips and annotations that the last run did not keep are deleted. labels.jsonl is written last.
"""

import filecmp
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.raw import shards, storage
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage
from saber_jax.data.records import LABELS
from saber_jax.runs.files import replacing

REASONS = {"missing": "the clip is no longer where it was"}


def run(stage: ShardedStage, source: ShardedStage, folder: str) -> dict[str, Any]:
    """Runs the stage; `folder` is OUT/saber, on a local disk. Returns the summary."""
    stage.claim(source.fingerprint())
    labels = f"{folder}/labels.jsonl"
    # Where nothing is left to do, the file stays as it is: data_prep.build goes by its time.
    unfinished = bool(stage.missing()) or not storage.exists(labels)
    if unfinished:
        # Until all clips are those of this run, data_prep.build has to fail: with labels of an
        # earlier one it would train on every clip that these do not name, test clips included.
        storage.delete(labels)
    summary = shards.run(stage, source, functools.partial(work, folder=folder))
    if removed := _remove_others(stage, Path(folder)):
        print(f"export: deleted {removed} files of clips that are not kept any more", flush=True)
    if unfinished:
        storage.write_lines(f"{folder}/provenance.jsonl", map(_provenance, stage.rows()))
        storage.write_lines(labels, map(_labels, stage.rows()))
    return summary


def work(rows: list[Row], folder: str) -> Iterator[Outcome]:
    """The stage, shard by shard; `folder` is OUT/saber, on a local disk.

    Raises OSError for a clip that is there but cannot be read or written.
    """
    for row in rows:
        try:
            _place(row["file"], Path(folder) / "clips" / _clip_name(row))
        except FileNotFoundError as error:
            yield Dropped(row=row, reason="missing", detail=str(error))
            continue
        text = json.dumps(row["annotation"], ensure_ascii=False, indent=2) + "\n"
        storage.write_text(f"{folder}/annotations/{_annotation_name(row)}", text)
        yield row


def _clip_name(row: Row) -> str:
    return f"{row['clip_id']}{Path(row['file']).suffix}"


def _annotation_name(row: Row) -> str:
    return f"{row['clip_id']}.json"


def _remove_others(stage: ShardedStage, folder: Path) -> int:
    """Deletes files of clips that an earlier run kept and this one does not; returns how many.

    A clip that this stage dropped keeps its file, which may be the last copy of a lost one. Without
    an annotation, data_prep.build refuses it.
    """
    wanted: dict[str, set[str]] = {"clips": set(), "annotations": set()}
    for shard in range(stage.shards):
        for row in stage.kept(shard):
            wanted["clips"].add(_clip_name(row))
            wanted["annotations"].add(_annotation_name(row))
        wanted["clips"].update(_clip_name(item["row"]) for item in stage.dropped(shard))
    removed = 0
    for part, names in wanted.items():
        for name in storage.names(str(folder / part)) - names:
            if not (path := folder / part / name).is_dir():
                path.unlink()
                removed += 1
    return removed


def build_command(folder: str, out: str, more: tuple[str, ...]) -> tuple[str, ...]:
    """The command that builds records from the export."""
    return (
        *("python", "-m", "data_prep.build", "--clips", f"{folder}/clips"),
        *("--annotations", f"{folder}/annotations", "--labels", f"{folder}/labels.jsonl"),
        *("--out", out, *more),
    )


def _place(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.local_copy(source) as path:
        # An earlier run may have put another clip under this name. A link is recognised unread.
        if target.exists() and filecmp.cmp(path, target):
            return
        with replacing(target) as partial:
            try:
                # os.link gives a symlink a second name, from which a relative one points elsewhere.
                os.link(path.resolve(), partial)
            except OSError:  # Another disk.
                shutil.copyfile(path, partial)


def _labels(row: Row) -> dict[str, str]:
    known = {key: row["labels"][key] for key in LABELS if row["labels"].get(key)}
    speaker = {"speaker": row["speaker"]} if row["speaker"] else {}
    base = {"clip_id": row["clip_id"], "split": row["split"], "language": row["language"]}
    return {**base, **known, **speaker}


def _provenance(row: Row) -> dict:
    return {
        "clip_id": row["clip_id"],
        "corpus": row["corpus"],
        "video": row["video"],
        "checks": row.get("checks", {}),
        "provenance": row["provenance"],
    }
