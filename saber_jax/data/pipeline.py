"""Source -> encoded examples -> packed rows -> global arrays, streamed by Grain.

The order of everything is a pure function of (seed, sizes, budget): batch number s is the same
whoever computes it. So the whole state of the input pipeline is the number of the next step, a
resumed run reads exactly what an uninterrupted one would have, and it may do so on another number
of hosts.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int
from tqdm import tqdm

from saber_jax.data.packing import Budget, pack_rows, plan_rows
from saber_jax.data.pairs import Pair
from saber_jax.data.records import RecordSource
from saber_jax.data.tasks import Mixture, Request
from saber_jax.data.tokenizer import Tokenizer
from saber_jax.data.transforms import Example, asked_again, encode_record, size_of
from saber_jax.data.withhold import MODALITIES, Modality, withhold


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
        self._references: Float[np.ndarray, "N 2"] | None = None

    def with_references(self, references: Float[np.ndarray, "N 2"]) -> "Examples":
        """The same pairs, each with its log pi_ref of (chosen, rejected)."""
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
            reference = (0.0, 0.0) if self._references is None else self._references[index]
            return encode_record(
                record,
                self._tokenizer,
                responses=(pair.chosen, pair.rejected),
                reference=(float(reference[0]), float(reference[1])),
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


def measure(examples: Examples, cache: Path) -> tuple[Int[np.ndarray, "K N 5"], dict[str, int]]:
    """Sizes of all N examples under all K requests, and how often each target token occurs.

    Kept in `cache`.
    """
    if cache.exists():
        stored = np.load(cache)
        return stored["sizes"], dict(
            zip(stored["tokens"].tolist(), stored["counts"].tolist(), strict=True)
        )
    sizes, counts = [], np.zeros(0, np.int64)
    for index in tqdm(range(len(examples)), desc="measuring examples", unit="clip"):
        variants = examples.every_request(index)
        sizes.append([dataclasses.astuple(size_of(example)) for example in variants])
        tokens = np.concatenate([r.tokens for e in variants for r in e.responses])
        more = np.bincount(tokens, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    tokens = np.flatnonzero(counts)
    temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
    by_request = np.array(sizes, np.int64).swapaxes(0, 1)
    np.savez(temporary, sizes=by_request, tokens=tokens, counts=counts[tokens])
    os.replace(temporary, cache)
    return measure(examples, cache)


def unigram_entropy(counts: dict[int, int]) -> float:
    """Entropy of the target tokens' frequencies, nats per token: what a model reaches that knows
    how often each token occurs and nothing else."""
    p = np.array(list(counts.values()), np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


class Plan:
    """Which examples make up row r of the endless, every epoch newly shuffled, stream of rows.

    Every epoch visits each record once, under a request that `mixture` draws anew; without a
    mixture it is the first.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "K N 5"],
        budget: Budget,
        seed: int,
        mixture: Mixture | None = None,
    ):
        self.budget = budget
        self._sizes, self._seed, self._mixture = sizes, seed, mixture
        self._rows: list[list[int]] = []
        self._epochs = 0
        self.rows_per_epoch = len(self._upto(1))

    def row(self, index: int) -> list[int]:
        return self._upto(index + 1)[index]

    def fill(self) -> dict[str, float]:
        """Share of each budget that carries data, over the first epoch."""
        ids = np.concatenate([self.row(i) for i in range(self.rows_per_epoch)])
        total = self._flat()[ids].sum(0) / self.rows_per_epoch
        b = self.budget
        slots = total[0] + 2 * total[1]
        return {
            "text": slots / b.slots,
            "patches": total[2] / b.patches,
            "chunks": total[3] / b.chunks,
            "targets": total[4] / b.targets,
        }

    def fingerprint(self) -> str:
        """Changes with anything that would change a batch's composition."""
        drawn = None if self._mixture is None else self._drawn(0).tolist()
        digest = hashlib.sha256(repr((self.budget, self._seed, drawn)).encode())
        digest.update(np.ascontiguousarray(self._sizes).tobytes())
        return digest.hexdigest()[:16]

    def _upto(self, count: int) -> list[list[int]]:
        while len(self._rows) < count:
            rng = np.random.default_rng([self._seed, self._epochs])
            ids = self._drawn(self._epochs)
            rows = plan_rows(self._flat(), ids[rng.permutation(len(ids))], self.budget)
            self._rows += [rows[i] for i in rng.permutation(len(rows))]
            self._epochs += 1
        return self._rows

    def _drawn(self, epoch: int) -> Int[np.ndarray, " N"]:
        """The example of every record in this epoch, numbered as `Examples` does."""
        records = self._sizes.shape[1]
        asked = 0 if self._mixture is None else self._mixture.draw(epoch, records)
        return np.arange(records) + records * asked

    def _flat(self) -> Int[np.ndarray, "KN 5"]:
        return self._sizes.reshape(-1, self._sizes.shape[-1])


class HostBatches:
    """Grain source whose element s is this host's part of global batch `start + s`."""

    def __init__(
        self,
        examples: Examples,
        rows: list[list[int]],
        budget: Budget,
        batch_rows: int,
        start: int,
        *,
        withhold: float = 0.0,
        seed: int = 0,
    ):
        """`rows[r]` lists the examples of global row r. Of each example one modality is hidden with
        probability `withhold`; which one, and whether, depends on `seed` and the row alone."""
        hosts = jax.process_count()
        if batch_rows % hosts:
            raise ValueError(f"config.data.batch_rows={batch_rows} must divide over {hosts} hosts.")
        self._examples, self._budget = examples, budget
        self._rows = rows
        self._batch_rows, self._start = batch_rows, start
        self._withhold, self._seed = withhold, seed
        self._host, self._host_rows = jax.process_index(), batch_rows // hosts

    def __len__(self) -> int:
        return max(0, -(-len(self._rows) // self._batch_rows) - self._start)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = (self._start + index) * self._batch_rows + self._host * self._host_rows
        rows = self._rows[first : first + self._host_rows]
        encoded = [self._encoded(first + i, row) for i, row in enumerate(rows)]
        return pack_rows(encoded + [[]] * (self._host_rows - len(rows)), self._budget)

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


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Host rows -> arrays over the whole mesh."""
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
