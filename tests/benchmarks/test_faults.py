"""The benchmark of faults in a short form: none is silent, unnamed, endless or loses work."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from benchmarks.faults import __main__ as command
from benchmarks.faults import cost, flips, inputs, machines, outcomes, training
from saber_jax.models.config import saber_config

# Orbax drops tasks whose exceptions nobody fetched.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return training.write_records(tmp_path_factory.mktemp("records"))


def failures(counts):
    return {kind: counts[kind] for kind in outcomes.FAILURES if counts[kind]}


def test_bits_flipped_in_checkpoints_of_the_tiny_network(records, tmp_path, rng):
    counts = flips.checkpoints(records, tmp_path, 3, rng)
    assert counts.total() == 3 and not failures(counts)


@pytest.mark.parametrize("kind", [flips.stored_records, flips.outlines])
def test_bits_flipped_in_records(kind, records, tmp_path, rng):
    counts = kind(records, tmp_path, 8, rng)
    assert counts.total() == 8 and not failures(counts)


def test_bits_flipped_in_pairs_and_a_vocabulary_are_always_named(records, tmp_path, rng):
    assert flips.pairs(tmp_path / "pairs", 40, rng) == {"named": 40}
    assert flips.tokenizer(records, tmp_path / "words", 8, rng) == {"named": 8}


@pytest.mark.parametrize("kind", [flips.adapters, flips.reference, flips.model_file])
def test_bits_flipped_in_what_a_run_and_its_export_leave(kind, tmp_path, rng):
    counts = kind(tmp_path, 8, rng)
    assert counts["named"] > 4 and not failures(counts)


def test_the_cost_of_digests_is_measured_on_a_state_that_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "REPEATS", 1)
    found = cost.overhead(tmp_path, saber_config("tiny"))
    assert found["save with"] > 0 and found["restore with"] > 0
    assert found["save added"] == pytest.approx(found["save with"] / found["save without"] - 1)
    assert not list(tmp_path.iterdir())


def test_mutated_inputs(records, tmp_path):
    counts = inputs.mutated(records, tmp_path, 50, 0)
    assert counts["named"] > 30 and not failures(counts)


def test_absurd_settings():
    counts = inputs.absurd_settings()
    assert counts["named"] > 300 and not failures(counts)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_numbers_of_an_undisturbed_one(records, tmp_path, rng):
    training.serve(tmp_path / "compiled")
    wanted = training.undisturbed(records, tmp_path / "undisturbed")
    counts = machines.kills(records, tmp_path / "kills", 1, rng, signal.SIGKILL, wanted)
    assert counts["fine"] == 1 and not failures(counts)


LEADER = """
import functools, multiprocessing, subprocess, sys
from benchmarks.faults import groups

work = functools.partial(subprocess.run, ["sh", "-c", "echo started; sleep 60"])
leader = multiprocessing.get_context("forkserver").Process(target=groups.lead, args=[work])
leader.start()
sys.stdin.read(1)
groups.end(leader)
"""


@pytest.mark.parametrize("what", ["leader", "parent"])
def test_all_that_a_run_started_ends_with_it_and_with_the_benchmark(what):
    parent = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        if what == "parent":
            parent.kill()
        # The pipe ends when the last process that may write to it is gone.
        end, _ = parent.communicate(b"x", timeout=30)
    assert end == b""
    assert parent.returncode == (-signal.SIGKILL if what == "parent" else 0)


def test_a_silent_change_would_be_counted(tmp_path):
    path = tmp_path / "file"
    assert outcomes.outcome(lambda: "other", "this", path) == "silent"
    assert outcomes.outcome(lambda: int("x"), "this", path) == "unnamed"


def test_a_quick_benchmark_makes_every_kind_once_and_waits_for_none_of_them_alone():
    met = threading.Barrier(2, timeout=60)

    def together():
        met.wait()
        return outcomes.Outcomes(named=1)

    kinds = {"bits": together, "SIGTERM": together}
    kinds["SIGKILL"] = lambda: outcomes.Outcomes(fine=1)
    rows = command.all_kinds(kinds, quick=True)
    assert list(rows) == list(kinds)
    assert [counts.total() for counts in rows.values()] == [1, 1, 1]


def test_a_benchmark_that_is_stopped_says_what_it_has_seen(tmp_path, rng, capsys):
    met = threading.Barrier(2, timeout=60)

    def work(folder, count, rng):
        yield "fine"
        met.wait()
        raise RuntimeError("The benchmark was told to stop.")

    with pytest.raises(RuntimeError, match="told to stop"):
        machines.side_by_side(work, tmp_path / "SIGKILL", 6, rng)
    assert "SIGKILL, stopped after {'fine': 2}" in capsys.readouterr().out
