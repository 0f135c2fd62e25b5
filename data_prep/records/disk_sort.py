"""Sorting a split that is larger than memory, with tensorflow-datasets but without TensorFlow.

tensorflow-datasets sorts records by their hashed keys. For more than a gigabyte it uses a thousand
bucket files; its own class for them needs TensorFlow and keeps all of them open. It has no public
option to use another class, so `without_tensorflow` replaces the private one by ours;
tests/data_prep/records/test_disk_sort.py fails when a new version moves or changes it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tensorflow_datasets.core import shuffle

KEY_BYTES, SIZE_BYTES = 16, 8


class Bucket:
    """A file of (key, bytes) pairs, open only while it is read or written."""

    def __init__(self, path: os.PathLike[str]):
        self._path, self._length, self.size = Path(path), 0, 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: int, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(key.to_bytes(KEY_BYTES, "big"))
            file.write(len(data).to_bytes(SIZE_BYTES, "big") + data)
        self._length += 1
        self.size += len(data)

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        if not self._length:
            return
        with self._path.open("rb") as file:
            while key := file.read(KEY_BYTES):
                size = int.from_bytes(file.read(SIZE_BYTES), "big")
                yield int.from_bytes(key, "big"), file.read(size)

    def del_file(self) -> None:
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Makes tensorflow-datasets use `Bucket` inside the `with` block."""
    theirs = shuffle._Bucket
    shuffle._Bucket = Bucket
    try:
        yield
    finally:
        shuffle._Bucket = theirs
