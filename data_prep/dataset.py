"""The SABER records as a tensorflow-datasets builder, written without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from saber_jax.data import records

Load = Callable[[Any], records.Record]


class Records(tfds.core.GeneratorBasedBuilder):
    """SABER clips with six-section annotations: frames, sound, text and labels."""

    name = "records"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Left to itself, the base class looks for a checksum file beside this
    # module and for that needs importlib_resources, which it does not install.
    url_infos = None

    def __init__(self, *, splits: Mapping[str, Sequence[Any]], load: Load, **kwargs):
        """`load` turns each item of a split into its record; the rest goes to the base class."""
        self._splits, self._load = splits, load
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Tensor(shape=(), dtype=np.bytes_)
        # Frames stay raw: ArrayRecord already compresses every record with zstd, losslessly and
        # faster than zlib; a video codec would not give back the exact pixels.
        features = {
            "clip_id": text,
            "language": text,
            "frames": text,
            "frames_shape": tfds.features.Tensor(shape=(3,), dtype=np.int32),
            "seconds_per_grid": tfds.features.Tensor(shape=(), dtype=np.float64),
            "audio": text,
            "annotation": text,
            "labels": text,
            "provenance": text,
            "audio_in_video": tfds.features.Tensor(shape=(), dtype=np.bool_),
            "messages": text,
            "answer": text,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Everything is on disk already.
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str):
        for item in tqdm(self._splits[split], desc=f"write {split}", unit="clip"):
            record = self._load(item)
            yield record.clip_id, records.to_example(record)


def write(directory: Path, splits: Mapping[str, Sequence[Any]], load: Load) -> dict[str, int]:
    """Writes all splits to `directory`/records/1.0.0 and returns the clips of each.

    `load` turns one item of a split into its record, one at a time. Also leaves the outlines of all
    records beside them, so that training starts at once.
    """
    tfds.disable_progress_bar()  # Its bars count splits and shards; ours count clips.
    builder = Records(splits=splits, load=load, data_dir=directory, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ... unknown size".
        builder.download_and_prepare()
    sources = {split: records.RecordSource(directory, split) for split in sorted(splits)}
    for source in sources.values():
        records.write_outlines(source, workers=os.cpu_count() or 1)
    return {split: len(source) for split, source in sources.items()}
