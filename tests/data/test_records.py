import contextlib
import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from saber_jax.data import annotations, reading, records
from saber_jax.runs import buckets, objects
from tests.bucket import bucket

GOOD = {
    "audio_desc": {"speech_content": "Hi.", "acoustic_feat": "calm"},
    "video_desc": " a kitchen ",
    "facial_exp_desc": "a smile",
    "body_lang_desc": "",
    "sentiment_analysis": "content",
}


def record(clip_id: str = "a", frames: int = 4) -> records.Record:
    rng = np.random.default_rng(0)
    return records.Record(
        clip_id=clip_id,
        language="zh",
        frames=rng.integers(0, 256, (frames, 28, 56, 3), np.uint8),
        seconds_per_grid=0.75,
        audio=rng.integers(-32768, 32768, 1234).astype(np.int16),
        annotation=dict.fromkeys(records.FIELDS, "好"),
        labels={"emotion": "sad"},
        provenance={"file": "a.mp4"},
    )


def test_annotation_comes_back_in_training_order_and_stripped():
    parsed = annotations.parse_annotation(dict(reversed(GOOD.items())))
    assert tuple(parsed) == records.FIELDS
    assert parsed["video_desc"] == "a kitchen"
    assert parsed["speech_content"] == "Hi."


def renamed(old: str, new: str) -> dict:
    return {new if key == old else key: value for key, value in GOOD.items()}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (GOOD | {"note": "x"}, "note leave"),
        (
            renamed("facial_exp_desc", "facial_expression_desc"),
            "facial_expression_desc facial_exp_desc",
        ),
        (
            renamed("sentiment_analysis", "sentimentAnalysis"),
            "sentimentAnalysis sentiment_analysis",
        ),
        (
            {**GOOD, "audio_desc": {"speech": "", "acoustic_feat": ""}},
            "audio_desc speech speech_content",
        ),
        ({k: v for k, v in GOOD.items() if k != "video_desc"}, "video_desc lacks"),
        ({**GOOD, "speech_content": "Hi"}, "unknown speech_content"),
        ({**GOOD, "video_desc": ["a"]}, "video_desc list"),
        ({**GOOD, "audio_desc": "calm"}, "audio_desc object str"),
        ({**GOOD, "video_desc": "a <|VIDEO|> b"}, "<|VIDEO|>"),
        ({**GOOD, "video_desc": "[acoustic_feat] b"}, "[acoustic_feat]"),
        ([GOOD], "object list"),
    ],
)
def test_a_wrong_annotation_is_refused_by_name(annotation, words):
    with pytest.raises(annotations.AnnotationError) as error:
        annotations.parse_annotation(annotation)
    for word in words.split():
        assert word in str(error.value)


def test_a_record_survives_storage_exactly():
    before = record()
    after = records.from_example(records.to_example(before))
    np.testing.assert_array_equal(after.frames, before.frames)
    np.testing.assert_array_equal(after.audio, before.audio)
    for name in ("clip_id", "language", "seconds_per_grid", "annotation", "labels", "provenance"):
        assert getattr(after, name) == getattr(before, name)


def test_a_clip_without_video_survives_storage():
    after = records.from_example(records.to_example(record(frames=0)))
    assert after.frames.shape == (0, 28, 56, 3)


class Written:
    """A split on disk as TFDS describes it, with records served from memory."""

    def __init__(self, directory, names):
        self.directory = directory / "saber" / "1.0.0"
        self.directory.mkdir(parents=True)
        half = len(names) // 2
        shards = [str(half), str(len(names) - half)]
        info = {"splits": [{"name": "train", "shardLengths": shards}]}
        (self.directory / "dataset_info.json").write_text(json.dumps(info))
        self.examples = [records.to_example(record(name)) for name in names]
        self.path = directory


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path, ["x", "y", "z"])


def opened(written) -> records.RecordSource:
    source = records.RecordSource(written.path, "train")
    source.__dict__["_source"] = written.examples
    return source


def test_outlines_stand_in_for_the_records_in_everything_but_the_media_s_content(written):
    expected = [(name, "zh", 4, 28, 56, 1234, 0.75) for name in "xyz"]
    assert opened(written).sizes == expected
    assert records.write_outlines(opened(written)) == 0
    written.examples.clear()
    source = opened(written)
    assert source.sizes == expected
    outline, whole = source.outline(1), record("y")
    assert outline.frames.shape == whole.frames.shape and outline.audio.shape == whole.audio.shape
    assert outline.frames.nbytes and outline.frames.base.nbytes == 1  # One byte, seen often.
    assert outline.annotation == whole.annotation and outline.labels == whole.labels


def test_a_damaged_record_is_named_by_file_and_place_and_marked_in_the_outlines(written):
    written.examples[2]["frames"] = written.examples[2]["frames"][:-1]
    assert records.write_outlines(opened(written)) == 1
    for read in (opened(written).__getitem__, opened(written).outline):
        assert read(1).clip_id == "y"
        with pytest.raises(records.BadRecordError, match=r"-train\.\*-00001-of-00002\[1\] cannot"):
            read(2)


