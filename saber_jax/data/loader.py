"""The input pipeline: planned rows -> encoded examples -> packed rows -> global arrays, by Grain.

`pipeline` defines the whole pipeline. The plan (planning.py) decides in advance which examples
share a row, so batch s is a pure function of (seed, sizes, budget) on every host. The state of the
pipeline is the position of the next step: a resumed run reads exactly the batches that an
uninterrupted run would have read, on any number of hosts.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int

from saber_jax import sharding
from saber_jax.batch import Batch
from saber_jax.data import sizing
from saber_jax.data.encoded import Examples
from saber_jax.data.examples import Example
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.planning import PlannedRows
from saber_jax.data.quarantine import LeftOut, Quarantine
from saber_jax.data.records import BadRecordError
from saber_jax.data.withhold import MODALITIES
from saber_jax.data.workers import in_processes, sigterm_held


def measure(examples: Examples, cache: Path, *, workers: int = 0) -> sizing.Measurements:
    """Sizes of all N examples under all K requests, and how often each target token occurs.

    The result is cached in the file `cache` under a fingerprint of the examples' inputs. Several
    processes measure a share each and exchange the results.
    """
    stored = sizing.load(cache, examples.fingerprint)
    # If processes have separate disks, only some of them may have the file.
    if multihost_utils.process_allgather(np.int32(stored is not None)).all():
        assert stored is not None, "this process has said so"
        return stored
    mine = range(jax.process_index(), len(examples), jax.process_count())
    first = jax.process_index() == 0
    part = sizing.measure(examples, len(examples), mine, workers=workers, quiet=not first)
    whole = sizing.Measurements(
        *(_sum_over_processes(getattr(part, f.name)) for f in dataclasses.fields(part))
    )
    if first:
        sizing.save(cache, whole, examples.fingerprint)
    return whole


def _sum_over_processes(values: Int[np.ndarray, "... N"]) -> Int[np.ndarray, "... M"]:
    """Elementwise sum over processes of arrays that may differ in the length of the last axis."""
    if jax.process_count() == 1:
        return values
    lengths = multihost_utils.process_allgather(np.int32(values.shape[-1]))
    padded = np.zeros((*values.shape[:-1], int(lengths.max())), np.int32)
    padded[..., : values.shape[-1]] = values
    return multihost_utils.process_allgather(padded).astype(np.int64).sum(0)


def local_rows(rows: int, place: NamedSharding) -> list[int]:
    """The rows of a global batch of `rows` that the devices of this process hold, in order.

    They are read from the sharding. The process index is not enough: on a torus, the devices of a
    host need not be neighbours along the batch, and hosts that share a tensor axis hold the same
    rows.
    """
    held: set[int] = set()
    for index in place.addressable_devices_indices_map((rows,)).values():
        assert index is not None, "a NamedSharding names the part of every device"
        held.update(range(*index[0].indices(rows)))
    return sorted(held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """One row of a batch, before its examples are read.

    `number` counts the rows of the whole run and seeds the random choices for the row. `position`
    is set in the last row that a host makes of a batch: the position of the plan after that batch.
    """

    number: int
    examples: Sequence[int]
    position: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row with its encoded examples. `left_out` are those that could not be read."""

    examples: list[Example]
    left_out: list[LeftOut]
    position: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostInfo:
    """What the host needs to know about a row or batch: the examples that could not be used, and
    the position of the plan after it."""

    left_out: list[LeftOut]
    position: dict[str, Any] | None


HostBatch = tuple[Batch[np.ndarray], HostInfo]


