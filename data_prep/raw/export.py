"""Stage `export`: clips, annotations and labels as `python -m data_prep.build` takes them.

OUT/saber/clips/ID.mp4           the clips (links where the disk allows it)
          annotations/ID.json    SABER JSON
          labels.jsonl           split, language, emotion, face, voice, conflict_type, kappa ...
          provenance.jsonl       per clip and field: the tool, model, prompt and parameters
"""

import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.raw import storage
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage
from saber_jax.data.records import LABELS
from saber_jax.runs.files import replacing

REASONS = {"missing": "the clip is no longer where it was"}


def work(rows: list[Row], folder: str) -> Iterator[Outcome]:
    """The stage, shard by shard; `folder` is OUT/saber, on a local disk.

    Raises OSError for a clip that is there but cannot be read or written.
    """
    for row in rows:
        suffix = Path(row["file"]).suffix
        target = Path(folder) / "clips" / f"{row['clip_id']}{suffix}"
        try:
            _place(row["file"], target)
        except FileNotFoundError as error:
            yield Dropped(row=row, reason="missing", detail=str(error))
            continue
        text = json.dumps(row["annotation"], ensure_ascii=False, indent=2) + "\n"
        storage.write_text(f"{folder}/annotations/{row['clip_id']}.json", text)
        yield row


def write(stage: ShardedStage, folder: str) -> None:
    """labels.jsonl and provenance.jsonl of all kept rows."""
    storage.write_lines(f"{folder}/labels.jsonl", map(_labels, stage.rows()))
    storage.write_lines(f"{folder}/provenance.jsonl", map(_provenance, stage.rows()))


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
