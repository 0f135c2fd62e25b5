import numpy as np
import pytest

from saber_jax.data.held_out import split


def test_no_record_is_on_both_sides_and_every_example_on_one():
    usable, record_of = np.arange(10, 110), np.repeat(np.arange(25), 4)
    trained, held = split(usable, record_of, 20, seed=0)
    assert sorted([*trained, *held]) == usable.tolist()
    assert len(held) == 20
    assert not set(record_of[trained - 10]) & set(record_of[held - 10])


def test_without_validation_everything_is_trained_on():
    trained, held = split(np.arange(5), np.arange(5), 0, seed=0)
    assert trained.tolist() == list(range(5)) and not len(held)


def test_another_seed_holds_out_others():
    numbers = np.arange(100)
    assert set(split(numbers, numbers, 20, seed=0)[1]) != set(
        split(numbers, numbers, 20, seed=1)[1]
    )


def test_added_pairs_leave_most_of_the_choice_as_it_was():
    before = split(np.arange(200), np.arange(200), 40, seed=0)[1]
    after = split(np.arange(220), np.arange(220), 40, seed=0)[1]
    assert len(set(before) & set(after)) >= 32


def test_more_than_half_is_refused():
    with pytest.raises(ValueError, match=r"validate\.examples=6 would hold out 6 of 10"):
        split(np.arange(10), np.arange(10), 6, seed=0)
