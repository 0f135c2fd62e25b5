"""Records of a bucket: read by ranges from the bucket itself, and kept on this host's disk.

A mount reads through a cache of its own, file by file, and fails in ways that a bucket does not
(ESTALE). ArrayRecord's reader speaks to Cloud Storage directly: a record is one request for its
bytes, tried again by the client library when the bucket is busy. Every epoch reads a record once
more, so each is kept on local disk, as long as that has room:

    SABER_RECORD_CACHE    the folder; by default saber_records in the system's temporary folder;
                          empty: nothing is kept

Whatever is in that folder may be deleted at any time.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from saber_jax.runs import buckets, files

FOLDER = "SABER_RECORD_CACHE"
LEFT_FREE = 20 * 2**30
"""Bytes of the disk that are left to others: the environment, logs, what else is written there."""

CHECKSUM_BYTES = 4


class StoredRecords(Protocol):
    """Records as they are stored, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, record_key: SupportsIndex, /) -> bytes: ...


def open_split(instructions: list[Any], fingerprint: str) -> StoredRecords:
    """The records that `instructions` of tensorflow-datasets name by files of a mounted bucket.

    `fingerprint` changes with the records: what was kept of others is not taken for them.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    direct = [
        dataclasses.replace(part, filename=str(buckets.native(part.filename)))
        for part in instructions
    ]
    source = ArrayRecordDataSource(direct)
    folder = os.environ.get(FOLDER, str(Path(tempfile.gettempdir()) / "saber_records"))
    return CachedRecords(source, Path(folder) / fingerprint) if folder else source


class CachedRecords:
    """Records that are read from `source` once, and then from files in `folder`.

    Safe to use from many processes. A damaged file is read from the source again.
    """

    def __init__(self, source: StoredRecords, folder: Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, record_key: SupportsIndex, /) -> bytes:
        index = record_key.__index__()
        # Folders of a thousand: a directory of a million files is slow to look into.
        path = self._folder / str(index // 1000) / str(index)
        kept = _read(path)
        if kept is not None:
            return kept
        data = self._source[index]
        with contextlib.suppress(OSError):  # A full or broken disk costs time, not the run.
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free - len(data) > LEFT_FREE:
                _write(path, data)
        return data


def _read(path: Path) -> bytes | None:
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    checksum, data = stored[:CHECKSUM_BYTES], stored[CHECKSUM_BYTES:]
    return data if checksum == _checksum(data) else None


def _write(path: Path, data: bytes) -> None:
    # Flushing would take longer than reading it again: the checksum shows what a crash left.
    with files.replacing(path, flush=False) as partial:
        partial.write_bytes(_checksum(data) + data)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")
