"""Several record directories combined, each drawn in proportion to its weight."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from saber_jax.data.records import Record, RecordSource

_STREAM = 104_729  # Keeps these draws apart from the shuffle, which is seeded with (seed, epoch).


@dataclasses.dataclass(frozen=True)
class WeightedSource:
    """One split of one directory, and how often it is drawn relative to the others."""

    path: str
    split: str
    weight: float

    @classmethod
    def parse(cls, text: str) -> "WeightedSource":
        """ "PATH:SPLIT:WEIGHT". Raises ValueError that says so."""
        path, colon, rest = text.rpartition(":")
        path, _, split = path.rpartition(":")
        try:
            weight = float(rest)
        except ValueError:
            weight = -1.0
        if not (colon and path and split) or not 0 < weight < float("inf"):
            raise ValueError(
                f"config.data.mixture holds {text!r}; write PATH:SPLIT:WEIGHT with a positive "
                "weight, as in runs/meld:train:2.5."
            )
        return cls(path, split, weight)

    @property
    def name(self) -> str:
        return f"{self.path}:{self.split}"


class Sources:
    """Random access to the records of several sources, numbered one source after another.

    An epoch has as many examples as there are records, and source k gets the share of its weight
    (see `Draw`). Each source is visited in its own shuffled order, which continues across epochs:
    with half of its natural share a source is visited once in two epochs, with twice its share
    twice in one.
    """

    def __init__(self, sources: Sequence[RecordSource], weights: Sequence[float]):
        self.sources = list(sources)
        self._starts = np.cumsum([0, *map(len, self.sources)])
        self.shares = np.asarray(weights, np.float64) / np.sum(weights)

    @classmethod
    def open(cls, mixture: Sequence[WeightedSource]) -> "Sources":
        opened = [RecordSource(part.path, part.split) for part in mixture]
        return cls(opened, [part.weight for part in mixture])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        source, inside = self._at(index)
        return source[inside]

    def outline(self, index: int) -> Record:
        source, inside = self._at(index)
        return source.outline(inside)

    @property
    def fingerprint(self) -> str:
        """Changes with the records of the sources and the order of sources, not with weights."""
        parts = [source.fingerprint for source in self.sources]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def where(self, index: int) -> str:
        source, inside = self._at(index)
        return f"{source.path}: {source.where(inside)}"

    def index(self, clip_id: str) -> int:
        """Position of a clip. Raises ValueError if no source holds it, or more than one does."""
        found = []
        for start, source in zip(self._starts, self.sources, strict=False):
            try:
                found.append(int(start) + source.index(clip_id))
            except KeyError:
                continue
        if len(found) == 1:
            return found[0]
        names = ", ".join(self.names)
        raise ValueError(
            f"The clip {clip_id!r} of a preference pair is in {len(found)} of the record sources "
            f"({names}); it must be in exactly one. Mine the pairs from these records, or correct "
            "config.data.path, split or mixture."
        )

    def source_of(self, indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Which source each of these records comes from."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    @property
    def names(self) -> list[str]:
        return [f"{source.path}:{source.split}" for source in self.sources]

    def _at(self, index: int) -> tuple[RecordSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"Record {index} of {len(self)}.")
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[k], int(index - self._starts[k])


@dataclasses.dataclass(frozen=True)
class Draw:
    """Maps an epoch number to the `usable` examples that the epoch visits; a pure function.

    `source_of[i]` is the source of usable example i, `shares` the share of an epoch that each
    source gets.
    """

    usable: Int[np.ndarray, " M"]
    source_of: Int[np.ndarray, " M"]
    names: Sequence[str]
    shares: Float[np.ndarray, " S"]
    seed: int

    def __call__(self, epoch: int) -> Int[np.ndarray, " M"]:
        """The examples of an epoch, source by source, not shuffled."""
        return np.concatenate([self._of(k, epoch) for k in range(len(self.shares))])

    def counts(self, epoch: int) -> dict[str, int]:
        """Examples that an epoch takes from each source."""
        taken = self.taken(epoch + 1) - self.taken(epoch)
        return dict(zip(self.names, taken.tolist(), strict=True))

    def taken(self, epochs: int) -> Int[np.ndarray, " S"]:
        """Examples that the first `epochs` epochs take from each source."""
        # Rounding the running total, not each epoch's part, keeps the shares over many epochs.
        return np.rint(epochs * len(self.usable) * self.shares).astype(np.int64)

    def epochs(self, examples: int) -> float:
        """How many epochs the first so many examples are.

        A whole number where an epoch ends, although rounding gives one epoch a few examples more
        than another.
        """
        epoch = examples // len(self.usable)
        while self.taken(epoch).sum() > examples:
            epoch -= 1
        while self.taken(epoch + 1).sum() <= examples:
            epoch += 1
        first, last = (int(self.taken(e).sum()) for e in (epoch, epoch + 1))
        return epoch + (examples - first) / (last - first)

    def _of(self, k: int, epoch: int) -> Int[np.ndarray, " m"]:
        own = self.usable[self.source_of == k]
        if len(self.shares) == 1:
            return own
        if not len(own):
            raise ValueError(f"{self.names[k]} has no usable example; take it out of the mixture.")
        first, last = (int(self.taken(e)[k]) for e in (epoch, epoch + 1))
        passes = range(first // len(own), -(-last // len(own)))
        rngs = [np.random.default_rng([self.seed, _STREAM, k, number]) for number in passes]
        orders = np.concatenate([rng.permutation(own) for rng in rngs] or [own[:0]])
        skipped = first % len(own)
        return orders[skipped : skipped + last - first]
