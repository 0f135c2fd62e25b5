"""Atomic writing of files: they are written next to their destination and then moved there.

A process may be killed at any moment and a disk may be full. A reader sees the old content or the
complete new one.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, flush: bool = True) -> Iterator[Path]:
    """A path to write a file to; it replaces `path` if the block succeeds.

    The file is flushed to the disk before it is moved; without `flush` a crash of the machine may
    leave a part of it. If the block raises, `path` is unchanged and the temporary file is removed.
    """
    path = Path(path)
    # A unique name, because processes of several machines may write the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        if flush:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(
    path: str | os.PathLike, *, partial: str | os.PathLike | None = None
) -> Iterator[Path]:
    """An empty folder to write to; it replaces the folder `path` if the block succeeds.

    The folder is `partial`, on the same disk as `path`; by default .NAME.partial next to it. What
    an earlier attempt left there is removed first. If the block raises, `path` is unchanged. For a
    moment between removing the old `path` and moving the new one, neither exists.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial") if partial is None else Path(partial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | os.PathLike, items: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    write_text(path, "".join(map(json_line, items)))


def json_line(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError in two more cases.

    If an object has a key twice, json.loads keeps the last value only, so the first would be lost.
    For lists in lists without end it raises RecursionError.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it has too many lists or objects inside each other") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)!r} twice")
    return found


def read_json(path: str | os.PathLike) -> Any:
    """Reads what `write_json` wrote. Raises ValueError naming a damaged file and the line."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # Of JSON, or of UTF-8.
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads one JSON object a line. Raises ValueError naming the file and line that is none."""
    return [item for _, item in numbered_jsonl(path)]


def numbered_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` one by one, each object with the number of its line, from 1."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}).") from error
            if not isinstance(item, dict):
                kind = type(item).__name__
                raise ValueError(f"{path}:{number} is not a JSON object but a {kind}.")
            yield number, item
