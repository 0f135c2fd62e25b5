"""Records that become unreadable after they were built."""

from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from saber_jax.data.records import RecordSource


def tear(folder: Path, split: str, *indices: int) -> None:
    """Truncates these records of a split, whose outlines, if there are any, keep their sizes."""
    [file] = RecordSource(folder, split).directory.glob(f"*-{split}.array_record-*")
    stored = ArrayRecordReader(str(file)).read_all()
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for index, data in enumerate(stored):
        writer.write(data[: len(data) // 2] if index in indices else data)
    writer.close()
