"""95 % intervals over seeds and clips: a hierarchical bootstrap.

What another run would give differs for two reasons: another seed draws other weights, other batches
and another corpus, and another test set has other clips. So a resample first draws seeds with
replacement, and then, for each seed drawn, its clips. Clips that all seeds share are drawn once for
all of them. Two arms are compared on the same draws.

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


def value(counts: Counts) -> float | None:
    """The value of one arm and seed; None without clips."""
    return float(_ratio(counts.sum(axis=0))) if len(counts) else None


def estimate(seeds: Sequence[Counts], *, shared: bool = False) -> Score:
    """The value of one arm, given its counts by seed; `shared`: all seeds have the same clips."""
    return _score([counts[:, None] for counts in seeds], np.ones(1), shared)


def gain(
    before: Sequence[Counts], after: Sequence[Counts], *, share: float = 1.0, shared: bool = False
) -> Score:
    """How far `after` lies above `share` times `before`; both hold the same seeds and clips.

    Raises ValueError if they do not.
    """
    if [len(counts) for counts in before] != [len(counts) for counts in after]:
        raise ValueError("Two arms can be compared on the same clips of the same seeds only.")
    pairs = [np.stack(both, axis=1) for both in zip(before, after, strict=True)]
    return _score(pairs, np.array([-share, 1.0]), shared)


def _score(
    arms: Sequence[Float[np.ndarray, "n A 2"]], weights: Float[np.ndarray, "A"], shared: bool
) -> Score:
    if not all(map(len, arms)):
        return dict(bootstrap.EMPTY)
    mean = float(np.mean([_ratio(counts.sum(axis=0)) @ weights for counts in arms]))
    drawn = (_resampled_shared if shared else _resampled)(arms) @ weights
    return bootstrap.score(sum(map(len, arms)), mean, drawn)


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


def _resampled_shared(arms: Sequence[Float[np.ndarray, "n A 2"]]) -> Float[np.ndarray, "R A"]:
    rng = np.random.default_rng(SEED)
    seeds, clips = len(arms), len(arms[0])
    picked = rng.integers(0, seeds, (RESAMPLES, seeds))
    # How often each clip is drawn, which is the same for every seed.
    times = rng.multinomial(clips, np.full(clips, 1 / clips), RESAMPLES).astype(float)
    by_seed = _ratio(np.einsum("Rn,SnAc->RSAc", times, np.stack(arms)))
    return np.take_along_axis(by_seed, picked[:, :, None], axis=1).mean(axis=1)


def _ratio(sums: Float[np.ndarray, "*R A 2"]) -> Float[np.ndarray, "*R A"]:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)
