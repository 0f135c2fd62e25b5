"""Where a run's time goes, over all of its starts."""

import time

import pytest

from saber_jax.runs import phases
from saber_jax.runs.files import write_json
from saber_jax.runs.phases import Attempt, PhaseClock, goodput


@pytest.fixture
def let_pass(monkeypatch):
    """A fake clock: let_pass(seconds) advances it."""
    now = [1000.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(phases.time, "time", lambda: now[0])

    def passing(seconds):
        now[0] += seconds

    return passing


def step(clock, let_pass, number, *, wait, work, compiling=0.0):
    clock.enter("input", number)
    let_pass(wait)
    clock.enter("compile")
    let_pass(compiling)
    clock.enter("step")
    let_pass(work)


def test_every_second_belongs_to_one_phase(let_pass):
    clock = PhaseClock()
    let_pass(7)
    step(clock, let_pass, 0, wait=1, work=2, compiling=30)
    clock.enter("validate")
    let_pass(5)
    clock.enter("save")
    let_pass(4)
    clock.enter("finish")
    let_pass(1)
    seconds = {"start": 7, "input": 1, "compile": 30, "step": 2, "validate": 5}
    seconds |= {"save": 4, "finish": 1}
    assert clock.seconds() == seconds and clock.now() == ("finish", 0, 1)


def test_the_median_step_leaves_out_compiling_and_saving(let_pass):
    clock = PhaseClock()
    assert clock.medians() is None
    step(clock, let_pass, 0, wait=50, work=2, compiling=30)
    for number in range(1, 4):
        clock.enter("input", number)
        let_pass(0.5)
        clock.enter("step")
        let_pass(2)
        clock.enter("save")
        let_pass(100)
    clock.enter("input", 4)
    assert clock.medians() == (2.5, 0.5)


def test_goodput_counts_what_was_kept_and_shows_the_rest_as_time_between_starts(let_pass, tmp_path):
    assert goodput(tmp_path) == {}
    clock = PhaseClock()
    let_pass(10)
    attempt = Attempt(tmp_path, clock, first=0, chips=4)
    clock.enter("step", 0)
    let_pass(80)
    clock.enter("save")
    let_pass(10)
    attempt.write(100)
    clock.enter("step", 100)
    let_pass(300)  # Killed before the next checkpoint: nobody writes this down.

    clock = PhaseClock()
    second = Attempt(tmp_path, clock, first=100, chips=8)
    clock.enter("step", 100)
    let_pass(100)
    second.write(200)
    found = goodput(tmp_path)
    assert found["seconds"]["between"] == pytest.approx(300)
    assert found["seconds"]["step"] == pytest.approx(180)
    assert found["goodput"] == pytest.approx(180 / 500)
    assert found["starts"] == 2 and found["wall_seconds"] == pytest.approx(500)
    assert found["chip_hours"] == pytest.approx((4 * 100 + 8 * 100) / 3600)


def test_a_second_attempt_of_one_process_counts_no_second_twice(let_pass, tmp_path):
    clock = PhaseClock()
    first = Attempt(tmp_path, clock, first=0, chips=1)
    clock.enter("step", 0)
    let_pass(50)
    first.write(50)
    let_pass(20)  # Thrown away: it goes back to what was saved.
    second = Attempt(tmp_path, clock, first=50, chips=1)
    let_pass(30)
    second.write(80)
    found = goodput(tmp_path)
    assert found["seconds"]["step"] == 80 and found["seconds"]["between"] == 20


@pytest.mark.parametrize(
    ("firsts", "kept"),
    [((0, 100), 100 + 100), ((0, 200), 200 + 100), ((0, 0), 100), ((0, 100, 50), 50 + 0 + 100)],
)
def test_steps_that_a_later_start_did_again_are_lost(tmp_path, firsts, kept):
    """A kill while step `last` was committing, or a damaged checkpoint; every step takes 1 s."""
    (tmp_path / "attempts").mkdir()
    lengths = [200, *[100] * (len(firsts) - 1)]
    for number, (first, steps) in enumerate(zip(firsts, lengths, strict=True), start=1):
        record = {"began": 300.0 * number, "until": 300.0 * number + steps, "chips": 1}
        record |= {"first": first, "last": first + steps, "seconds": {"step": float(steps)}}
        write_json(tmp_path / f"attempts/{number}.json", record)
    found = goodput(tmp_path)
    assert found["seconds"]["step"] == pytest.approx(kept)
    assert found["seconds"]["lost"] == pytest.approx(sum(lengths) - kept)
    assert found["goodput"] == pytest.approx(kept / found["wall_seconds"])
    assert found["wall_seconds"] == pytest.approx(300 * (len(firsts) - 1) + 100)


def test_the_tenth_start_comes_after_the_ninth(tmp_path):
    (tmp_path / "attempts").mkdir()
    for number in range(1, 11):
        record = {"began": 10.0 * number, "until": 10.0 * number + 1, "chips": 1}
        write_json(tmp_path / f"attempts/{number}.json", record | {"seconds": {"step": 1.0}})
    assert goodput(tmp_path)["seconds"]["between"] == pytest.approx(9 * 9)


def test_a_record_is_as_old_as_its_process(tmp_path):
    before = time.time()
    Attempt(tmp_path, PhaseClock(), first=0, chips=1).write(1)
    assert goodput(tmp_path)["wall_seconds"] <= time.time() - before + 1


def test_a_record_that_cannot_be_written_is_dropped_with_one_warning(tmp_path, capsys):
    (tmp_path / "attempts").touch()  # No folder can be made, as on a full disk.
    attempt = Attempt(tmp_path, PhaseClock(), first=0, chips=4)
    attempt.write(1)
    attempt.write(2)
    assert capsys.readouterr().err.count("records of times") == 1
    assert not goodput(tmp_path)
