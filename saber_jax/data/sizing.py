"""Computes the sizes of all examples from outlines, and selects those that fit into a row."""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging
from jaxtyping import Int
from tqdm import tqdm

from saber_jax.data.examples import Size
from saber_jax.data.packing import Budget
from saber_jax.data.planning import SIZE_NAMES, fits
from saber_jax.data.quarantine import LeftOut
from saber_jax.data.records import BadRecordError
from saber_jax.runs.files import exists, opened, replacing

BAD = -1
"""The value of all sizes of an example whose record cannot be used."""

LEAST_PAIRS = 2
"""A thinned clip keeps at least this many frame pairs, as sampling keeps at least four frames."""


class Measurable(Protocol):
    """The part of `encoded.Examples` that `measure` uses."""

    @property
    def requests(self) -> Sequence: ...

    def measure(self, index: int) -> tuple[list[Size], int, Int[np.ndarray, " n"]]:
        """Sizes under every request, frame pairs, all target tokens."""
        ...

    def entry(self, index: int, reason: str, detail: str) -> LeftOut: ...


@dataclasses.dataclass
class Measurements:
    """Sizes of N examples with K requests; 0 for those of other processes, so that they add up."""

    sizes: Int[np.ndarray, "K N D"]
    frame_pairs: Int[np.ndarray, " N"]
    token_counts: Int[np.ndarray, " V"]

    @property
    def frame_patches(self) -> Int[np.ndarray, " N"]:
        """Patches of one frame pair; all pairs of a clip have the same size."""
        patches = self.sizes[..., SIZE_NAMES.index("patches")].max(0)
        return patches // np.maximum(self.frame_pairs, 1)

    def __add__(self, other: "Measurements") -> "Measurements":
        return Measurements(
            self.sizes + other.sizes,
            self.frame_pairs + other.frame_pairs,
            _added(self.token_counts, other.token_counts),
        )


def save(path: Path, measurements: Measurements, fingerprint: str) -> None:
    """Stores the measurements under the `fingerprint` of the examples."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **vars(measurements), fingerprint=np.array(fingerprint))


def load(path: Path, fingerprint: str) -> Measurements | None:
    """The stored measurements, or None if there are none, or damaged or other examples' ones."""
    if not exists(path):
        return None
    fields = [field.name for field in dataclasses.fields(Measurements)]
    try:
        with opened(path) as file, np.load(file) as stored:
            if str(stored["fingerprint"]) == fingerprint:
                return Measurements(**{name: stored[name] for name in fields})
        logging.info("%s is of other records or pairs; they are measured again.", path)
    except Exception as error:  # Reading a damaged zip raises many types of exceptions.
        logging.warning("%s is damaged (%s); the examples are measured again.", path, error)
    return None


def measure(
    examples: Measurable,
    total: int,
    indices: Iterable[int],
    *,
    workers: int = 0,
    quiet: bool = True,
) -> Measurements:
    """Measures the `indices` of `total` examples in `workers` processes; the others stay 0."""
    indices = list(indices)
    shares = [indices[i : i + 512] for i in range(0, len(indices), 512)]
    result = _nothing(examples, total)
    bar = tqdm(total=len(indices), desc="measuring examples", unit="clip", disable=quiet)
    if workers > 1 and len(shares) > 4:  # Starting processes costs about a second.
        pool = ProcessPoolExecutor(
            workers,
            mp_context=get_context("forkserver"),
            initializer=_start_worker,
            initargs=(examples,),
        )
        with pool:
            parts = pool.map(_measure_in_worker, shares)
            for share, part in zip(shares, parts, strict=True):
                _put(result, share, part)
                bar.update(len(share))
    else:
        for share in shares:
            _put(result, share, _measure_share(examples, share))
            bar.update(len(share))
    bar.close()
    return result


def _nothing(examples: Measurable, total: int) -> Measurements:
    shape = (len(examples.requests), total, len(SIZE_NAMES))
    return Measurements(np.zeros(shape, np.int32), np.zeros(total, np.int32), np.zeros(0, np.int64))


def _put(result: Measurements, indices: Sequence[int], part: Measurements) -> None:
    result.sizes[:, indices] = part.sizes
    result.frame_pairs[indices] = part.frame_pairs
    result.token_counts = _added(result.token_counts, part.token_counts)


