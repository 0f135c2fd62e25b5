"""Source -> encoded examples -> packed rows -> global arrays, streamed by Grain.

The order of everything is a pure function of (seed, sizes, budget): batch number s is the same
whoever computes it. So the whole state of the input pipeline is the number of the next step, a
resumed run reads exactly what an uninterrupted one would have, and it may do so on another number
of hosts.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Float, Int
from tqdm import tqdm

from saber_jax.data.packing import Budget, pack_rows
from saber_jax.data.pairs import Pair
from saber_jax.data.planning import FIELDS as SIZE_FIELDS
from saber_jax.data.records import RecordSource
from saber_jax.data.tasks import Request
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.transforms import Example, asked_again, encode_record, size_of
from saber_jax.data.withhold import MODALITIES, Modality, withhold


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
        source: RecordSource,
        tokenizer: Tokenizer,
        pairs: list[Pair] | None = None,
        requests: tuple[Request, ...] = (Request(),),
    ):
        self._source, self._tokenizer, self._pairs = source, tokenizer, pairs
        self._indices = [source.index(pair.clip_id) for pair in pairs] if pairs else None
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
        other = Examples.__new__(Examples)
        other.__dict__ = self.__dict__ | {"_references": references}
        return other

    def __len__(self) -> int:
        return len(self._pairs if self._pairs is not None else self._source)

    def __getitem__(self, index: int) -> Example:
        """Raises RuntimeError naming the record when it cannot be encoded."""
        return self.encode(index, None)

    def encode(self, index: int, hidden: Modality | None) -> Example:
        """The example as it is, or with one modality of its clip hidden; its size is the same."""
        asked, index = divmod(int(index), len(self))
        position = index if self._indices is None else self._indices[index]
        try:
            record = self._source[position]
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
            raise RuntimeError(
                f"Record {position} of split {self._source.split!r} in {self._source.path} cannot "
                f"be encoded: {error}"
            ) from error

    def every_request(self, index: int) -> list[Example]:
        """Record `index` as the answer to each of the requests, its media read once."""
        first = self[index]
        others = self.requests[1:]
        record = self._source[index] if others else None
        return [first, *(asked_again(first, record, self._tokenizer, r) for r in others)]


def measure(examples: Examples, cache: Path) -> tuple[Int[np.ndarray, "K N D"], dict[str, int]]:
    """Sizes of all N examples under all K requests, and how often each target token occurs.

    Kept in `cache`. Several processes measure a share each and exchange the results.
    """
    # The first process decides: on disks of their own the others may or may not have the file.
    if multihost_utils.broadcast_one_to_all(np.int32(cache.exists())):
        return _read_measured(cache)
    mine = range(jax.process_index(), len(examples), jax.process_count())
    sizes = np.zeros((len(examples), len(examples.requests), len(SIZE_FIELDS)), np.int64)
    counts = np.zeros(0, np.int64)
    quiet = jax.process_index() != 0
    for index in tqdm(mine, desc="measuring examples", unit="clip", disable=quiet):
        variants = examples.every_request(index)
        sizes[index] = [dataclasses.astuple(size_of(example)) for example in variants]
        tokens = np.concatenate([r.tokens for e in variants for r in e.responses])
        more = np.bincount(tokens, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    sizes, counts = _sum_over_processes(sizes), _sum_over_processes(counts)
    sizes, tokens = sizes.swapaxes(0, 1), np.flatnonzero(counts)
    if jax.process_index() == 0:
        temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(temporary, sizes=sizes, tokens=tokens, counts=counts[tokens])
        os.replace(temporary, cache)
    return sizes, dict(zip(tokens.tolist(), counts[tokens].tolist(), strict=True))


def _read_measured(cache: Path) -> tuple[Int[np.ndarray, "K N D"], dict[str, int]]:
    stored = np.load(cache)
    return stored["sizes"], dict(
        zip(stored["tokens"].tolist(), stored["counts"].tolist(), strict=True)
    )


def _sum_over_processes(values: Int[np.ndarray, "N ..."]) -> Int[np.ndarray, "M ..."]:
    """Elementwise over arrays that may differ in their first length, which grows to the longest."""
    if jax.process_count() == 1:
        return values
    lengths = multihost_utils.process_allgather(np.int32(len(values)))
    padded = np.zeros((int(lengths.max()), *values.shape[1:]), np.int32)
    padded[: len(values)] = values
    return multihost_utils.process_allgather(padded).astype(np.int64).sum(0)


def unigram_entropy(counts: dict[int, int]) -> float:
    """Entropy of the target tokens' frequencies, nats per token: what a model reaches that knows
    how often each token occurs and nothing else."""
    p = np.array(list(counts.values()), np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def local_rows(rows: int, place: NamedSharding) -> list[int]:
    """Which rows of a global batch of `rows` the devices of this process hold, in order.

    The sharding says, and nothing simpler does: on a torus a host's devices need not be neighbours
    along the batch, and hosts that share a tensor axis hold the same rows.
    """
    slices = place.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(rows))})


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

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = (self._start + index) * self._batch_rows
        numbers = [first + i if i < self._batch_rows else len(self._rows) for i in self._local]
        return pack_rows(
            [self._encoded(n, self._rows[n]) if n < len(self._rows) else [] for n in numbers],
            self._budget,
        )

    def _encoded(self, number: int, row: list[int]) -> list[Example]:
        rng = np.random.default_rng([self._seed, number])
        hidden = [
            MODALITIES[rng.integers(2)] if rng.random() < self._withhold else None for _ in row
        ]
        return [self._examples.encode(i, h) for i, h in zip(row, hidden, strict=True)]


def stream(
    batches: HostBatches, *, threads: int, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, made ahead of time by `threads` threads of each of `workers` processes."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def to_global(
    batch: dict[str, np.ndarray], place: NamedSharding, rows: int, local: list[int]
) -> dict[str, jax.Array]:
    """The `local` rows that this process made -> arrays of `rows` rows over the whole mesh."""
    position = {row: i for i, row in enumerate(local)}

    def distribute(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return value[position[start] : position[stop - 1] + 1]

        return jax.make_array_from_callback((rows, *value.shape[1:]), place, part)

    return {key: distribute(value) for key, value in batch.items()}
