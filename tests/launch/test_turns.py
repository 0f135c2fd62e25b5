"""Hosts that wait for the first one: until it is done, has failed, or is silent for too long."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import turns

ROOT = Path(__file__).parent.parent.parent


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
    assert "TPU_SKIP_MDS_QUERY" not in alone
    named = turns.alone(pod | {"TPU_ACCELERATOR_TYPE": "v5litepod-256"}, chips=4)
    assert named["TPU_SKIP_MDS_QUERY"] == "1"
    joined = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert turns.alone(joined, chips=0) == {}


def meeting(folders, patience):
    """The hosts that each host does not see; host i reads the i-th folder."""
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


# Every host is a process with its own random faults and its own idea of the time. In each round all
# of them meet, one works, and the others wait for what it leaves.
BAD_DISK = """
import errno
import os, os, random, sys, time
from pathlib import Path
from launch import turns

folder, count, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
turns.BEAT_SECONDS = 0.2
read_text, replace, clock = Path.read_text, os.replace, time.time

def bad_read(path, *args, **options):
    drawn = random.random()
    if drawn < 0.1:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))
    if drawn < 0.13:
        time.sleep(0.1)
    text = read_text(path, *args, **options)
    return text[: len(text) // 2] if drawn > 0.95 else text

def bad_replace(source, target):
    if random.random() < 0.1:
        raise OSError(errno.EIO, "Input/output error", str(target))
    if random.random() < 0.05:
        time.sleep(0.2)
    replace(source, target)

def host(index):
    random.seed(index)
    Path.read_text, os.replace = bad_read, bad_replace
    skew = random.uniform(-3600, 3600)
    time.time = lambda: clock() + skew
    for number in range(rounds):
        missing = turns.meet(folder, index, count, patience=120, every=0.02)
        assert not missing, f"round {number}: host {index} misses {missing}"
        result, sign = folder / f"result_{number}", folder / f"host_{number % count}"
        if index == number % count:
            with turns.beacon(sign):
                result.write_text("done")
        else:
            assert turns.wait(result.exists, sign, patience=60, every=0.02)

hosts = []
for index in range(count):
    if not (child := os.fork()):
        host(index)
        os._exit(0)
    hosts.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in hosts))
"""


@pytest.mark.parametrize(
    ("hosts", "rounds"), [(8, 4), pytest.param(64, 100, marks=pytest.mark.slow)]
)
def test_no_host_is_lost_on_a_disk_that_fails_tears_and_stalls(tmp_path, hosts, rounds):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BAD_DISK), str(tmp_path), str(hosts), str(rounds)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def failing(times):
    """Path.read_text that answers ESTALE `times` times, then as it did."""
    left, read = [times], Path.read_text

    def read_text(path, *args, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, *args, **options)

    return read_text


def test_a_disk_that_cannot_be_read_is_not_taken_for_a_silent_host(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", failing(50))
    threading.Timer(0.6, (tmp_path / "done").touch).start()
    assert waiting(tmp_path, tmp_path / "done", patience=0.3)

    monkeypatch.setattr(Path, "read_text", failing(10**9))
    with pytest.raises(OSError, match=r"could not be read for .* Look at the disk"):
        turns.wait((tmp_path / "never").exists, tmp_path / "beacon", every=0.01, disk_patience=0.2)


def test_a_beacon_goes_on_after_a_write_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "BEAT_SECONDS", 0.02)
    replace, failures = os.replace, iter([True] * 5)

    def replacing(source, target):
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    with turns.beacon(tmp_path / "beacon"):
        assert turns.wait((tmp_path / "beacon").exists, tmp_path / "beacon", every=0.01)
    assert (tmp_path / "beacon").read_text().startswith("done")
