"""The benchmark of faults in a short form: none is silent, unnamed, endless or loses work."""

import signal

import numpy as np
import pytest

from benchmarks import faults

# Orbax drops tasks whose exceptions nobody fetched.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def failures(tally):
    return {kind: tally[kind] for kind in faults.FAILURES if tally[kind]}


def test_bits_flipped_in_checkpoints(tmp_path, rng):
    tally = faults.checkpoint_flips(tmp_path, 10, rng)
    assert tally.total() == 10 and not failures(tally)


def test_mutated_inputs(tmp_path, rng):
    tally = faults.mutated_inputs(tmp_path, 90, rng)
    assert tally["named"] > 80 and not failures(tally)


def test_absurd_settings(rng):
    tally = faults.absurd_configs(rng, 1)
    assert tally["named"] > 300 and not failures(tally)


def test_a_killed_process_goes_on(tmp_path, rng):
    tally = faults.kills(tmp_path, 1, rng, signal.SIGKILL)
    assert tally["fine"] == 1 and not failures(tally)


def test_a_silent_change_would_be_counted(tmp_path):
    path = tmp_path / "file"
    assert faults.outcome(lambda: "other", "this", path) == "silent"
    assert faults.outcome(lambda: int("x"), "this", path) == "unnamed"
