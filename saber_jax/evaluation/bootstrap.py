"""Scores with 95 % bootstrap intervals, as the JSON values that scores.json holds.

A score is {"n", "value", "interval"}: how many items it is over, its value, and the percentiles 2.5
and 97.5 of the values of resampled items. Value and interval are None when there is nothing to
count. Equal inputs give equal intervals: every call draws from the same seed.

Axis letters: n, m items   R resamples   K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 2000
SEED = 0
MOST_AT_ONCE = 1 << 20

Score = dict[str, Any]
EMPTY: Score = {"n": 0, "value": None, "interval": None}


def mean(values: Bool[np.ndarray, "n"] | Float[np.ndarray, "n"]) -> Score:
    """The mean of one value per item; a rate if they are booleans."""
    if not len(values):
        return dict(EMPTY)
    return score(len(values), float(values.mean()), means(values, _rng()))


def mean_of_known(values: Sequence[float | None]) -> Score:
    """`mean` of a judge's scores; "unscored" counts the items without one, which are left out."""
    known = [value for value in values if value is not None]
    return mean(np.array(known, float)) | {"unscored": len(values) - len(known)}


def ratio(numerators: Int[np.ndarray, "n"], denominators: Int[np.ndarray, "n"]) -> Score:
    """Sum over sum, for errors per word: items with more words weigh more."""
    if not len(numerators) or not denominators.sum():
        return dict(EMPTY)
    over, under = sums(np.stack([numerators, denominators], axis=1), _rng()).T
    drawn = over / np.maximum(under, 1)
    return score(len(numerators), float(numerators.sum() / denominators.sum()), drawn)


def mean_gap(agreeing: np.ndarray, differing: np.ndarray) -> Score:
    """The mean of the first group of items minus that of the second."""
    if not len(agreeing) or not len(differing):
        return {"value": None, "interval": None}
    rng = _rng()
    lost = means(agreeing, rng) - means(differing, rng)
    return {"value": float(agreeing.mean() - differing.mean()), "interval": interval(lost)}


def ratio_gap(agreeing: Int[np.ndarray, "n 2"], differing: Int[np.ndarray, "m 2"]) -> Score:
    """`mean_gap` for sums over sums; the columns are numerators and denominators."""
    if not agreeing[:, 1].sum() or not differing[:, 1].sum():
        return {"value": None, "interval": None}
    rng = _rng()
    groups = (agreeing, differing)
    first, second = (part[:, 0].sum() / part[:, 1].sum() for part in groups)
    drawn = [sums(part, rng).T for part in groups]
    lost = np.subtract(*(over / np.maximum(under, 1) for over, under in drawn))
    return {"value": float(first - second), "interval": interval(lost)}


def paired_gain(before: Bool[np.ndarray, "n"], after: Bool[np.ndarray, "n"]) -> Score:
    """The gain of a second model over a first one on the same items, in the same order."""
    return mean(after.astype(np.float64) - before)


def of_groups(
    counts: Int[np.ndarray, "K K"], statistic: Callable[[Float[np.ndarray, "R K K"]], np.ndarray]
) -> Score:
    """A statistic of a confusion matrix. Resampling items is drawing its cells anew."""
    n = int(counts.sum())
    if not n:
        return dict(EMPTY)
    drawn = _rng().multinomial(n, counts.ravel() / n, RESAMPLES).reshape(RESAMPLES, *counts.shape)
    return score(n, float(statistic(counts[None].astype(float))[0]), statistic(drawn.astype(float)))


def score(n: int, value: float, drawn: Float[np.ndarray, "R"]) -> Score:
    return {"n": n, "value": value, "interval": interval(drawn)}


def interval(drawn: Float[np.ndarray, "R"]) -> list[float]:
    return [float(x) for x in np.quantile(drawn, [0.025, 0.975])]


def means(values: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "R"]:
    """Means of resampled items."""
    return sums(np.asarray(values, np.float64)[:, None], rng)[:, 0] / len(values)


def sums(values: Float[np.ndarray, "n D"], rng: np.random.Generator) -> Float[np.ndarray, "R D"]:
    """Sums over resampled items, every column over the same draw."""
    n, drawn = len(values), np.empty((RESAMPLES, values.shape[1]))
    # Not all draws at once: they are R * n numbers.
    step = max(1, MOST_AT_ONCE // n)
    for start in range(0, RESAMPLES, step):
        picks = rng.integers(0, n, (min(step, RESAMPLES - start), n))
        drawn[start : start + step] = values[picks].sum(axis=1)
    return drawn


def _rng() -> np.random.Generator:
    return np.random.default_rng(SEED)
