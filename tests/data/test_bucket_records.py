"""Records of a mounted bucket are read around its mount, and once."""

import urllib.parse
import urllib.request

import numpy as np
import pytest
from tensorflow_datasets.core.utils.shard_utils import FileInstruction

from saber_jax.data import bucket_records
from saber_jax.runs import buckets
from tests.bucket import bucket

RECORDS = [np.random.default_rng(i).bytes(20_000) for i in range(5)]


@pytest.fixture(autouse=True)
def any_disk_has_room(monkeypatch):
    monkeypatch.setattr(bucket_records, "LEFT_FREE", 0)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A bucket with one file of RECORDS, of which nothing can be read through the mount."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "file"), "group_size:1")
    for data in RECORDS:
        writer.write(data)
    writer.close()
    with bucket("runs") as made:
        name = urllib.parse.quote("records/file", safe="")
        upload = urllib.request.Request(
            f"{made.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/runs/o"
            f"?uploadType=media&name={name}",
            (tmp_path / "file").read_bytes(),
        )
        urllib.request.urlopen(upload).read()
        for variable, value in made.environ.items():
            monkeypatch.setenv(variable, value)
        mount = tmp_path / "mount"  # Empty: whoever reads through it finds nothing.
        monkeypatch.setenv(buckets.MOUNTS, f"{mount}=gs://runs")
        monkeypatch.setenv(bucket_records.FOLDER, str(tmp_path / "kept"))
        whole = FileInstruction(
            filename=f"{mount}/records/file", skip=0, take=-1, examples_in_shard=len(RECORDS)
        )
        made.part = [FileInstruction(**vars(whole) | {"take": len(RECORDS)})]
        yield made


def test_records_are_asked_of_the_bucket_once_though_it_is_busy(made):
    made.unavailable, made.latency = 3, 0.005
    for _ in range(2):
        source = bucket_records.open_split(made.part, "abc")
        assert [source[i] for i in range(len(source))] == RECORDS
    assert made.refused
    asked = made.requests
    assert source[3] == RECORDS[3]
    assert made.requests == asked


class Counted(list):
    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)


def test_what_was_kept_of_other_records_or_damaged_is_not_used(tmp_path):
    source = Counted(RECORDS)
    first, other = (bucket_records.CachedRecords(source, tmp_path / name) for name in "ab")
    assert [first[1], first[1], other[1]] == [RECORDS[1]] * 3
    assert source.asked == 2
    (tmp_path / "a/0/1").write_bytes(b"torn")
    assert first[1] == RECORDS[1] and source.asked == 3


def test_a_full_disk_keeps_nothing_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_records, "LEFT_FREE", 2**62)
    source = Counted(RECORDS)
    kept = bucket_records.CachedRecords(source, tmp_path)
    assert [kept[1], kept[1]] == [RECORDS[1]] * 2
    assert source.asked == 2 and not [p for p in tmp_path.rglob("*") if p.is_file()]
