"""Hosts that wait for the first one: until it is done, has failed, or is silent for too long."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch import turns


def waiting(tmp_path, done, patience=5.0):
    return turns.wait(done.exists, tmp_path / "beacon", patience=patience, every=0.01)


def test_waiting_ends_with_the_result(tmp_path):
    done = tmp_path / "done"
    threading.Timer(0.1, done.touch).start()
    assert waiting(tmp_path, done)


def test_a_failure_ends_the_wait_but_not_one_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "BEAT_SECONDS", 0.05)
    with pytest.raises(RuntimeError), turns.beacon(tmp_path / "beacon"):
        raise RuntimeError
    done = tmp_path / "done"

    def second_run():
        with turns.beacon(tmp_path / "beacon"):
            time.sleep(0.3)
            done.touch()

    threading.Timer(0.1, second_run).start()
    assert waiting(tmp_path, done)
    done.unlink()

    def third_run():
        with pytest.raises(SystemExit), turns.beacon(tmp_path / "beacon"):
            time.sleep(0.2)
            raise SystemExit(3)

    threading.Timer(0.1, third_run).start()
    began = time.monotonic()
    assert not waiting(tmp_path, done, patience=20)
    assert time.monotonic() - began < 10


def test_silence_ends_the_wait_and_signs_of_life_prolong_it(tmp_path, monkeypatch):
    assert not waiting(tmp_path, tmp_path / "done", patience=0.2)
    monkeypatch.setattr(turns, "BEAT_SECONDS", 0.05)
    with turns.beacon(tmp_path / "beacon"):
        threading.Timer(1.0, (tmp_path / "done").touch).start()
        assert waiting(tmp_path, tmp_path / "done", patience=0.5)


def test_a_host_that_works_alone_has_its_own_chips_and_joins_nobody():
    pod = {
        "MEGASCALE_NUM_SLICES": "2",
        "TPU_WORKER_ID": "3",
        "TPU_WORKER_HOSTNAMES": "a,b",
        "X": "y",
    }
    alone = turns.alone(pod, chips=4)
    assert "MEGASCALE_NUM_SLICES" not in alone
    assert alone["TPU_WORKER_HOSTNAMES"] == "localhost" and alone["X"] == "y"
    assert alone["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "2,2,1"
    joined = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert turns.alone(joined, chips=0) == {}


def meeting(folders, patience):
    """What each host misses; host i looks into the i-th folder."""
    with ThreadPoolExecutor(len(folders)) as hosts:
        return list(
            hosts.map(
                lambda i: turns.meet(folders[i], i, len(folders), patience=patience, every=0.01),
                range(len(folders)),
            )
        )


def test_hosts_on_one_disk_meet_whatever_an_earlier_start_left(tmp_path):
    assert meeting([tmp_path] * 3, 10) == [[], [], []]
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert meeting([tmp_path] * 3, 10) == [[], [], []]
    assert all((tmp_path / name).read_text() != text for name, text in left.items())


def test_a_host_that_is_late_or_on_another_disk_is_missed_by_number(tmp_path):
    meeting([tmp_path / "shared"] * 3, 10)  # Stale words must not count.
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    assert meeting(folders, 0.3) == [[2], [0], [0]]
    assert turns.meet(tmp_path / "shared", 1, 2, patience=0.1, every=0.01) == [0]
