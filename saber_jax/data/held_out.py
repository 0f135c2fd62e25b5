"""Which examples are kept from training, to see how well it goes on what it never saw."""

import numpy as np
from jaxtyping import Int, UInt64


def split(
    usable: Int[np.ndarray, " N"], record_of: Int[np.ndarray, " N"], most: int, seed: int
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " H"]]:
    """(examples to train on, examples held out): about `most` of the `usable` ones.

    All examples of a record go to the same side, so that no clip of the held-out part is trained
    on; `record_of[i]` is the record of usable[i]. Records are drawn by a hash of their number and
    the seed, so pairs that are added later leave most of the choice as it was. Raises ValueError if
    less than half would be left to train on.
    """
    if not most:
        return usable, usable[:0]
    records, counts = np.unique(record_of, return_counts=True)
    order = np.argsort(_mixed(records, seed), kind="stable")
    # Records in this order, until they have `most` examples; the one that crosses it is in.
    before = np.cumsum(counts[order]) - counts[order]
    held = np.isin(record_of, records[order[before < most]])
    if held.sum() * 2 > len(usable):
        raise ValueError(
            f"config.validate.examples={most} would hold out {held.sum()} of {len(usable)} "
            "examples, more than are left to train on. Lower it, or set it to 0 to train without "
            "validation."
        )
    return usable[~held], usable[held]


def _mixed(numbers: Int[np.ndarray, " n"], seed: int) -> UInt64[np.ndarray, " n"]:
    """The finalizer of SplitMix64, https://doi.org/10.1145/2660193.2660195."""
    x = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
