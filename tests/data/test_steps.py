"""Steps of equally many examples: exact, static in shape, and the same on any number of hosts."""

import itertools

import numpy as np
import pytest

from saber_jax.data import planning
from saber_jax.data.loader import HostRows
from saber_jax.data.steps import StepSize
from tests.data.test_planning import plan_of

STEP = StepSize(examples=32, rows=24)


def flat(rows):
    return [example for row in rows for example in row]


def test_a_row_that_exceeds_a_step_is_divided_between_it_and_the_next():
    rows = [["a", "b"], ["c"], ["d", "e"], ["f"], ["g", "h"]]
    laid, over = StepSize(examples=4, rows=4).lay_out(rows, last=False)
    steps = [laid[:4], laid[4:]]
    assert [len(flat(step)) for step in steps] == [4, 4] and not over
    assert sorted(flat(laid)) == list("abcdefgh")
    whole = sum(row in laid for row in rows)
    assert whole >= len(rows) - 1  # One boundary divides one row at most.


def test_what_does_not_fill_a_step_is_left_over_or_a_smaller_last_step():
    rows = [[1, 2, 3], [4, 5, 6]]
    laid, over = StepSize(examples=4, rows=2).lay_out(rows, last=False)
    assert len(flat(laid)) == 4 and len(over) == 2
    laid, over = StepSize(examples=4, rows=2).lay_out(rows, last=True)
    assert [len(flat(laid[:2])), len(flat(laid[2:]))] == [4, 2] and not over


def test_steps_need_about_equally_many_rows():
    rng = np.random.default_rng(0)
    rows = [list(range(n)) for n in rng.choice([1, 2, 12], 1000, p=[0.5, 0.3, 0.2])]
    mean = 64 * len(rows) / len(flat(rows))
    assert StepSize(examples=64, rows=round(mean) + 5).lay_out(rows, last=False)
    unmixed = StepSize(examples=64, rows=64)._divided(rows)
    assert max(map(len, unmixed)) > round(mean) + 10


def test_too_little_room_is_refused_with_what_is_needed():
    rows = [[i] for i in range(8)]
    with pytest.raises(ValueError, match=r"needs up to 4 rows .* Set batch_rows to 4"):
        StepSize(examples=4, rows=3).lay_out(rows, last=False)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(planning, "WINDOW", 100)
    monkeypatch.setattr(planning, "CARRIED", 25)


EXAMPLES = 260  # Three windows and nine steps an epoch, the last one of four examples.


def test_an_epoch_has_whole_steps_and_a_smaller_last_one(small_windows):
    plan = plan_of(EXAMPLES, step=STEP)
    steps = STEP.steps(EXAMPLES)
    assert steps == 9
    for epoch in range(2):
        rows = [plan.row(epoch * steps * 24 + r) for r in range(steps * 24)]
        counts = [len(flat(rows[s * 24 : (s + 1) * 24])) for s in range(steps)]
        assert counts == [32] * 8 + [4]
        assert sorted(flat(rows)) == list(range(EXAMPLES))
    assert plan.position(2 * steps * 24).epoch == 2


def test_which_examples_form_a_step_does_not_depend_on_its_rows(small_windows):
    narrow = plan_of(EXAMPLES, step=STEP)
    wide = plan_of(EXAMPLES, step=StepSize(examples=32, rows=30))
    for s in range(15):
        assert [r for i in range(24) if (r := narrow.row(s * 24 + i))] == [
            r for i in range(30) if (r := wide.row(s * 30 + i))
        ]


def test_steps_go_on_from_a_checkpoint_and_count_what_was_seen(small_windows):
    plan, seen, epoch = plan_of(EXAMPLES, step=STEP), [], 0
    for s in range(15):
        at = plan.position(s * 24)
        seen, epoch = ([], at.epoch) if at.epoch > epoch else (seen, epoch)
        assert sorted(plan.begun(s * 24)) == sorted(seen)
        entered = plan_of(EXAMPLES, step=STEP).entered(at)
        rows = [plan.row(s * 24 + i) for i in range(24)]
        assert [entered.row(s * 24 + i) for i in range(24)] == rows
        seen += flat(rows)
    assert epoch == 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_make_the_same_steps_together(small_windows, hosts):
    rows = plan_of(EXAMPLES, step=STEP).rows(5 * 24)
    share = 24 // hosts
    sources = [
        HostRows(rows, 24, start=2, local=range(h * share, (h + 1) * share)) for h in range(hosts)
    ]
    for s in range(3):
        made = [list(source[s * share + i].examples) for source in sources for i in range(share)]
        assert made == rows[(2 + s) * 24 : (3 + s) * 24]


def test_no_room_in_any_step_of_a_run_is_seen_when_all_are_planned(small_windows):
    rows = plan_of(EXAMPLES, step=StepSize(examples=32, rows=3)).rows(60)
    with pytest.raises(ValueError, match="rows of these data"):
        rows.plan()
    assert len(list(itertools.chain(*plan_of(EXAMPLES, step=STEP).rows(24)))) == 32
