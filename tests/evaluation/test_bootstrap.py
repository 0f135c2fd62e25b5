import numpy as np
import pytest

from saber_jax.evaluation import bootstrap


def test_intervals_are_repeatable_hold_the_value_and_shrink_with_more_items():
    few = bootstrap.mean(np.arange(20) % 2 == 0)
    many = bootstrap.mean(np.arange(2000) % 2 == 0)
    assert few == bootstrap.mean(np.arange(20) % 2 == 0)
    assert few["interval"][0] < few["value"] < few["interval"][1]
    # 1.96 standard errors of a proportion of one half.
    assert many["interval"][1] - many["value"] == pytest.approx(1.96 * 0.5 / 2000**0.5, abs=3e-3)
    assert many["interval"][1] < few["interval"][1]


def test_a_paired_gain_without_any_change_has_no_width():
    hits = np.array([True, False, True])
    assert bootstrap.paired_gain(hits, hits) == {"n": 3, "value": 0.0, "interval": [0.0, 0.0]}
    assert bootstrap.paired_gain(hits, ~hits)["value"] == pytest.approx(-1 / 3)


def test_a_ratio_weighs_items_by_their_size():
    score = bootstrap.ratio(np.array([1, 0]), np.array([2, 8]))
    assert score["value"] == 1 / 10
    assert score["interval"] == [0.0, 0.5]


def test_the_gap_of_two_ratios_is_resampled_on_both_sides():
    rng = np.random.default_rng(1)
    units = rng.integers(3, 12, 200)
    groups = [np.stack([rng.binomial(units, rate), units], axis=1) for rate in (0.2, 0.5)]
    gap = bootstrap.ratio_gap(*groups)
    rates = [part[:, 0].sum() / part[:, 1].sum() for part in groups]
    assert gap["value"] == pytest.approx(rates[0] - rates[1])
    # Normal approximation: the standard error of a ratio from its residuals.
    errors = [
        np.std(g[:, 0] - r * g[:, 1]) / g[:, 1].mean() for g, r in zip(groups, rates, strict=True)
    ]
    width = 1.96 * np.hypot(*errors) / 200**0.5
    assert gap["interval"] == pytest.approx([gap["value"] - width, gap["value"] + width], abs=4e-3)


def test_a_statistic_of_a_confusion_matrix_is_resampled_like_its_items():
    hits = np.arange(300) % 3 > 0
    counts = np.array([[hits.sum(), (~hits).sum()], [0, 0]])

    def accuracy(c):
        return c[:, 0, 0] / c.sum(axis=(1, 2))

    of_counts, of_items = bootstrap.of_groups(counts, accuracy), bootstrap.mean(hits)
    assert of_counts["value"] == of_items["value"]
    assert of_counts["interval"] == pytest.approx(of_items["interval"], abs=8e-3)


def test_nothing_to_count_is_no_value():
    empty = {"n": 0, "value": None, "interval": None}
    nothing = np.array([], bool)
    assert bootstrap.mean(nothing) == bootstrap.ratio(nothing, nothing) == empty
    assert bootstrap.of_groups(np.zeros((0, 0), int), lambda c: c) == empty
    none, pairs = {"value": None, "interval": None}, np.array([[1, 2]])
    assert bootstrap.mean_gap(nothing, np.array([True])) == none
    assert bootstrap.ratio_gap(pairs[:0], pairs) == bootstrap.ratio_gap(pairs, pairs[:0]) == none