def _added(some: Int[np.ndarray, " m"], others: Int[np.ndarray, " n"]) -> Int[np.ndarray, " v"]:
    """Counts by token; ids behind the end of one have not been seen there."""
    counts = np.zeros(max(len(some), len(others)), np.int64)
    counts[: len(some)] += some
    counts[: len(others)] += others
    return counts


_examples: Measurable  # In a worker process.


def _start_worker(examples: Measurable) -> None:
    global _examples
    _examples = examples


def _measure_in_worker(indices: Sequence[int]) -> Measurements:
    return _measure_share(_examples, indices)


def _measure_share(examples: Measurable, indices: Sequence[int]) -> Measurements:
    result = _nothing(examples, len(indices))
    tokens = [np.zeros(0, np.int64)]
    for place, index in enumerate(indices):
        try:
            sizes, result.frame_pairs[place], targets = examples.measure(index)
        except BadRecordError:
            result.sizes[:, place] = BAD
            continue
        result.sizes[:, place] = [dataclasses.astuple(size) for size in sizes]
        tokens.append(targets)
    result.token_counts = np.bincount(np.concatenate(tokens).astype(np.int64))
    return result


@dataclasses.dataclass(frozen=True)
class Selection:
    """The examples that a run with one budget uses, and their sizes.

    `frame_pairs` is the number of frame pairs that a clip keeps, `frame_patches` the patches of one
    pair. `usable` are the indices of examples that are not bad and fit into a row, if necessary
    with fewer frames; `thinned` are those of them that keep fewer frames than they have.
    """

    sizes: Int[np.ndarray, "K N D"]
    frame_patches: Int[np.ndarray, " N"]
    frame_pairs: Int[np.ndarray, " N"]
    usable: Int[np.ndarray, " M"]
    thinned: Int[np.ndarray, " T"]

    def left_out(self, budget: Budget, examples: Measurable) -> list[LeftOut]:
        """The examples that are not usable, each with its reason."""
        rest = np.setdiff1d(np.arange(self.sizes.shape[1]), self.usable)
        return [
            _entry(i, self.sizes[:, i], self.frame_patches[i], budget, examples)
            for i in map(int, rest)
        ]


def select(measured: Measurements, budget: Budget) -> Selection:
    """Selects examples, with fewer frames for clips that are too large; sound and text stay."""
    sizes, pairs = measured.sizes.astype(np.int64), measured.frame_pairs
    text, patches = sizes[..., SIZE_NAMES.index("text")], sizes[..., SIZE_NAMES.index("patches")]
    frame_patches = measured.frame_patches
    a_pair = np.maximum(frame_patches, 1)
    units = np.maximum(a_pair // 4, 1)
    shown = patches > 0  # A request without video does not shrink with the frames.
    excess = np.maximum(
        -(-(patches.max(0) - budget.patches) // a_pair),
        -(-(np.where(shown, text, 0).max(0) - budget.length) // units),
    ).clip(0)
    fewer = (excess > 0) & (pairs - excess >= LEAST_PAIRS)
    drop = np.where(fewer, excess, 0)
    text -= shown * drop * units
    patches -= shown * drop * a_pair
    good = (sizes >= 0).all((0, 2)) & np.all([fits(asked, budget) for asked in sizes], 0)
    if budget.frame_patches is not None:
        good &= frame_patches <= budget.frame_patches
    return Selection(
        sizes,
        frame_patches,
        (pairs - drop).astype(np.int32),
        np.flatnonzero(good),
        np.flatnonzero(fewer & good),
    )


def _entry(
    index: int,
    sizes: Int[np.ndarray, "K D"],
    frame_patches: int,
    budget: Budget,
    examples: Measurable,
) -> LeftOut:
    if (sizes == BAD).all():
        try:
            examples.measure(index)
            detail = "another process could not read it"
        except BadRecordError as error:
            detail = str(error)
        return examples.entry(index, "bad_record", detail)
    over = [
        f"{name} {size} > {limit}"
        for name, size, limit in zip(SIZE_NAMES, sizes.max(0), budget.limits, strict=True)
        if size > limit
    ]
    if budget.frame_patches is not None and frame_patches > budget.frame_patches:
        over.append(f"frame_patches {frame_patches} > {budget.frame_patches}")
    assert over, f"example {index} was left out for no reason: {sizes.tolist()}"
    return examples.entry(index, "too_large", ", ".join(over))


def unigram_entropy(counts: Int[np.ndarray, " V"]) -> float:
    """Entropy of the target tokens' frequencies, in nats per token. A model that knows how often
    each token occurs, and nothing else, reaches this loss."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
