import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from data_prep.records import dataset, disk_sort
from saber_jax.data import records
from tests import synthetic

SPLITS = {"train": range(12), "test": range(12, 15)}
BEAM = ("--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local")
    assert dataset.write(out, SPLITS, synthetic.record) == {"test": 3, "train": 12}
    return out / "saber" / "1.0.0"


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sha256sum", "--check", "--quiet", records.CHECKSUMS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def stored(folder: Path, split: str) -> list[dict[str, bytes]]:
    """All records in their order, as bytes. Not the files': fields have no order in them."""
    source = tfds.builder_from_directory(folder).as_data_source(split=split)
    return [{name: np.asarray(value).tobytes() for name, value in row.items()} for row in source]


def test_the_progress_bars_of_several_splits_are_shown_one_after_the_other(tmp_path, capfd):
    dataset.write(tmp_path, {"train": range(2), "test": range(2, 4)}, synthetic.record)
    shown = capfd.readouterr().err
    assert "write train: 100%" in shown and "write test: 100%" in shown
    assert "\x1b[A" not in shown  # tqdm's way up to a bar that is still open.


def test_beam_writes_the_same_records_in_the_same_order_as_one_process(local, tmp_path):
    # The order in which clips come does not matter either.
    items = {split: list(reversed(ids)) for split, ids in SPLITS.items()}
    dataset.write(tmp_path, items, synthetic.record, beam=BEAM)
    for split in SPLITS:
        assert stored(tmp_path / "saber" / "1.0.0", split) == stored(local, split)


def test_a_split_larger_than_memory_comes_out_as_a_small_one(local, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 300_000)  # Of three records.
    deleted, delete = [], disk_sort.Bucket.del_file

    def watched(bucket):
        deleted.append(len(bucket))
        delete(bucket)

    monkeypatch.setattr(disk_sort.Bucket, "del_file", watched)
    dataset.write(tmp_path, SPLITS, synthetic.record)
    assert sum(deleted) == 15
    for split in SPLITS:
        assert stored(tmp_path / "saber" / "1.0.0", split) == stored(local, split)
    assert not list(tmp_path.rglob("*bucket*"))


def test_tfds_reads_any_record_of_the_data_source(local):
    source = tfds.data_source("saber", data_dir=local.parents[1], split="train")
    assert len(source) == 12
    expected = records.RecordSource(local, "train")
    for index in (7, 0, 11):
        assert source[index]["clip_id"].decode() == expected[index].clip_id
        assert source[index]["audio"] == expected[index].audio.tobytes()


def test_the_dataset_knows_its_version_and_what_its_features_mean(local):
    info = dataset.Saber(data_dir=local.parents[1]).info
    assert str(info.version) == max(info.release_notes)
    assert all(feature.doc.desc for feature in info.features.values())
    assert set(info.splits) == set(SPLITS)


def test_a_damaged_copy_fails_its_checksums(local, tmp_path):
    assert checked(local).returncode == 0
    for file in local.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("saber-train*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name}: FAILED" in checked(tmp_path).stdout
