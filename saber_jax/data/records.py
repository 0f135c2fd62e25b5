"""SABER records: one clip, ready to train on, and random access to them on disk.

Records are written by `python -m data_prep.build` through tensorflow-datasets as ArrayRecord files.
Reading needs neither TensorFlow nor the original video.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import runpy
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int16, UInt8

from saber_jax.data import bucket_records, reading
from saber_jax.runs import buckets, files
from saber_jax.runs.files import replacing
from saber_jax.runs.manifest import fingerprint

LANGUAGES = ("en", "zh")

FIELDS: tuple[str, ...] = (
    "video_desc",
    "facial_exp_desc",
    "body_lang_desc",
    "acoustic_feat",
    "speech_content",
    "sentiment_analysis",
)
"""The six annotated sections in SED order: what is seen, what is heard, the reasoning."""

AUDIO_GROUP = "audio_desc"
AUDIO_FIELDS = ("speech_content", "acoustic_feat")
LABELS = ("emotion", "face", "voice", "words", "conflict_type", "kappa", "speaker")
"""Optional labels of a clip, all strings; emotion is the fused conclusion, kappa in 0.0..1.0."""


class BadRecordError(ValueError):
    """A record that is damaged or violates its schema, so that reading it again will not help.

    Training leaves such records out and lists them (data/quarantine.py). Any other exception counts
    as an error of the code and ends the run.
    """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One clip: frames, 16 kHz mono sound, and what is said about them.

    T is even, 1 for a still image, 0 without any; H and W are multiples of 28. `seconds_per_grid`
    is the time between two frame pairs. With `audio_in_video` the sound is interleaved with the
    video instead of following it, as with use_audio_in_video in transformers. `annotation` maps
    FIELDS to text and `labels` some of LABELS to text. `provenance` describes the source file and
    the settings. `question` replaces the usual request; it is not stored on disk. A record of
    another task has a conversation instead of an annotation: `messages` with "role" and "content",
    in which <video>, <audio> and <image> stand for the clip's media, and the `answer`.
    """

    clip_id: str
    language: str
    frames: UInt8[np.ndarray, "T H W 3"]
    seconds_per_grid: float
    audio: Int16[np.ndarray, " n"]
    annotation: Mapping[str, str]
    labels: Mapping[str, str]
    provenance: Mapping[str, Any]
    audio_in_video: bool = False
    question: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    answer: str | None = None


def to_example(record: Record) -> dict[str, Any]:
    """A record as the flat features stored on disk."""
    return {
        "clip_id": record.clip_id.encode(),
        "language": record.language.encode(),
        "frames": np.ascontiguousarray(record.frames).tobytes(),
        "frames_shape": np.asarray(record.frames.shape[:3], np.int32),
        # Not float32: interleaved sound is cut at float64 times, see tmrope.woven.
        "seconds_per_grid": np.float64(record.seconds_per_grid),
        "audio": np.asarray(record.audio, "<i2").tobytes(),
        "annotation": _json(record.annotation),
        "labels": _json(record.labels),
        "provenance": _json(record.provenance),
        "audio_in_video": np.bool_(record.audio_in_video),
        "messages": json.dumps(list(record.messages), ensure_ascii=False).encode(),
        "answer": (record.answer or "").encode(),
    }


def from_example(example: Mapping[str, Any]) -> Record:
    """Inverse of `to_example`; arrays are read-only views of the stored bytes.

    Raises ValueError for an unknown language, and for a record without messages whose annotation
    lacks a section.
    """
    shape = tuple(int(size) for size in example["frames_shape"])
    record = Record(
        clip_id=example["clip_id"].decode(),
        language=example["language"].decode(),
        frames=np.frombuffer(example["frames"], np.uint8).reshape(*shape, 3),
        seconds_per_grid=float(example["seconds_per_grid"]),
        audio=np.frombuffer(example["audio"], "<i2"),
        annotation=json.loads(example["annotation"]),
        labels=json.loads(example["labels"]),
        provenance=json.loads(example["provenance"]),
        audio_in_video=bool(example["audio_in_video"]),
        messages=tuple(json.loads(example.get("messages", b"[]"))),
        answer=example.get("answer", b"").decode() or None,
    )
    if record.language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {record.language!r}")
    missing = [field for field in FIELDS if field not in record.annotation]
    if missing and not record.messages:
        raise ValueError(f"the annotation lacks {', '.join(missing)}")
    return record


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), ensure_ascii=False).encode()


