"""Reading and writing large files once, without filling the page cache.

A model larger than memory would evict everything else from the page cache, the kernel would have to
find a free page for each of its pages, and at the end the writer would wait for gigabytes of dirty
pages. So pages are dropped as soon as they were read or written to the disk, and writing to the
disk starts early. On a virtual machine, reading takes a third of the CPU time this way.
"""

import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from saber_jax.runs import files

EVERY = 256 * 2**20


def read(path: Path, nbytes: int, offset: int) -> np.ndarray:
    """Bytes of a file. Raises EOFError if it ends before."""
    # Not memory-mapped, because a mapped file counts as memory while it is open.
    out = np.empty(nbytes, np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < nbytes:
            count = file.readinto(out[done:].data)
            if not count:
                raise EOFError(f"{path} ends {nbytes - done} bytes before it should.")
            done += count
        _drop(file.fileno(), offset, nbytes)
    return out


def write(path: Path, parts: Iterable[np.ndarray | bytes]) -> None:
    """Writes `parts` to a file, one at a time; all are on the disk when this returns."""
    with files.naming(path), path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        settled: Future[None] = beside.submit(lambda: None)
        waiting = 0
        for part in parts:
            data = part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8).data
            file.write(data)
            waiting += len(data)
            if waiting >= EVERY:
                settled.result()
                settled, waiting = beside.submit(_settle, file.fileno()), 0
        settled.result()
        file.flush()
        _settle(file.fileno())


class PageDropper:
    """Drops the pages of a directory's files regularly while they are read or written."""

    def __init__(self, directory: Path):
        self._directory, self._since = directory, 0
        self._lock = threading.Lock()

    def report(self, nbytes: int) -> None:
        """`nbytes` more were read, or written to the disk."""
        with self._lock:
            self._since += nbytes
            if self._since < EVERY:
                return
            self._since = 0
        for path in self._directory.rglob("*"):
            # Temporary files may disappear.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as file:
                _drop(file.fileno(), 0, 0)


def _settle(file: int) -> None:
    os.fsync(file)
    _drop(file, 0, 0)


def _drop(file: int, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):  # Linux has it, macOS has not.
        os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_DONTNEED)
