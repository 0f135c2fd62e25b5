"""Result files that survive a SIGKILL: appended batch by batch, resumed at a batch boundary.

A journal's folder also holds `manifest.json`, which says what the results were computed from. A run
that was given other inputs is refused, so one folder never mixes two models or two corpora.

    manifest.json       {"checkpoint": "5f0c...", "split": "test", ...}
    predictions.jsonl   one line per finished item, in a fixed order
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

EDGE_BYTES = 1 << 20


class Journal:
    """The lines of `folder/name`, and what they were computed from (`inputs`, JSON values)."""

    def __init__(self, folder: str | os.PathLike, name: str, inputs: dict[str, Any]):
        """Creates the folder or joins it. Raises ValueError when it belongs to other inputs."""
        self.folder = Path(folder)
        self.path = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            if self.path.exists():
                raise ValueError(
                    f"{self.path} has no manifest.json beside it, so nobody knows which model made "
                    "it. Move it away or choose another --out."
                )
            write_json(manifest, inputs)
            return
        before = read_json(manifest)
        if changed := sorted(k for k in before | inputs if before.get(k) != inputs.get(k)):
            detail = "; ".join(f"{k}: {before.get(k)!r}, now {inputs.get(k)!r}" for k in changed)
            raise ValueError(
                f"{self.folder} was made from other inputs ({detail}); the two may not be mixed. "
                "Choose another --out, or delete that folder to start again."
            )

    def resume(self, boundaries: Iterable[int]) -> list[dict[str, Any]]:
        """Cuts the file back to the last of `boundaries` (line counts) and returns what is left.

        Batches keep their composition this way, so a resumed run repeats an uninterrupted one
        exactly. A half-written last line is dropped.
        """
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        lines = raw.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        keep = max((b for b in boundaries if b <= len(whole)), default=0)
        size = sum(map(len, whole[:keep]))
        if size < len(raw):
            os.truncate(self.path, size)
        return [json.loads(line) for line in whole[:keep]]

    def append(self, items: Sequence[dict[str, Any]]) -> None:
        """Writes one batch and returns when it is on the disk."""
        with self.path.open("ab") as f:
            f.write("".join(_line(item) for item in items).encode())
            f.flush()
            os.fsync(f.fileno())


def batches(total: int, size: int, *, first: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of every batch: batches(5, 2, first=1) -> [(1, 3), (3, 5), (5, 6)].

    `first` lines come before the first batch; `total` counts what comes after them.
    """
    stop = first + total
    return [(start, min(start + size, stop)) for start in range(first, stop, size)]


def read_json(path: str | os.PathLike) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON in one step: a reader sees the old file or the new one."""
    _replace(Path(path), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | os.PathLike, items: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, in one step."""
    _replace(Path(path), "".join(map(_line, items)))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads one JSON object a line."""
    with Path(path).open(encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def fingerprint(folder: str | os.PathLike, *patterns: str) -> str:
    """A short hash of the files below `folder` that match any of the glob `patterns`.

    Covers names, sizes and the first and last MiB of each, so it takes seconds for any model.
    Raises FileNotFoundError when nothing matches.
    """
    folder = Path(folder)
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    if not files:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(patterns)}. Check the path.")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as f:
            digest.update(f.read(EDGE_BYTES))
            f.seek(max(EDGE_BYTES, size - EDGE_BYTES))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    # A name of its own for every writer: several may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