class HostRows:
    """Grain source: the rows that this host makes, batch by batch, from batch `start` on."""

    def __init__(
        self,
        rows: Sequence[list[int]],
        batch_rows: int,
        start: int = 0,
        *,
        local: Sequence[int] | None = None,
    ):
        """`rows[r]` lists the examples of global row r. `local` are the rows of each batch that
        this host makes, by default all; rows from `batch_rows` on are empty."""
        self._rows, self._batch_rows, self._start = rows, batch_rows, start
        self.local = range(batch_rows) if local is None else local

    @property
    def batches(self) -> int:
        return max(0, -(-len(self._rows) // self._batch_rows) - self._start)

    def __len__(self) -> int:
        return self.batches * len(self.local)

    def __getitem__(self, index: int) -> PlannedRow:
        batch, place = divmod(index, len(self.local))
        first, inside = (self._start + batch) * self._batch_rows, self.local[place]
        exists = inside < self._batch_rows and first + inside < len(self._rows)
        number = first + inside if exists else len(self._rows)
        last = place == len(self.local) - 1
        return PlannedRow(
            number=number,
            examples=self._rows[number] if exists else (),
            position=self._position(first + self._batch_rows) if last else None,
        )

    def _position(self, row: int) -> dict[str, Any]:
        if not isinstance(self._rows, PlannedRows):
            return {}
        return dataclasses.asdict(self._rows.position(row))


@dataclasses.dataclass(frozen=True)
class Encode(grain.transforms.Map):
    """Reads and encodes a row's examples. With probability `withhold`, one modality of an example
    is withheld. This choice depends only on `seed` and the row's number."""

    examples: Examples
    withhold: float
    seed: int

    def map(self, row: PlannedRow) -> EncodedRow:
        rng = np.random.default_rng([self.seed, row.number])
        encoded, left_out = [], []
        for index in row.examples:
            hidden = None
            if rng.random() < self.withhold:
                hidden = MODALITIES[rng.integers(len(MODALITIES))]
            try:
                encoded.append(self.examples.encode(index, hidden))
            except BadRecordError as error:
                left_out.append(self.examples.entry(index, "bad_record", str(error)))
        return EncodedRow(examples=encoded, left_out=left_out, position=row.position)


@dataclasses.dataclass(frozen=True)
class Pack(grain.transforms.Map):
    """Lays a row's examples out as a batch of one row."""

    budget: Budget

    def map(self, row: EncodedRow) -> HostBatch:
        batch = pack_rows([row.examples], self.budget)
        batch = dataclasses.replace(batch, left_out=np.array([len(row.left_out)], np.int32))
        return batch, HostInfo(left_out=row.left_out, position=row.position)


def join(rows: Sequence[HostBatch]) -> HostBatch:
    """Rows as one batch, in their order."""
    parts, notes = zip(*rows, strict=True)
    left_out = [entry for note in notes for entry in note.left_out]
    batch = jax.tree.map(_concatenated, *parts)
    return batch, HostInfo(left_out=left_out, position=notes[-1].position)


def _concatenated(*parts: np.ndarray) -> np.ndarray:
    # Copied, because parts from other processes are in shared memory, which is freed after this.
    out = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=out)


SHARED_BYTES = 1 << 16
"""Arrays of at least this many bytes are passed from loader processes in shared memory."""
ROWS_AHEAD = 2
"""Rows that a loader process holds for each of its threads, finished or in progress."""
BATCHES_AHEAD = 1
"""Joined batches that are ready for the training loop."""


def pipeline(
    rows: HostRows,
    examples: Examples,
    budget: Budget,
    *,
    threads: int,
    workers: int = 0,
    withhold: float = 0.0,
    seed: int = 0,
) -> grain.IterDataset:
    """Plan -> read and encode -> pack -> this host's part of every batch, as one Grain dataset.

    `threads` threads of each of `workers` processes (0: of this process) work ahead of the training
    loop. An element is a single row until the rows of a batch are joined in this process, so
    buffers are counted in rows: see `most_rows`.
    """
    dataset = (
        grain.MapDataset.source(rows)
        .map(Encode(examples, withhold, seed))
        .map(Pack(budget))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ROWS_AHEAD * threads)
        )
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags, which only absl's app.run parses.
            flags.FLAGS.mark_as_parsed()
        # Small arrays go through the queue, because a shared memory file for each costs more.
        shared = grain.experimental.DatasetOptions(min_shm_size=SHARED_BYTES)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, shared)
        dataset = in_processes(dataset, workers)
    dataset = dataset.batch(len(rows.local), batch_fn=join)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=BATCHES_AHEAD)


