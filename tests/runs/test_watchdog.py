"""A run without progress is ended, with the stacks of all hosts and the name of the slowest."""

import textwrap
import threading

import pytest

from saber_jax.runs import watchdog
from saber_jax.runs.watchdog import STALLED, Watchdog
from tests.processes import running

PATIENCE = 120


@pytest.fixture
def left():
    """(what to call in place of os._exit, an event that it happened, the statuses)"""
    happened, statuses = threading.Event(), []

    def leave(status):
        statuses.append(status)
        happened.set()

    return leave, happened, statuses


def whole_step(clock, number):
    clock.enter("input", number)
    clock.enter("step")
    clock.enter("input", number + 1)


def test_a_stalled_step_leaves_with_stacks_of_every_thread(tmp_path, left, capfd):
    leave, happened, statuses = left
    waiting = threading.Event()
    stuck = threading.Thread(target=waiting.wait, args=(PATIENCE,))
    stuck.start()
    dog = Watchdog(tmp_path, least_seconds=0.05, every=0.02, leave=leave)
    with dog.watching():
        whole_step(dog.clock, 7)
        assert happened.wait(PATIENCE)
    waiting.set()
    stuck.join()
    assert statuses == [STALLED]
    said = capfd.readouterr().err
    assert "in phase 'input' of step 8" in said and "config.stall_seconds" in said
    stacks = (tmp_path / "stacks/host_0.txt").read_text()
    assert stacks.count("hread 0x") >= 3 and "test_watchdog.py" in stacks


@pytest.mark.parametrize("hanging", ["make_folder", "write_text"])
def test_a_disk_that_hangs_does_not_hold_the_watchdog(tmp_path, left, capfd, monkeypatch, hanging):
    leave, happened, statuses = left
    answers = threading.Event()
    monkeypatch.setattr(watchdog, "FILE_SECONDS", 0.05)
    monkeypatch.setattr(watchdog.files, hanging, lambda *args: answers.wait(PATIENCE))
    dog = Watchdog(tmp_path, least_seconds=0.05, every=0.02, leave=leave)
    try:
        with dog.watching():
            whole_step(dog.clock, 7)
            assert happened.wait(PATIENCE)
            assert not answers.is_set()
    finally:
        answers.set()
    said = capfd.readouterr().err
    assert statuses == [STALLED] and "test_watchdog.py" in said
    assert "its disk did not answer" in said and "in phase 'input' of step 8" in said


def test_a_host_that_cannot_even_print_leaves(tmp_path, left, monkeypatch):
    leave, happened, statuses = left
    answers = threading.Event()
    monkeypatch.setattr(watchdog, "LEAVE_SECONDS", 0.05)
    dog = Watchdog(tmp_path, least_seconds=0.05, every=0.02, leave=leave)
    monkeypatch.setattr(dog, "_print_stacks", lambda: answers.wait(PATIENCE) and "")
    try:
        with dog.watching():
            whole_step(dog.clock, 7)
            assert happened.wait(PATIENCE)
            assert not answers.is_set() and statuses == [STALLED]
    finally:
        answers.set()


def test_what_moves_on_or_may_take_long_is_left_alone(tmp_path, left, monkeypatch):
    leave, _, statuses = left
    dog = Watchdog(tmp_path, least_seconds=30, leave=leave)
    now = [0.0]
    monkeypatch.setattr("saber_jax.runs.phases.time.monotonic", lambda: now[0])
    for number in range(5):
        dog.clock.enter("input", number)
        dog.clock.enter("step")
        now[0] += 10.0
    dog.clock.enter("input", 5)
    now[0] += 20 * 10 - 1  # 20 medians are longer than 30 s.
    assert not dog._stall()
    dog.clock.enter("save")
    now[0] += watchdog.LONG_SECONDS - 1
    assert not dog._stall()
    now[0] += 2
    assert "in phase 'save' of step 5" in dog._stall()
    never = Watchdog(tmp_path, least_seconds=0, leave=leave)
    now[0] += 10**6
    assert not never._stall() and not statuses


HOST = """
import sys, time
from saber_jax.runs import distributed
from saber_jax.runs.watchdog import Watchdog

distributed.initialize()
import jax
host, folder = jax.process_index(), sys.argv[1]
dog = Watchdog(folder, least_seconds=1.0, every=0.1)
with dog.watching():
    seen, number = False, 0
    while not dog._store.read("seen"):
        dog.clock.enter("input", number)
        time.sleep(0.02 + 0.02 * host)
        dog.clock.enter("step")
        number += 1
        if dog.metrics().get("hosts/slowest_input") == 2.0 and not seen:
            seen = True
            print("host 2 waits longest", flush=True)
            dog._store.put("seen", 0, "yes")
    # Host 2 waits for its input for ever, and the others for host 2.
    dog.clock.enter("input", 10**6)
    if host != 2:
        dog.clock.enter("step")
    time.sleep(300)
"""


def test_all_hosts_leave_with_their_stacks_and_name_the_one_that_is_behind(tmp_path):
    command = ["-c", textwrap.dedent(HOST), str(tmp_path)]
    with running(command, tmp_path / "logs", count=3, devices=3) as hosts:
        statuses = hosts.wait(PATIENCE)
        said = [log.read_text() for log in hosts.logs]
    assert statuses == 3 * [STALLED], "\n".join(said)
    for text in said:
        assert "the slowest: host 2, in phase 'input' of step 1000000" in text
    assert "host 2 waits longest" in said[0]
    for host in range(3):
        assert "<string>" in (tmp_path / f"stacks/host_{host}.txt").read_text()
