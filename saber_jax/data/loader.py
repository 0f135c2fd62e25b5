"""Source -> encoded examples -> packed rows -> global arrays, streamed by Grain.

The order of everything is a pure function of (seed, sizes, budget): batch number s is the same
whoever computes it. So the whole state of the input pipeline is the number of the next step, a
resumed run reads exactly what an uninterrupted one would have, and it may do so on another number
of hosts.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Float, Int, UInt8

from saber_jax.batch import Batch
from saber_jax.data import sizing
from saber_jax.data.examples import Example, Size, encode_record, measure_record, thinned
from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.pairs import Pair
from saber_jax.data.planning import Rows
from saber_jax.data.quarantine import Entry, Quarantine
from saber_jax.data.records import BadRecordError
from saber_jax.data.sources import Sources
from saber_jax.data.tasks import Request
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.withhold import MODALITIES, Modality, withhold
from saber_jax.data.workers import in_processes, sigterm_held
from saber_jax.runs.files import replacing


class References(Protocol):
    """Element i is float32 [views, targets] of pair i, NaN where a view was not computed."""

    def __getitem__(self, index: int) -> Float[np.ndarray, "V n"]: ...


class Examples:
    """Random access to encoded examples: one per record, or one per preference pair.

    A record can be asked for more than one thing: of N records, example i + N * k is record i as
    the answer to request k. A pair answers the six-section request alone.
    """

    def __init__(
        self,
        source: Sources,
        tokenizer: Tokenizer,
        pairs: list[Pair] | None = None,
        requests: tuple[Request, ...] = (Request(),),
    ):
        self._source, self._tokenizer, self._pairs = source, tokenizer, pairs
        self._indices = [source.index(pair.clip_id) for pair in pairs] if pairs else None
        self._frame_pairs: Int[np.ndarray, " N"] | None = None
        self._skipped: frozenset[int] = frozenset()
        self.requests = requests if pairs is None else (Request(),)
        self._references: References | None = None

    @property
    def pairs(self) -> list[Pair]:
        """Raises ValueError when these are records and not pairs."""
        if self._pairs is None:
            raise ValueError("These examples are records, not preference pairs.")
        return self._pairs

    def with_references(self, references: "References") -> "Examples":
        """The same pairs, each with the reference's log-prob of every target."""
        return self._with(_references=references)

    def __len__(self) -> int:
        return len(self._pairs if self._pairs is not None else self._source)

    def __getitem__(self, index: int) -> Example:
        return self.encode(index, None)

    def encode(self, index: int, hidden: Modality | None) -> Example:
        """The example as it is, or with one modality of its clip hidden; its size is the same.

        Raises BadRecordError naming the record when it cannot be used, and RuntimeError naming it
        when the program fails on it.
        """
        asked, index = divmod(int(index), len(self))
        position = self.record_of(index)
        try:
            if index in self._skipped:
                raise BadRecordError("it was left out before this run was resumed")
            record = self._source[position]
            if self._frame_pairs is not None and len(record.frames) > 2 * self._frame_pairs[index]:
                record = thinned(record, int(self._frame_pairs[index]))
            record = record if hidden is None else withhold(record, hidden)
            if self._pairs is None:
                return encode_record(record, self._tokenizer, request=self.requests[asked])
            pair = self._pairs[index]
            return encode_record(
                record,
                self._tokenizer,
                responses=(pair.chosen, pair.rejected),
                kappa=pair.kappa,
                ignored=pair.withheld,
                reference=None if self._references is None else self._references[index],
            )
        except Exception as error:
            raise self._named(position, error) from error

    def measure(self, index: int) -> tuple[list[Size], int, Int[np.ndarray, " n"]]:
        """Sizes under every request, frame pairs, all target tokens. Raises as `encode` does."""
        position = self.record_of(index)
        responses = None
        if self._pairs is not None:
            responses = (self._pairs[index].chosen, self._pairs[index].rejected)
        try:
            outline = self._source.outline(position)
            measured = [
                measure_record(outline, self._tokenizer, request=request, responses=responses)
                for request in self.requests
            ]
        except Exception as error:
            raise self._named(position, error) from error
        sizes, tokens = zip(*measured, strict=True)
        return list(sizes), len(outline.frames) // 2, np.concatenate(tokens)

    def entry(self, index: int, reason: str, detail: str) -> Entry:
        """How quarantine.jsonl names an example; a damaged record has lost its clip id."""
        index = int(index) % len(self)
        position = self.record_of(index)
        try:
            clip_id = self._source.outline(position).clip_id
        except BadRecordError:
            clip_id = ""
        file = self._source.where(position)
        return Entry(index=index, clip_id=clip_id, file=file, reason=reason, detail=detail)

    def source_of(self) -> Int[np.ndarray, " N"]:
        """Which of the record sources each example comes from."""
        return self._source.source_of(np.array(self._indices or range(len(self)), np.int64))

    def with_frame_pairs(self, frame_pairs: Int[np.ndarray, " N"]) -> "Examples":
        """The same examples, clips thinned to so many frame pairs."""
        return self._with(_frame_pairs=frame_pairs)

    def without(self, indices: Iterable[int]) -> "Examples":
        """The same examples, those of `indices` bad whatever their records hold."""
        return self._with(_skipped=frozenset(indices))

    def record_of(self, index: int) -> int:
        """Which record an example is about."""
        return int(index) if self._indices is None else self._indices[index]

    def _with(self, **changes) -> "Examples":
        other = Examples.__new__(Examples)
        other.__dict__ = self.__dict__ | changes
        return other

    def _named(self, position: int, error: Exception) -> Exception:
        """What to raise instead of `error`, which record `position` is behind."""
        where = self._source.where(position)
        if isinstance(error, BadRecordError | ValueError):  # What is stored makes no sense.
            return BadRecordError(f"{where}: {error}")
        # Also for StopIteration, which a stream would take for the end of the data.
        return RuntimeError(
            f"Encoding {where} failed with {type(error).__name__}: {error}. This is a fault of the "
            "program, not of the record."
        )