@dataclasses.dataclass
class Shard:
    """Instructions of tensorflow-datasets to read a whole file."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@pytest.fixture
def shard(written, tmp_path, monkeypatch):
    """The file of all records of `written`, read by ArrayRecord as tensorflow-datasets does."""
    file = tmp_path / "shard"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for example in written.examples:
        writer.write(pickle.dumps(example))
    writer.close()

    class Source:
        def __init__(self):
            self._stored = ArrayRecordDataSource([Shard(str(file), 0, 3, 3)])

        def __getitem__(self, index):
            return pickle.loads(self._stored[index])

    builder = SimpleNamespace(as_data_source=lambda split: Source())
    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", lambda folder: builder)
    return file


def test_a_read_that_storage_fails_twice_is_tried_again_with_a_new_reader(
    written, shard, monkeypatch
):
    away, pauses = shard.with_name("away"), []
    shard.rename(away)

    def passing(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            away.rename(shard)

    monkeypatch.setattr(reading.time, "sleep", passing)
    source = records.RecordSource(written.path, "train")
    assert source[1].clip_id == "y" and pauses == [1, 2]
    assert source[2].clip_id == "z"


def test_a_record_that_storage_withholds_is_no_bad_record(written, shard, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    away = shard.with_name("away")
    shard.rename(away)
    shard.mkdir()  # Reading it fails: "read() failed: Is a directory".
    source = records.RecordSource(written.path, "train")
    for read in (source.__getitem__, source.outline):
        with pytest.raises(OSError, match=r"failed 3 times: read\(\) failed.*-train\.\*-00001"):
            read(1)
    with pytest.raises(OSError, match="failed 3 times"):
        records.write_outlines(source)
    shard.rmdir()
    away.rename(shard)
    assert source[1].clip_id == "y"


@pytest.mark.parametrize("place", [0, 65_536 + 24, 65_536 + 600, -1])
def test_a_flipped_bit_in_a_shard_is_damage_and_read_once(written, shard, place, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: pytest.fail("it waited"))
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 4
    shard.write_bytes(raw)
    source = records.RecordSource(written.path, "train")
    for index, name in enumerate("xyz"):
        with contextlib.suppress(records.BadRecordError):
            assert source[index].clip_id == name


@pytest.mark.parametrize("size", [0, 1000, 65_536, 70_000])
def test_a_shard_that_was_cut_off_is_damage(written, shard, size, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: pytest.fail("it waited"))
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(records.BadRecordError):
        records.RecordSource(written.path, "train")[2]


def test_a_record_is_found_by_name_and_by_number(written):
    source = opened(written)
    assert len(source) == 3
    assert source[source.index("y")].clip_id == source[-2].clip_id == "y"
    with pytest.raises(KeyError, match="nobody"):
        source.index("nobody")
    with pytest.raises(IndexError):
        source[3]


def test_a_source_travels_to_another_process_without_its_open_files(written):
    source = pickle.loads(pickle.dumps(opened(written)))
    assert "_source" not in vars(source)
    assert len(source) == 3


def test_a_missing_dataset_or_split_is_one_clear_error(written, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_prep\.build"):
        records.RecordSource(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"'tset'.*train"):
        records.RecordSource(written.path, "tset")


def test_records_of_a_bucket_are_asked_of_the_bucket(written, tmp_path, monkeypatch):
    place = tmp_path / "buckets/runs"  # Nothing is mounted here.
    opened_parts = []

    class Source:
        data_source = None

        def __getitem__(self, index):
            return self.data_source[index]

    parts = object()
    split = SimpleNamespace(file_instructions=parts)
    builder = SimpleNamespace(
        info=SimpleNamespace(splits={"train": split}), as_data_source=lambda split: Source()
    )

    def open_split(*given):
        opened_parts.append(given)
        return written.examples

    def builder_from_directory(folder):
        assert str(folder) == "gs://runs/r/saber/1.0.0"
        return builder

    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", builder_from_directory)
    monkeypatch.setattr(records.bucket_records, "open_split", open_split)
    here = opened(written).fingerprint
    with bucket("runs") as made:
        for variable, value in made.environ.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv(buckets.MOUNTS, f"{place}=gs://runs")
        objects.upload_folder(place / "r/saber/1.0.0", written.directory)
        source = records.RecordSource(place / "r", "train")
        assert source[1].clip_id == "y"
        assert source.fingerprint == here
    assert opened_parts == [(parts, here)]


@pytest.mark.parametrize("place", [*range(0, 100, 5), 65_535, 65_536, 65_560, 65_600, -1, -600])
def test_a_flipped_bit_in_the_outlines_costs_no_record(written, place):
    records.write_outlines(opened(written))
    expected = [written.examples[i]["clip_id"] for i in range(3)]
    file = records.outlines_file(opened(written).directory, "train")
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)
    source = opened(written)
    assert [source.outline(i).clip_id.encode() for i in range(3)] == expected
    assert source.sizes == [(name, "zh", 4, 28, 56, 1234, 0.75) for name in "xyz"]


@pytest.mark.parametrize("rest", [0, 1, 1000, 100_000])
def test_cut_off_outlines_are_named_and_the_records_read_instead(written, rest, caplog):
    records.write_outlines(opened(written))
    file = records.outlines_file(opened(written).directory, "train")
    file.write_bytes(file.read_bytes()[:rest])
    source = opened(written)
    assert [source.outline(i).clip_id for i in range(3)] == ["x", "y", "z"]
    assert caplog.text.count(f"{file} cannot be used") == 1


def test_a_fingerprint_of_records_changes_when_others_take_their_place(written):
    source = opened(written)
    before = source.fingerprint
    assert opened(written).fingerprint == before
    (source.directory / records.CHECKSUMS).write_text("0  shard\n")
    summed = opened(written).fingerprint
    (source.directory / records.CHECKSUMS).write_text("1  shard\n")
    assert len({before, summed, opened(written).fingerprint}) == 3
