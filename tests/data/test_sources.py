"""Mixtures: every source gets its share, over many epochs, and nothing is drawn unevenly."""

from collections import Counter

import numpy as np
import pytest

from saber_jax.data.sources import Draw, Sources, WeightedSource
from tests.data.test_loader import Source


def draw_of(sizes: tuple[int, ...], weights: tuple[float, ...], unusable: int = 0) -> Draw:
    source_of = np.repeat(np.arange(len(sizes)), sizes)[unusable:]
    names = [f"s{k}:train" for k in range(len(sizes))]
    shares = np.array(weights) / sum(weights)
    return Draw(np.arange(unusable, sum(sizes)), source_of, names, shares, seed=3)


def test_one_source_is_visited_once_an_epoch():
    draw = draw_of((9,), (2.0,), unusable=2)
    assert sorted(draw(0)) == sorted(draw(5)) == list(range(2, 9))


def test_every_source_gets_its_share_however_many_epochs_it_takes():
    draw = draw_of((60, 30, 11), (1.0, 1.0, 0.05))
    drawn = [draw(epoch) for epoch in range(40)]
    assert {len(ids) for ids in drawn} <= {99, 100, 101, 102, 103}  # Shares are rounded.
    counts = Counter(np.searchsorted([60, 90], np.concatenate(drawn), side="right").tolist())
    total = sum(counts.values())
    for k, weight in enumerate((1.0, 1.0, 0.05)):
        assert counts[k] == pytest.approx(total * weight / 2.05, abs=1.0)
    named = Counter()
    for epoch in range(40):
        named += Counter(draw.counts(epoch))
    assert named == {f"s{k}:train": count for k, count in counts.items()}


@pytest.mark.parametrize(
    ("sizes", "weights"), [((9,), (1.0,)), ((5, 4), (1.0, 1.0)), ((2, 1, 1), (1.0, 1.0, 0.1))]
)
def test_epochs_are_whole_where_they_end_however_many_examples_rounding_gives_them(sizes, weights):
    draw, passed, seen = draw_of(sizes, weights), 0, [0.0]
    for epoch in range(12):
        assert draw.epochs(passed) == epoch
        length = len(draw(epoch))
        assert sum(draw.counts(epoch).values()) == length
        seen += [draw.epochs(passed + n) for n in range(1, length + 1)]
        passed += length
    assert seen == sorted(set(seen)) and draw.taken(12).sum() == passed


def test_an_upweighted_source_repeats_no_example_before_all_were_seen():
    draw = draw_of((50, 20), (1.0, 3.0))
    small = np.concatenate([draw(epoch) for epoch in range(7)])
    small = small[small >= 50]
    for start in range(0, len(small) - 20, 20):
        assert len(set(small[start : start + 20].tolist())) == 20


def test_an_epoch_is_a_function_of_its_number_alone():
    np.testing.assert_array_equal(draw_of((9, 5), (1, 2))(7), draw_of((9, 5), (1, 2))(7))


def test_records_are_numbered_through_and_found_in_the_source_that_has_them():
    sources = Sources([Source(4, names="a"), Source(3, names="b")], [1.0, 1.0])
    assert len(sources) == 7 and sources[5].clip_id == "b1" and sources.index("b1") == 5
    assert sources.where(5) == "made-up: made-up-00000-of-00001[1]"
    np.testing.assert_array_equal(sources.source_of(np.arange(7)), [0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="is in 0 of the record sources"):
        sources.index("c0")
    twice = Sources([Source(4, names="a"), Source(3, names="a")], [1.0, 1.0])
    with pytest.raises(ValueError, match="is in 2 of the record sources"):
        twice.index("a1")


@pytest.mark.parametrize("text", ["runs/a", "runs/a:train", "runs/a:train:", "a:train:-1", ":t:1"])
def test_a_mixture_that_is_not_path_split_weight_is_refused(text):
    with pytest.raises(ValueError, match="PATH:SPLIT:WEIGHT"):
        WeightedSource.parse(text)


def test_a_path_may_hold_colons():
    assert WeightedSource.parse("gs://bucket/a:train:2.5") == WeightedSource(
        "gs://bucket/a", "train", 2.5
    )