def measure(examples: Examples, cache: Path, *, workers: int = 0) -> sizing.Measurements:
    """Sizes of all N examples under all K requests, and how often each target token occurs.

    Kept in `cache`. Several processes measure a share each and exchange the results.
    """
    # The first process decides: on disks of their own the others may or may not have the file.
    if multihost_utils.broadcast_one_to_all(np.int32(cache.exists())):
        stored = np.load(cache)
        fields = dataclasses.fields(sizing.Measurements)
        return sizing.Measurements(**{field.name: stored[field.name] for field in fields})
    mine = range(jax.process_index(), len(examples), jax.process_count())
    first = jax.process_index() == 0
    part = sizing.measure(examples, len(examples), mine, workers=workers, quiet=not first)
    whole = sizing.Measurements(
        *(_sum_over_processes(getattr(part, f.name)) for f in dataclasses.fields(part))
    )
    if first:
        with replacing(cache) as partial, partial.open("wb") as file:
            np.savez(file, **vars(whole))
    return whole


def _sum_over_processes(values: Int[np.ndarray, "... N"]) -> Int[np.ndarray, "... M"]:
    """Elementwise over arrays that may differ in their last length, which grows to the longest."""
    if jax.process_count() == 1:
        return values
    lengths = multihost_utils.process_allgather(np.int32(values.shape[-1]))
    padded = np.zeros((*values.shape[:-1], int(lengths.max())), np.int32)
    padded[..., : values.shape[-1]] = values
    return multihost_utils.process_allgather(padded).astype(np.int64).sum(0)


def unigram_entropy(counts: Int[np.ndarray, " V"]) -> float:
    """Entropy of the target tokens' frequencies, nats per token: what a model reaches that knows
    how often each token occurs and nothing else."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def local_rows(rows: int, place: NamedSharding) -> list[int]:
    """Which rows of a global batch of `rows` the devices of this process hold, in order.

    The sharding says, and nothing simpler does: on a torus a host's devices need not be neighbours
    along the batch, and hosts that share a tensor axis hold the same rows.
    """
    held: set[int] = set()
    for index in place.addressable_devices_indices_map((rows,)).values():
        assert index is not None, "a NamedSharding names the part of every device"
        held.update(range(*index[0].indices(rows)))
    return sorted(held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What stays on the host of a batch: what could not be used, and where a plan has to start to
    go on after it."""

    left_out: list[Entry]
    position: dict[str, int]


HostBatch = tuple[Batch[np.ndarray], About]


