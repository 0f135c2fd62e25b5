"""digests.json of an exported directory, which detects damaged tensors and configs.

    {"files": {"config.json": 2774310853}, "headers": {"model.safetensors": 3301822},
     "tensors": {"model.safetensors": [411880, 90021]}, "checksum": 1881443}

It has the CRC-32 of small files, of what comes before the first tensor of a file, and of every
tensor's bytes, in the order of their file. `checksum` is that of the others; exports of earlier
versions have neither it nor `headers`.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from saber_jax.runs import checksums
from saber_jax.runs.files import read_json, write_json

FILE = "digests.json"


def crc(array: np.ndarray) -> int:
    """Of the bytes of an array in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def noted(arrays: Iterable[np.ndarray], sums: list[int]) -> Iterator[np.ndarray]:
    """Yields the arrays and appends their digests to `sums`."""
    for array in arrays:
        sums.append(crc(array))
        yield array


def write(directory: Path, sums: Mapping[str, list[int]]) -> None:
    """`sums` are those of tensors by file name; the rest is read."""
    others = sorted(p for p in directory.iterdir() if p.name not in sums and p.is_file())
    content = {
        "files": {path.name: zlib.crc32(path.read_bytes()) for path in others},
        "headers": {name: _header_crc(directory / name) for name in sums},
        "tensors": dict(sums),
    }
    write_json(directory / FILE, checksums.sealed(content))


def read(directory: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Digests of tensors by file name, and what is wrong with headers and other files; nothing of
    both for a directory without digests."""
    path = directory / FILE
    if not path.is_file():
        return {}, []
    try:
        content = read_json(path)
        if content.pop(checksums.CHECKSUM, None) not in (None, checksums.of_json(content)):
            return {}, [f"{FILE} is damaged: it is not what was exported"]
        files, tensors = dict(content["files"]), dict(content["tensors"])
        headers = dict(content.get("headers", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{FILE} is damaged: {error!r}"]
    lost = [name for name in (*files, *tensors) if not (directory / name).is_file()]
    wrong = [f"{name}, which {FILE} lists, is missing" for name in lost]
    wrong += [
        f"{name} is not what was exported; delete {FILE} if you changed it on purpose"
        for name, digest in files.items()
        if name not in lost and zlib.crc32((directory / name).read_bytes()) != digest
    ]
    wrong += [
        f"{name} has a damaged header: it is not what was exported"
        for name, digest in headers.items()
        if name not in lost and _header_crc(directory / name) != digest
    ]
    return tensors, wrong


def _header_crc(path: Path) -> int:
    """Of a safetensors file's bytes before its first tensor."""
    with path.open("rb") as file:
        length = file.read(8)
        # A damaged length may be more than the memory holds.
        most = min(int.from_bytes(length, "little"), path.stat().st_size)
        return zlib.crc32(length + file.read(most))
