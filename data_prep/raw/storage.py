"""Files of the data pipeline, on a local disk or in a bucket (gs://, s3://, ...) through fsspec.

A bucket needs its fsspec package (gcsfs, s3fs); a path without `://` is local.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from saber_jax.data import texts
from saber_jax.runs import files


def join(folder: str, *names: str) -> str:
    """A path below `folder`, on a disk or in a bucket."""
    return "/".join([folder.rstrip("/"), *names])


def is_local(path: str) -> bool:
    return "://" not in path


def absolute(path: str) -> str:
    """The path for readers in any folder; an address in a bucket is one already."""
    return os.path.abspath(path) if is_local(path) else path


def exists(path: str) -> bool:
    fs, name = fsspec.core.url_to_fs(path)
    return fs.exists(name)


def names(folder: str) -> set[str]:
    """Names of the files in `folder`; none if there is no such folder."""
    fs, name = fsspec.core.url_to_fs(folder)
    fs.invalidate_cache(name)
    try:
        return {os.path.basename(path.rstrip("/")) for path in fs.ls(name, detail=False)}
    except FileNotFoundError:
        return set()


def write_text(path: str, text: str) -> None:
    """Writes atomically: a reader sees the old file or the complete new one."""
    fs, name = fsspec.core.url_to_fs(path)
    fs.makedirs(os.path.dirname(name), exist_ok=True)
    if not is_local(path):
        fs.pipe_file(name, text.encode())  # Writing an object to a bucket is atomic.
        return
    files.write_text(name, text)


def read_text(path: str) -> str:
    """Raises FileNotFoundError."""
    fs, name = fsspec.core.url_to_fs(path)
    return fs.cat_file(name).decode("utf-8")


def delete(path: str) -> None:
    """Deletes a file or a folder with its contents, if it exists."""
    fs, name = fsspec.core.url_to_fs(path)
    if fs.exists(name):
        fs.rm(name, recursive=True)


def write_json(path: str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str) -> Any:
    return json.loads(read_text(path))


def write_lines(path: str, items: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in texts.lines(read_text(path))]


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """The local file, or a temporary local copy of a file in a bucket."""
    if is_local(path):
        yield Path(path)
        return
    fs, name = fsspec.core.url_to_fs(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / os.path.basename(name)
        fs.get_file(name, str(copy))
        yield copy


@contextlib.contextmanager
def new_file(path: str) -> Iterator[Path]:
    """A local path to write to; on success the file appears at `path` atomically."""
    suffix = os.path.splitext(path)[1]
    fs, name = fsspec.core.url_to_fs(path)
    fs.makedirs(os.path.dirname(name), exist_ok=True)
    folder = os.path.dirname(name) if is_local(path) else None
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=f".partial{suffix}")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        if is_local(path):
            os.replace(temporary, name)
        else:
            fs.put_file(temporary, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
