"""`saber`, the SABER records as a tensorflow-datasets builder, written without TensorFlow.

    tfds.data_source("saber", data_dir=OUT, split="train")

reads what `write` wrote to OUT, as does saber_jax.data.records.RecordSource. Reading does not need
this module. Apache Beam is only imported if it writes the records.
"""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_prep.records.disk_sort import without_tensorflow
from saber_jax.data import records
from saber_jax.runs.files import naming

Load = Callable[[Any], records.Record]


class Saber(tfds.core.GeneratorBasedBuilder):
    """SABER clips with six-section annotations: frames, sound, text and labels."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "Frames, sound, six sections, labels; conversations of other tasks."
    }
    # Nothing is downloaded. Without this, the base class looks for a checksum file next to this
    # module with importlib_resources, which is not installed.
    url_infos = None

    def __init__(
        self,
        *,
        splits: Mapping[str, Iterable[Any]] | None = None,
        load: Load = lambda record: record,
        beam: bool = False,
        **kwargs,
    ):
        """`load` turns an item of a split into a record. Readers pass no splits.

        With `beam`, items and `load` are pickled, and Beam's workers call `load`.
        """
        self._splits, self._load, self._beam = splits or {}, load, beam
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(_features()),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Everything is on disk already.
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        """Examples keyed by clip_id; the hash of the key decides their order, also with Beam."""
        # Not a method: Beam would pickle the builder, and all of its items, with every step.
        encode = functools.partial(_encode, self._load)
        items = self._splits[split]
        if not self._beam:
            return _one_by_one(encode, items, split)
        import apache_beam as beam  # Takes two seconds.

        return beam.Create(list(items)) | beam.Reshuffle() | "load" >> beam.Map(encode)


def _one_by_one(
    encode: Callable[[Any], tuple[str, dict[str, Any]]], items: Iterable[Any], split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A generator, so that the progress bar begins with its split. tensorflow-datasets asks for all
    splits before it writes the first one, and bars that are open together garble each other."""
    yield from map(encode, tqdm(items, desc=f"write {split}", unit="clip"))


def _features() -> dict[str, tfds.features.FeatureConnector]:
    def text(doc: str) -> tfds.features.FeatureConnector:
        return tfds.features.Tensor(shape=(), dtype=np.bytes_, doc=doc)

    def number(dtype: type, doc: str, shape: tuple[int, ...] = ()):
        return tfds.features.Tensor(shape=shape, dtype=dtype, doc=doc)

    # Frames stay raw: ArrayRecord already compresses every record with zstd, losslessly and
    # faster than zlib; a video codec would not give back the exact pixels.
    return {
        "clip_id": text("Name of the clip, unique in its split; UTF-8, as all text here."),
        "language": text("Language of annotation and prompt: en or zh."),
        "frames": text("RGB pixels, uint8, in the order of frames_shape and 3 channels."),
        "frames_shape": number(
            np.int32, "Frames (even, 1 for a picture, 0 for none), height, width.", (3,)
        ),
        "seconds_per_grid": number(np.float64, "Seconds between two pairs of frames."),
        "audio": text("Samples at 16 kHz, mono, little-endian int16."),
        "annotation": text(f"JSON object of text: {', '.join(records.FIELDS)}."),
        "labels": text(f"JSON object of text, any of {', '.join(records.LABELS)}."),
        "provenance": text("JSON object: the clip's file, its SHA-256, how it was sampled."),
        "audio_in_video": number(np.bool_, "Whether the sound is interleaved with the video."),
        "messages": text("JSON list of role and content, for tasks other than SABER's; else []."),
        "answer": text("The answer to messages; empty without them."),
    }


def _encode(load: Load, item: Any) -> tuple[str, dict[str, Any]]:
    record = load(item)
    return record.clip_id, records.to_example(record)


def write(
    directory: Path,
    splits: Mapping[str, Iterable[Any]],
    load: Load,
    *,
    beam: Sequence[str] = (),
) -> dict[str, int]:
    """Writes all splits to `directory`/saber/1.0.0 and returns the clips of each.

    Each item is consumed once, and `load` turns one at a time into a record. The outlines of all
    records, which make training start quickly, and the checksums of the shards are written too.
    `beam` are Beam's own options, such as ("--runner=DataflowRunner", "--project=..."); with any,
    Beam writes the same records in the same order, and its workers need access to `directory`.
    """
    tfds.disable_progress_bar()  # Its bars count splits and shards; ours count clips.
    builder = Saber(
        splits=splits, load=load, beam=bool(beam), data_dir=directory, file_format="array_record"
    )
    with (
        naming(directory),
        without_tensorflow(),
        contextlib.redirect_stdout(io.StringIO()),  # "Downloading ... unknown size".
    ):
        builder.download_and_prepare(download_config=_download_config(beam))
    sources = {split: records.RecordSource(directory, split) for split in sorted(splits)}
    for source in sources.values():
        records.write_outlines(source, workers=os.cpu_count() or 1)
    with naming(directory):
        _write_checksums(Path(builder.data_dir))
    return {split: len(source) for split, source in sources.items()}


def _download_config(beam: Sequence[str]) -> tfds.download.DownloadConfig:
    if not beam:
        return tfds.download.DownloadConfig()
    from apache_beam.options.pipeline_options import PipelineOptions

    return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(beam)))


def _write_checksums(directory: Path) -> None:
    lines = []
    for path in sorted(directory.glob("*.array_record*")):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (directory / records.CHECKSUMS).write_text("".join(lines))
