"""digests.json of an exported directory, which detects damaged tensors and configs.

    {"files": {"config.json": 2774310853}, "tensors": {"model.safetensors": [411880, 90021]}}

It has the CRC-32 of small files, and of every tensor's bytes, in the order of their file.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

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
    """`sums` by file name; the other files are read."""
    others = sorted(p for p in directory.iterdir() if p.name not in sums and p.is_file())
    files = {path.name: zlib.crc32(path.read_bytes()) for path in others}
    write_json(directory / FILE, {"files": files, "tensors": dict(sums)})


def read(directory: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Digests of tensors by file name, and what is wrong with the other files; nothing of both for
    a directory without digests."""
    path = directory / FILE
    if not path.is_file():
        return {}, []
    try:
        content = read_json(path)
        files, tensors = dict(content["files"]), dict(content["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        return {}, [f"{FILE} is damaged: {error!r}"]
    wrong = [f"{name} is missing" for name in files if not (directory / name).is_file()]
    wrong += [
        f"{name} is not what was exported; delete {FILE} if you changed it on purpose"
        for name, digest in files.items()
        if (directory / name).is_file() and zlib.crc32((directory / name).read_bytes()) != digest
    ]
    wrong += [f"{name} is missing" for name in tensors if not (directory / name).is_file()]
    return tensors, wrong