def most_rows(local: int, *, threads: int, workers: int) -> int:
    """Upper bound of a host's loading memory, in rows, if it makes `local` rows of every batch.

    Each thread holds ROWS_AHEAD rows, and the frames and patches of the row in progress, which are
    no larger than two rows; each process also hands over one row. Between processes, one row waits
    in a queue and one is in transit. The training loop has a batch, BATCHES_AHEAD are ready, one is
    joined and waits for a place in the queue, and the rows of the next one are collected.
    """
    ahead = max(1, workers) * ((ROWS_AHEAD + 2) * threads + 1) + 2 * workers
    return ahead + (BATCHES_AHEAD + 3) * local


def stream(rows: HostRows, *args, **options) -> Iterator[HostBatch]:
    """The batches of `pipeline` with the same arguments, in order.

    Raises RuntimeError if they end too soon, so that this cannot be mistaken for the end of data.
    """
    count, iterator = 0, iter(pipeline(rows, *args, **options))
    try:
        while True:
            # The first batch starts the loader processes.
            with contextlib.nullcontext() if count else sigterm_held():
                batch = next(iterator, None)
            if batch is None:
                break
            count += 1
            yield batch
    finally:
        iterator.close()  # Otherwise threads and processes would wait forever to hand over a batch.
    if count != rows.batches:
        raise RuntimeError(f"The input pipeline ended after {count} of {rows.batches} batches.")


class GlobalBatches:
    """The stream as global arrays over the whole mesh, with its state for checkpoints."""

    def __init__(
        self,
        batches: Iterator[HostBatch],
        quarantine: Quarantine,
        place: NamedSharding,
        rows: int,
    ):
        """Batches have `rows` rows, which `place` spreads over the mesh; `batches` is this
        process's `stream`."""
        self._stream = batches
        self._quarantine, self._place, self._rows = quarantine, place, rows
        self._local = local_rows(rows, place)
        self._left_out: list[LeftOut] = []
        self._position: dict[str, Any] | None = {}

    def __iter__(self) -> "GlobalBatches":
        return self

    def __next__(self) -> Batch[jax.Array]:
        batch, about = next(self._stream)
        self._left_out += about.left_out
        self._position = about.position
        places = sharding.batch_shardings(batch, self._place.mesh)
        return to_global(batch, places, self._rows, self._local)

    def agree(self) -> list[LeftOut]:
        """Exchanges between all processes the examples that were left out since the last call,
        lists them and returns those of all.

        All processes have to call this at the same step, which they recognise by the count that is
        part of every batch. Raises TooManyBadError in all of them.
        """
        listed = json.dumps([dataclasses.asdict(entry) for entry in self._left_out])
        mine = np.frombuffer(listed.encode(), np.uint8)
        lengths = multihost_utils.process_allgather(np.int32(len(mine))).reshape(-1)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(mine)] = mine
        parts = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
        texts = [part[:n].tobytes() for part, n in zip(parts, lengths, strict=True)]
        entries = [LeftOut(**entry) for text in texts for entry in json.loads(text)]
        self._left_out = []
        self._quarantine.add(entries)
        return entries

    def state(self) -> dict[str, Any]:
        """JSON from which the stream can resume after the last yielded batch."""
        return {"position": self._position, "quarantined": self._quarantine.indices}


def to_global(
    batch: Batch[np.ndarray], places: Any, rows: int, local: list[int]
) -> Batch[jax.Array]:
    """Converts the `local` rows of this process to global arrays of `rows` rows over the mesh.

    `places` is the tree of `batch`, with a NamedSharding per array.
    """
    position = {row: i for i, row in enumerate(local)}

    def distribute(value: np.ndarray, place: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "a NamedSharding names the part of every device"
            start, stop, _ = index[0].indices(rows)
            return value[(slice(position[start], position[stop - 1] + 1), *index[1:])]

        return jax.make_array_from_callback((rows, *value.shape[1:]), place, part)

    return cast("Batch[jax.Array]", jax.tree.map(distribute, batch, places))
