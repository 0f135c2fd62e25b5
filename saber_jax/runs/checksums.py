"""Checksums beside a file, which detect changed bits: pairs.jsonl and pairs.jsonl.crc32.

FILE.crc32 is text, with a CRC-32 in hexadecimal per line: one of every line of a .jsonl file, or
one of all bytes of any other file. A JSON object can hold its own checksum: see `sealed`.
"""

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saber_jax.runs.files import opened, read_bytes, remove, write_bytes

SUFFIX = ".crc32"
CHECKSUM = "checksum"
"""The entry of a JSON object that is the checksum of all others."""


def of_json(content: Any) -> int:
    """A CRC-32 of JSON values, which are those that a file gives back."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object `content` and its checksum."""
    return {**content, CHECKSUM: of_json(dict(content))}


def beside(path: str | os.PathLike) -> Path:
    """Where the checksums of `path` are."""
    return Path(f"{os.fspath(path)}{SUFFIX}")


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[None]:
    """Around the writing of `path`: removes its old checksums before and writes new ones after.

    In between there are none, so that a process that is killed leaves no false ones.
    """
    remove(beside(path), missing_ok=True)
    yield
    write_bytes(beside(path), b"".join(_sums(Path(path))))


def check(path: str | os.PathLike) -> bool:
    """False if `path` has no checksums. Raises ValueError, naming the line, if they differ."""
    path, stored = Path(path), beside(path)
    try:
        wanted = read_bytes(stored).splitlines(keepends=True)
    except FileNotFoundError:
        return False
    for number, (want, found) in enumerate(itertools.zip_longest(wanted, _sums(path)), start=1):
        if want != found:
            place = f"{path}:{number}" if _has_lines(path) else f"{path}"
            raise ValueError(
                f"{place} is damaged: it is not what was written, according to {stored.name}. "
                "Make the file again, or copy both again from where they came from; delete "
                f"{stored.name} if you changed the file on purpose."
            )
    return True


def unchecked(path: str | os.PathLike) -> str:
    """What to say about a file without checksums."""
    return (
        f"{path} has no {beside(path).name}: it was written by hand or by an earlier version, and "
        "changed bits in it go unnoticed."
    )


def _has_lines(path: Path) -> bool:
    return path.suffix == ".jsonl"


def _sums(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        for part in file if _has_lines(path) else [file.read()]:
            yield f"{zlib.crc32(part):08x}\n".encode()
