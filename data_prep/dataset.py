"""The SABER records as a tensorflow-datasets builder, written without TensorFlow."""

import contextlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_prep import clips
from saber_jax.data import records


class Records(tfds.core.GeneratorBasedBuilder):
    """SABER clips with six-section annotations: frames, sound, text and labels."""

    name = "records"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. Left to itself, the base class looks for a checksum file beside this
    # module and for that needs importlib_resources, which it does not install.
    url_infos = None

    def __init__(self, *, jobs: Mapping[str, list[clips.Job]], **kwargs):
        """`jobs` maps a split to its decoded clips; the rest goes to the base class."""
        self._jobs = jobs
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
            "seconds_per_grid": tfds.features.Tensor(shape=(), dtype=np.float32),
            "audio": text,
            "annotation": text,
            "labels": text,
            "provenance": text,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Everything is on disk already.
        return {split: self._generate_examples(split) for split in self._jobs}

    def _generate_examples(self, split: str):
        for job in tqdm(self._jobs[split], desc=f"write {split}", unit="clip"):
            yield job.clip_id, records.to_example(clips.load_staged(job))


def write(directory: Path, jobs: Iterable[clips.Job]) -> dict[str, int]:
    """Writes all splits to `directory`/records/1.0.0 and returns the clips of each.

    Also leaves the sizes of all records beside them, so that training starts at once.
    """
    by_split: dict[str, list[clips.Job]] = {}
    for job in jobs:
        by_split.setdefault(job.split, []).append(job)
    tfds.disable_progress_bar()  # Its bars count splits and shards; ours count clips.
    builder = Records(jobs=by_split, data_dir=directory, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ... unknown size".
        builder.download_and_prepare()
    sources = {split: records.RecordSource(directory, split) for split in sorted(by_split)}
    return {split: len(source.sizes) for split, source in sources.items()}
