"""The files of a run, on a disk or in a bucket; they are written atomically.

A process may be killed at any moment and a disk may be full. A reader sees the old content or the
complete new one: a file is written next to its destination and then moved there. A path below a
bucket's folder (runs/buckets.py) stands for an object of the bucket (runs/objects.py).
"""

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from saber_jax.runs import buckets, objects

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder. A folder of a bucket exists if anything is in it."""
    return objects.exists(Path(path)) if buckets.mounted(path) else Path(path).exists()


def read_bytes(path: str | os.PathLike) -> bytes:
    return objects.read(Path(path)) if buckets.mounted(path) else Path(path).read_bytes()


def read_text(path: str | os.PathLike) -> str:
    """Reads UTF-8 text."""
    if buckets.mounted(path):
        return objects.read(Path(path)).decode()
    return Path(path).read_text(encoding="utf-8")


def opened(path: str | os.PathLike) -> BinaryIO:
    """A file to read bytes from; an object of a bucket is in memory."""
    if buckets.mounted(path):
        return io.BytesIO(objects.read(Path(path)))
    return Path(path).open("rb")


def read_edges(path: str | os.PathLike, size: int, most: int) -> bytes:
    """The first and last `most` bytes of a file of `size` bytes; no byte twice."""
    second = max(most, size - most)
    if buckets.mounted(path):
        parts = [(0, min(most, size)), (second, size)]
        return b"".join(objects.read(Path(path), *part) for part in parts if part[0] < part[1])
    with Path(path).open("rb") as file:
        first = file.read(most)
        file.seek(second)
        return first + file.read()


def listed(folder: str | os.PathLike, pattern: str = "*") -> list[Path]:
    """Files and folders directly in `folder` whose names match, sorted; [] without a folder."""
    folder = Path(folder)
    if buckets.mounted(folder):
        return [folder / name for name in objects.names(folder, pattern)]
    return sorted(folder.glob(pattern))


def sizes(folder: str | os.PathLike, pattern: str) -> dict[Path, int]:
    """Path and size of all files below `folder` that match a glob pattern, such as "a/**/*"."""
    folder = Path(folder)
    if buckets.mounted(folder):
        return {folder / name: size for name, size in objects.sizes(folder, pattern).items()}
    return {path: path.stat().st_size for path in sorted(folder.glob(pattern)) if path.is_file()}


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder and those above it, if they are missing. A bucket has none."""
    if not buckets.mounted(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def remove(path: str | os.PathLike, *, missing_ok: bool = False) -> None:
    """Removes a file."""
    if not buckets.mounted(path):
        Path(path).unlink(missing_ok=missing_ok)
        return
    with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
        objects.remove(Path(path))


def remove_folder(path: str | os.PathLike, *, ignore_errors: bool = False) -> None:
    """Removes a folder with everything in it."""
    if not buckets.mounted(path):
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
        objects.remove_folder(Path(path))


def move(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Renames a file or folder; in a bucket the objects of a folder move one after another."""
    if buckets.mounted(source):
        objects.move(Path(source), Path(target))
        return Path(target)
    return Path(source).rename(target)


def create(path: str | os.PathLike, text: str) -> None:
    """Writes a file that does not exist yet. Raises FileExistsError if it does."""
    path = Path(path)
    if buckets.mounted(path):
        objects.write(path, text.encode(), new=True)
        return
    file = path.open("x", encoding="utf-8")
    try:
        with naming(path), file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def append(path: str | os.PathLike, data: bytes) -> None:
    """Appends to a file and flushes it to its disk. An object of a bucket is written again."""
    if buckets.mounted(path):
        objects.write(Path(path), (read_bytes(path) if exists(path) else b"") + data)
        return
    with naming(path), Path(path).open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def truncate(path: str | os.PathLike, size: int) -> None:
    """Removes what follows the first `size` bytes."""
    if buckets.mounted(path):
        objects.write(Path(path), read_bytes(path)[:size])
    else:
        os.truncate(path, size)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Makes errors of the disk an OSError with the name of the file.

    Python leaves it out when a disk is full, and ArrayRecord raises RuntimeError for everything.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except RuntimeError as error:
        found = [code for code in DISK_ERRORS if os.strerror(code) in str(error)]
        if not found:
            raise
        raise OSError(found[0], os.strerror(found[0]), os.fspath(path)) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, flush: bool = True) -> Iterator[Path]:
    """A path to write a file to; it replaces `path` if the block succeeds.

    The file is flushed to the disk before it is moved; without `flush` a crash of the machine may
    leave a part of it. If the block raises, `path` is unchanged and the temporary file is removed.
    """
    path = Path(path)
    if buckets.mounted(path):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / path.name
            yield partial
            objects.upload(path, partial)
        return
    # A unique name, because processes of several machines may write the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with naming(path):
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
    moment between removing the old `path` and moving the new one, neither exists. In a bucket, that
    lasts until all files have been copied there from this machine's disk.
    """
    path = Path(path)
    if buckets.mounted(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            objects.remove_folder(path)
            objects.upload_folder(path, Path(folder))
        return
    partial = path.with_name(f".{path.name}.partial") if partial is None else Path(partial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming(path):
            yield partial
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically."""
    if buckets.mounted(path):
        objects.write(Path(path), data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


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
        return parse_json(read_text(path))
    except ValueError as error:  # Of JSON, or of UTF-8.
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads one JSON object a line. Raises ValueError naming the file and line that is none."""
    return [item for _, item in numbered_jsonl(path)]


def numbered_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` one by one, each object with the number of its line, from 1."""
    with opened(path) as file:
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
