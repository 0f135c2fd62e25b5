"""95 % intervals over seeds and clips: a hierarchical bootstrap.

What another run would give differs for two reasons: another seed draws other weights, other batches
and another corpus, and another test set has other clips. So a resample first draws seeds with
replacement, and then, for each seed drawn, its clips. Two arms are compared on the same draws.

A measure of one arm and seed is a [clips, 2] array of numerators and denominators, which are
(right, 1) for an accuracy and (errors, words) for a word error rate. Its value is the mean over
seeds of sum over sum. Scores look as those of saber_jax.evaluation.bootstrap.

Axis letters: n clips   S seeds   R resamples   A arms.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saber_jax.evaluation import bootstrap
from saber_jax.evaluation.bootstrap import RESAMPLES, SEED, Score

Counts = Float[np.ndarray, "n 2"]


def value(counts: Counts) -> float:
    """The value of one arm and seed."""
    return float(_ratio(counts.sum(axis=0)))


def estimate(seeds: Sequence[Counts]) -> Score:
    """The value of one arm, given its counts by seed."""
    return _score(seeds, [counts[:, None] for counts in seeds], np.ones(1))


def gain(before: Sequence[Counts], after: Sequence[Counts], *, share: float = 1.0) -> Score:
    """How far `after` lies above `share` times `before`; both hold the same seeds and clips.

    Raises ValueError if they do not.
    """
    if [len(counts) for counts in before] != [len(counts) for counts in after]:
        raise ValueError("Two arms can be compared on the same clips of the same seeds only.")
    pairs = [np.stack(both, axis=1) for both in zip(before, after, strict=True)]
    return _score(before, pairs, np.array([-share, 1.0]))


def _score(
    seeds: Sequence[Counts],
    arms: Sequence[Float[np.ndarray, "n A 2"]],
    weights: Float[np.ndarray, "A"],
) -> Score:
    mean = float(np.mean([_ratio(counts.sum(axis=0)) @ weights for counts in arms]))
    drawn = _resampled(arms) @ weights
    return bootstrap.score(sum(map(len, seeds)), mean, drawn)


def _resampled(arms: Sequence[Float[np.ndarray, "n A 2"]]) -> Float[np.ndarray, "R A"]:
    rng = np.random.default_rng(SEED)
    count = len(arms)
    picked = rng.integers(0, count, (RESAMPLES, count))
    total = np.zeros((RESAMPLES, arms[0].shape[1]))
    for place in range(count):
        for seed, counts in enumerate(arms):
            who = np.flatnonzero(picked[:, place] == seed)
            clips = rng.integers(0, len(counts), (len(who), len(counts)))
            total[who] += _ratio(counts[clips].sum(axis=1))
    return total / count


def _ratio(sums: Float[np.ndarray, "*R A 2"]) -> Float[np.ndarray, "*R A"]:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)