class HostBatches:
    """Grain source whose element s is this host's part of global batch `start + s`."""

    def __init__(
        self,
        examples: Examples,
        rows: Sequence[list[int]],
        budget: Budget,
        batch_rows: int,
        start: int,
        *,
        local: list[int] | None = None,
        withhold: float = 0.0,
        seed: int = 0,
    ):
        """`rows[r]` lists the examples of global row r; `local` the rows of each batch to make, all
        by default, those from `batch_rows` on being empty. Of each example one modality is hidden
        with probability `withhold`; which one, and whether, depends on `seed` and the row alone."""
        self._examples, self._budget = examples, budget
        self._rows = rows
        self._batch_rows, self._start = batch_rows, start
        self._withhold, self._seed = withhold, seed
        self._local = list(range(batch_rows)) if local is None else local

    def __len__(self) -> int:
        return max(0, -(-len(self._rows) // self._batch_rows) - self._start)

    def __getitem__(self, index: int) -> HostBatch:
        first = (self._start + index) * self._batch_rows
        numbers = [first + i if i < self._batch_rows else len(self._rows) for i in self._local]
        planned = [self._rows[n] if n < len(self._rows) else [] for n in numbers]
        left_out: list[Entry] = []
        encoded = [self._encoded(n, row, left_out) for n, row in zip(numbers, planned, strict=True)]
        missing = [len(row) - len(used) for row, used in zip(planned, encoded, strict=True)]
        packed = pack_rows(encoded, self._budget)
        packed = dataclasses.replace(packed, left_out=np.array(missing, np.int32))
        return packed, About(left_out=left_out, position=self._position(first + self._batch_rows))

    def _encoded(self, number: int, row: list[int], left_out: list[Entry]) -> list[Example]:
        """The examples of a row that can be used; appends the others to `left_out`."""
        rng = np.random.default_rng([self._seed, number])
        encoded = []
        for index in row:
            hidden = MODALITIES[rng.integers(2)] if rng.random() < self._withhold else None
            try:
                encoded.append(self._examples.encode(index, hidden))
            except BadRecordError as error:
                left_out.append(self._examples.entry(index, "bad_record", str(error)))
        return encoded

    def _position(self, row: int) -> dict[str, int]:
        """Where a plan has to start to go on after this batch."""
        return dataclasses.asdict(self._rows.position(row)) if isinstance(self._rows, Rows) else {}


def _to_bytes(value: Any) -> UInt8[np.ndarray, " n"]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _from_bytes(value: UInt8[np.ndarray, " n"]) -> Any:
    return json.loads(value.tobytes())


def stream(batches: HostBatches, *, threads: int, workers: int = 0) -> Iterator[HostBatch]:
    """Batches in order, made ahead of time by `threads` threads of each of `workers` processes.

    Raises RuntimeError if they end too soon, whatever the reason: that never looks like success.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags, which only absl's app.run parses.
            flags.FLAGS.mark_as_parsed()
        dataset = in_processes(dataset, workers)
    iterator, count = iter(dataset), 0
    while True:
        # The first one starts the processes.
        with sigterm_held() if workers and not count else contextlib.nullcontext():
            batch = next(iterator, None)
        if batch is None:
            break
        count += 1
        yield batch
    if count != len(batches):
        raise RuntimeError(f"The input pipeline ended after {count} of {len(batches)} batches.")


class GlobalBatches:
    """The stream as arrays over the whole mesh, and all that a checkpoint has to know about it.

    Without a quarantine a record that cannot be used ends it with BadRecordError.
    """

    def __init__(
        self,
        batches: HostBatches,
        quarantine: Quarantine | None,
        place: NamedSharding,
        rows: int,
        *,
        threads: int,
        workers: int,
    ):
        """`rows` of each batch are laid out by `place`; `batches` makes those of this process."""
        self._stream = stream(batches, threads=threads, workers=workers)
        self._quarantine, self._place, self._rows = quarantine, place, rows
        self._local = local_rows(rows, place)
        self._left_out: list[Entry] = []
        self._position: dict[str, int] = {}

    def __iter__(self) -> "GlobalBatches":
        return self

    def __next__(self) -> Batch[jax.Array]:
        batch, about = next(self._stream)
        if about.left_out and self._quarantine is None:
            raise BadRecordError(about.left_out[0].detail)
        self._left_out += about.left_out
        self._position = about.position
        return to_global(batch, self._place, self._rows, self._local)

    def agree(self) -> None:
        """Makes every process know what any process left out so far, and list it.

        All processes have to call this at the same step; the count that is part of every batch
        tells them when. Raises TooManyBadError in all of them alike.
        """
        mine = _to_bytes([dataclasses.asdict(entry) for entry in self._left_out])
        lengths = multihost_utils.process_allgather(np.int32(len(mine))).reshape(-1)
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(mine)] = mine
        parts = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
        entries = [e for part, n in zip(parts, lengths, strict=True) for e in _from_bytes(part[:n])]
        self._left_out = []
        assert self._quarantine is not None, "without one, __next__ has raised"
        self._quarantine.add(Entry(**entry) for entry in entries)

    def state(self) -> dict[str, Any]:
        """JSON from which the stream goes on after the batch that was given last."""
        quarantined = self._quarantine.indices if self._quarantine else []
        return {"position": self._position, "quarantined": quarantined}


def to_global(
    batch: Batch[np.ndarray], place: NamedSharding, rows: int, local: list[int]
) -> Batch[jax.Array]:
    """The `local` rows that this process made -> arrays of `rows` rows over the whole mesh."""
    position = {row: i for i, row in enumerate(local)}

    def distribute(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "a NamedSharding names the part of every device"
            start, stop, _ = index[0].indices(rows)
            return value[position[start] : position[stop - 1] + 1]

        return jax.make_array_from_callback((rows, *value.shape[1:]), place, part)

    return cast("Batch[jax.Array]", jax.tree.map(distribute, batch))
