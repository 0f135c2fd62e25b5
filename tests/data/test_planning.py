"""Which examples share a row: nothing lost, nothing too full, little wasted, and the same again."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from benchmarks import lengths
from saber_jax.data import planning
from saber_jax.data.packing import Budget
from saber_jax.data.planning import Plan, plan_rows

BUDGET = Budget(length=400, patches=288, chunks=2, targets=256, segments=4)


def random_sizes(n: int, seed: int) -> np.ndarray:
    """Sizes of supervised examples, whose response regions are empty."""
    rng = np.random.default_rng(seed)
    text = rng.integers(20, 200, n)
    none = 0 * text
    return np.stack([text, none, none, rng.integers(1, 9, n) * 16, none + 1, text // 2], 1)


def flat(rows) -> list[int]:
    return [index for row in rows for index in row]


@pytest.mark.parametrize("count", [0, 1, 2, 500, 5000])
def test_every_example_lands_in_exactly_one_row(count):
    sizes = random_sizes(count, 0)
    order = np.random.default_rng(1).permutation(count)
    assert sorted(flat(plan_rows(sizes, order, BUDGET))) == list(range(count))


def test_no_row_exceeds_any_budget():
    pairs = lengths.pairs(800, lengths.EXACT, np.random.default_rng(2))
    budget = Budget(length=4096, response=900, patches=9600, chunks=15, targets=4000, segments=3)
    rows = plan_rows(pairs, np.arange(800), budget)
    assert sorted(flat(rows)) == list(range(800))
    for row in rows:
        assert (pairs[row].sum(0) <= budget.limits).all() and len(row) <= 3


def test_plan_is_a_function_of_its_arguments_alone():
    sizes = random_sizes(3000, 3)
    order = np.random.default_rng(4).permutation(3000)
    assert plan_rows(sizes, order, BUDGET) == plan_rows(sizes.copy(), order.copy(), BUDGET)


def test_an_example_larger_than_a_row_is_refused_with_its_size():
    sizes = np.array([[10, 0, 0, 4, 1, 5], [10, 0, 0, 999, 1, 5]])
    with pytest.raises(ValueError, match=r"index 1.*999.*288"):
        plan_rows(sizes, np.arange(2), BUDGET)


def test_rows_of_saber_like_lengths_are_full():
    sizes = lengths.supervised(planning.WINDOW, lengths.RELEASE, np.random.default_rng(5))
    budget = Budget(length=4096, patches=7744, chunks=10, targets=2048, segments=16)
    sizes = sizes[planning.fits(sizes, budget)]
    filled = planning.fill(sizes, plan_rows(sizes, np.arange(len(sizes)), budget), budget)
    assert filled["text"] > 0.97 and filled["patches"] > 0.92 and filled["chunks"] > 0.92


def test_what_is_carried_to_the_next_window_fills_rows(monkeypatch):
    sizes = lengths.pairs(2048, lengths.RELEASE, np.random.default_rng(5))
    budget = Budget(length=4096, response=1408, patches=10560, chunks=14, targets=4352, segments=7)
    order = np.flatnonzero(planning.fits(sizes, budget))
    monkeypatch.setattr(planning, "WINDOW", 512)
    filled = []
    for carried in (0, 128):
        monkeypatch.setattr(planning, "CARRIED", carried)
        rows = plan_rows(sizes, order, budget)
        assert sorted(itertools.chain.from_iterable(rows)) == order.tolist()
        filled.append(planning.fill(sizes, rows, budget)["text"])
    assert filled[1] > filled[0] + 0.004


def plan_of(examples: int, seed: int = 7, **changes) -> Plan:
    return Plan(random_sizes(examples, 6)[None], BUDGET, seed, **changes)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(planning, "WINDOW", 100)
    monkeypatch.setattr(planning, "CARRIED", 25)


def test_a_plan_entered_at_any_row_goes_on_as_if_it_had_come_from_the_start(small_windows):
    examples = 260  # Three windows an epoch.
    whole = plan_of(examples)
    expected = [whole.row(r) for r in range(450)]
    assert whole.position(390).epoch > 1
    for row in (0, 1, 130, 390):
        entered = plan_of(examples).entered(whole.position(row))
        assert [entered.row(r) for r in range(row, row + 60)] == expected[row : row + 60]
    with pytest.raises(IndexError, match="where this plan starts"):
        entered.row(0)


def test_every_epoch_of_many_windows_visits_every_example_once(small_windows):
    examples = 260
    plan = plan_of(examples)
    stream = itertools.chain.from_iterable(plan.row(r) for r in itertools.count())
    for _ in range(2):
        assert sorted(itertools.islice(stream, examples)) == list(range(examples))


def test_the_examples_of_a_begun_epoch_are_those_of_its_rows_so_far(small_windows):
    examples = 260
    plan, seen, epoch = plan_of(examples), [], 0
    for row in range(390):
        at = plan.position(row)
        if at.epoch > epoch:
            assert sorted(seen) == list(range(examples))
            seen, epoch = [], at.epoch
        assert sorted(plan.begun(row)) == sorted(seen)
        seen += plan.row(row)
    assert epoch > 1


def test_a_plan_pickled_to_a_worker_gives_the_same_rows_in_any_order():
    plan = plan_of(300)
    copy = pickle.loads(pickle.dumps(plan))
    last = copy.row(40)
    assert [copy.row(r) for r in range(41)] == [plan.row(r) for r in range(41)]
    assert last == plan.row(40)


def test_anything_that_changes_a_batch_changes_the_fingerprint():
    plan = plan_of(300)
    other = Plan(random_sizes(300, 6)[None], dataclasses.replace(BUDGET, chunks=3), 7)
    prints = {p.fingerprint() for p in (plan, other, plan_of(300, seed=8), plan_of(299))}
    assert len(prints) == 4 and plan_of(300).fingerprint() == plan.fingerprint()
