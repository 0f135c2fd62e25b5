"""Intervals over seeds and clips."""

import numpy as np
import pytest

from benchmarks.ablation import intervals
from saber_jax.evaluation import bootstrap


def rate(right: int, clips: int = 100) -> np.ndarray:
    """Counts of one seed of which the first `right` clips are right."""
    return np.stack([np.arange(clips) < right, np.ones(clips)], axis=1).astype(float)


def width(score: bootstrap.Score) -> float:
    low, high = score["interval"]
    return high - low


def test_one_seed_has_the_interval_of_its_clips():
    score, plain = intervals.estimate([rate(70)]), bootstrap.mean(np.arange(100) < 70)
    assert (score["n"], score["value"]) == (100, pytest.approx(0.7))
    np.testing.assert_allclose(score["interval"], plain["interval"], atol=0.02)


def test_seeds_that_disagree_widen_the_interval_of_an_equal_mean():
    agree, disagree = [rate(50)] * 4, [rate(20), rate(80), rate(20), rate(80)]
    scores = [intervals.estimate(seeds) for seeds in (agree, disagree)]
    assert scores[0]["value"] == scores[1]["value"] == pytest.approx(0.5)
    assert width(scores[0]) < 0.12
    assert width(scores[1]) > 2 * width(scores[0])


def test_seeds_are_drawn_as_a_whole():
    """Of two seeds, one always right and one never, a quarter of the resamples has the right one
    twice, so the interval reaches from 0 to 1."""
    assert intervals.estimate([rate(0), rate(100)])["interval"] == [0.0, 1.0]


def test_arms_are_compared_on_the_same_clips():
    before = [rate(50), rate(60)]
    after = [rate(52), rate(62)]
    gained = intervals.gain(before, after)
    assert gained["value"] == pytest.approx(0.02)
    # Drawn apart, two accuracies of 100 clips would differ by 0.2 at times.
    assert gained["interval"][0] >= 0 and width(gained) < 0.06


def test_a_gain_over_a_share_is_counted_from_that_share():
    gained = intervals.gain([rate(40)], [rate(10)], share=0.5)
    assert gained["value"] == pytest.approx(-0.10)


def test_long_clips_weigh_more_in_an_error_rate():
    counts = np.array([[1.0, 1.0], [0.0, 9.0]])
    assert intervals.estimate([counts])["value"] == pytest.approx(0.1)


def test_arms_with_other_clips_are_not_compared():
    with pytest.raises(ValueError, match="same clips"):
        intervals.gain([rate(5, 10)], [rate(5, 11)])


def test_clips_that_seeds_share_are_drawn_once_for_all_of_them():
    """With the same answers of every seed, more seeds say no more about other clips."""
    same = [rate(50)] * 8
    alone = width(intervals.estimate([rate(50)]))
    assert width(intervals.estimate(same, shared=True)) == pytest.approx(alone, rel=0.1)
    assert width(intervals.estimate(same)) < 0.5 * alone


def test_seeds_that_share_clips_still_disagree():
    assert intervals.estimate([rate(0), rate(100)], shared=True)["interval"] == [0.0, 1.0]


def test_nothing_is_said_about_no_clips():
    empty = np.zeros((0, 2))
    assert intervals.value(empty) is None
    assert intervals.estimate([empty, empty])["value"] is None
    assert intervals.gain([empty], [empty], shared=True)["interval"] is None