ClipSize = tuple[str, str, int, int, int, int, float]
"""(clip_id, language, T, H, W, audio_samples, seconds_per_grid)."""

CHECKSUMS = "SHA256SUMS"
"""File next to the shards; `sha256sum --check SHA256SUMS` verifies a copy of them."""


class RecordSource:
    """Random access to one split of built records. Picklable; safe to use from many processes."""

    def __init__(self, path: str | Path, split: str):
        """`path` is the --out directory of data_prep.build (or the dataset inside it).

        Raises FileNotFoundError without records there, ValueError for an unknown split.
        """
        self.path = Path(path)
        self.split = split
        self.directory = _dataset_directory(self.path)
        splits = _splits(self.directory)
        if split not in splits:
            raise ValueError(f"No split {split!r} in {self.path}; it has {', '.join(splits)}.")
        self._shards = splits[split]
        self._warned = False

    def __len__(self) -> int:
        return sum(self._shards)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecordError if the stored bytes are not a valid record, and OSError if storage
        does not return them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Record {index} of {len(self)} in split {self.split!r}.")
        index = int(index) % len(self)
        try:
            return from_example(self._read(index))
        except OSError:
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            raise BadRecordError(f"{self.where(index)} cannot be read: {detail}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Excludes open files; every process opens its own."""
        keep = ("path", "split", "directory", "_shards", "_warned")
        return {name: self.__dict__[name] for name in keep}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes if the records are replaced by others; reads no record.

        Computed from the names, sizes and stored checksums of the files; for records without
        checksums, from the first and last MiB of every file.
        """
        summed = files.exists(self.directory / CHECKSUMS)
        shards = f"*-{self.split}.array_record*"
        sizes = [(file.name, size) for file, size in files.sizes(self.directory, shards).items()]
        patterns = (CHECKSUMS,) if summed else (shards,)
        content = fingerprint(self.directory, "dataset_info.json", *patterns)
        return hashlib.sha256(repr((self.split, sizes, content)).encode()).hexdigest()[:16]

    def where(self, index: int) -> str:
        """The file of a record and its place in it: "...array_record-00002-of-00008[17]"."""
        stops = np.cumsum(self._shards)
        shard, total = int(np.searchsorted(stops, index, side="right")), len(stops)
        inside = index - int(stops[shard]) + self._shards[shard]
        return f"{self.directory.name}/*-{self.split}.*-{shard:05d}-of-{total:05d}[{inside}]"

    def index(self, clip_id: str) -> int:
        """Position of a clip; KeyError if this split does not hold it."""
        if clip_id not in self._positions:
            raise KeyError(f"No clip {clip_id!r} in split {self.split!r} of {self.path}.")
        return self._positions[clip_id]

    def outline(self, index: int) -> Record:
        """The record with media of the right shapes but without content, which is cheap to read.

        It is read from the file that `write_outlines` wrote, or else from the record itself. Raises
        BadRecordError as reading the record does.
        """
        outlines = self._outlines
        if outlines is None:
            return self[index]
        try:
            return _from_outline(outlines[index])
        except BadRecordError:
            raise
        except Exception as error:  # Readers raise exceptions of any type for a damaged file.
            self._read_records_instead(error)
            return self[index]

    @functools.cached_property
    def sizes(self) -> list[ClipSize]:
        """The sizes of all clips, from which generation computes its buffers."""
        return [clip_size(self.outline(index)) for index in range(len(self))]

    @functools.cached_property
    def _positions(self) -> dict[str | None, int]:
        return {clip_id: index for index, clip_id in enumerate(self._clip_ids())}

    def _clip_ids(self) -> Iterator[str | None]:
        for index in range(len(self)):
            try:
                yield self.outline(index).clip_id
            except BadRecordError:
                yield None

    @functools.cached_property
    def _outlines(self):
        file = outlines_file(self.directory, self.split)
        if not files.exists(file):
            return None
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            outlines = ArrayRecordDataSource(str(buckets.native(file)))
            if len(outlines) != len(self):
                raise ValueError(f"it has {len(outlines)} outlines of {len(self)} records")
        except Exception as error:  # Native code raises RuntimeError for damage of any kind.
            self._read_records_instead(error)
            return None
        return outlines

    def _read_records_instead(self, error: Exception) -> None:
        """Warns once per process that records are read instead of outlines, which is slower."""
        if not self._warned:
            self._warned = True
            logging.warning(
                "%s cannot be used: %s. The records themselves are read instead, which takes "
                "longer; delete the file or build the records again.",
                outlines_file(self.directory, self.split),
                str(error) or type(error).__name__,
            )

    def _read(self, index: int) -> Mapping[str, Any]:
        return reading.tried_again(
            lambda: self._source[index], forget=self._close, what=self.where(index)
        )

    def _close(self) -> None:
        # Other threads may be reading; they keep what they hold.
        self.__dict__.pop("_source", None)

    @functools.cached_property
    def _source(self):
        # Imported late: loader processes that only need sizes should start in milliseconds.
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(buckets.native(self.directory))
        # The decorator of this method hides its arguments from the type checker.
        source = builder.as_data_source(split=self.split)  # pyright: ignore[reportCallIssue]
        if buckets.mounted(self.directory):
            parts = builder.info.splits[self.split].file_instructions
            source.data_source = bucket_records.open_split(parts, self.fingerprint)
        return source


def clip_size(record: Record) -> ClipSize:
    """The sizes of a record's media, as needed for packing."""
    shape = record.frames.shape[:3]
    clip = (record.clip_id, record.language)
    return (*clip, *shape, len(record.audio), record.seconds_per_grid)


def _from_outline(stored: bytes) -> Record:
    """Raises BadRecordError if the record is known to be bad, other exceptions for damage."""
    fields = json.loads(stored)
    if "bad" in fields:
        raise BadRecordError(fields["bad"])
    return Record(
        frames=np.broadcast_to(np.uint8(0), fields.pop("frames")),
        audio=np.broadcast_to(np.int16(0), fields.pop("audio")),
        **fields,
    )


def outlines_file(directory: Path, split: str) -> Path:
    return directory / f"outlines-{split}.array_record"


def write_outlines(source: RecordSource, *, workers: int = 1) -> int:
    """Writes the outlines of a split in one pass; returns the number of bad records.

    With them, a million clips can be planned without reading a pixel. `workers` processes read.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    bad = 0
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(replacing(outlines_file(source.directory, source.split)))
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        stack.callback(writer.close)
        lines = map(functools.partial(_outline, source), range(len(source)))
        if workers > 1 and len(source) > 1000:  # Starting processes costs about a second.
            context = multiprocessing.get_context("forkserver")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            lines = pool.map(functools.partial(_outline, source), range(len(source)), chunksize=64)
        for line in lines:
            bad += line.startswith(b'{"bad"')
            writer.write(line)
    return bad


def _outline(source: RecordSource, index: int) -> bytes:
    try:
        record = source[index]
    except BadRecordError as error:
        return json.dumps({"bad": str(error)}).encode()
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fields |= {"frames": record.frames.shape, "audio": record.audio.shape}
    return json.dumps(fields, ensure_ascii=False).encode()


def _dataset_directory(path: Path) -> Path:
    found = [path] if files.exists(path / "dataset_info.json") else []
    found += sorted(file.parent for file in files.sizes(path, "*/*/dataset_info.json"))
    if not found:
        raise FileNotFoundError(
            f"No records in {path}. Build them with: python -m data_prep.build --out {path} ..."
        )
    return found[-1]


def splits_of(path: str | Path) -> dict[str, int]:
    """{split: how many records it has} of built records. Raises FileNotFoundError without any."""
    shards = _splits(_dataset_directory(Path(path)))
    return {split: sum(lengths) for split, lengths in shards.items()}


def _splits(directory: Path) -> dict[str, list[int]]:
    """Records of each shard of each split."""
    info = files.read_json(directory / "dataset_info.json")
    return {
        split["name"]: [int(length) for length in split["shardLengths"]] for split in info["splits"]
    }


if __name__ == "__main__":
    # `python -m saber_jax.data.records --show RECORDS` is the older name of
    # `python -m saber_jax.data.show RECORDS`.
    sys.argv[1:] = [part.removeprefix("--show=") for part in sys.argv[1:] if part != "--show"]
    runpy.run_module("saber_jax.data.show", run_name="__main__")
