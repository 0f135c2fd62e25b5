"""One run a work directory; a dead one's lock is no obstacle."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from saber_jax.runs import lock
from tests import full_disk


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    with (
        lock.held(tmp_path),
        pytest.raises(lock.BusyError, match=rf"in use by process {os.getpid()} on "),
        lock.held(tmp_path),
    ):
        pass


def test_it_is_released_at_the_end_and_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()
    with lock.held(tmp_path / "run"):
        (tmp_path / "run/result").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result"]


def test_a_full_disk_leaves_no_lock_behind(tmp_path):
    with (
        pytest.raises(OSError, match=rf"File too large.*{tmp_path}"),
        full_disk.files_of_at_most(0),
        lock.held(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_is_taken_over_at_once_and_named(tmp_path, capsys):
    holding = (
        "import os, sys; from saber_jax.runs import lock\n"
        "with lock.held(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", holding, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / "lock").exists()
    with lock.held(tmp_path):
        assert "taking over the lock of process" in capsys.readouterr().err


def elsewhere(tmp_path, **changes):
    """A lock that a run on another machine holds."""
    with lock.held(tmp_path):
        found = json.loads((tmp_path / "lock").read_text())
    found |= {"host": "far", "machine": "far"} | changes
    (tmp_path / "lock").write_text(json.dumps(found))
    return found


def test_a_silent_lock_of_another_machine_is_taken_over(tmp_path, capsys):
    elsewhere(tmp_path)
    with lock.held(tmp_path, stale=0.2):
        assert "on far, which is gone" in capsys.readouterr().err


def test_a_lock_of_another_machine_that_beats_is_respected(tmp_path):
    found, stop = elsewhere(tmp_path), threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.02):
            count += 1
            (tmp_path / "lock").write_text(json.dumps(found | {"beat": f"{count:08d}"}))

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(lock.BusyError, match="on far"), lock.held(tmp_path, stale=60):
            pass
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_a_kill_cut_short_is_taken_over(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with lock.held(tmp_path, stale=0.1):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("links", [True, False])
def test_a_fresh_lock_in_the_place_of_a_stale_one_is_put_back(tmp_path, monkeypatch, links):
    stale, fresh = elsewhere(tmp_path), {}
    watched = lock._wait_until_stale

    def others_were_faster(path, folder, seconds):
        found = watched(path, folder, seconds)
        fresh.update(stale | {"id": "another", "host": "near"})
        path.write_text(json.dumps(fresh))
        return found

    def refused(*args):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(lock, "_wait_until_stale", others_were_faster)
    if not links:
        monkeypatch.setattr(lock.os, "link", refused)
    with pytest.raises(lock.BusyError, match="on near"), lock.held(tmp_path, stale=0.1):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert json.loads((tmp_path / "lock").read_text()) == fresh


def test_a_lock_whose_holder_woke_up_is_put_back(tmp_path, monkeypatch):
    stale = elsewhere(tmp_path)
    watched = lock._wait_until_stale

    def wakes(path, folder, seconds):
        found = watched(path, folder, seconds)
        path.write_text(json.dumps(stale | {"beat": "00000009"}))
        return found

    monkeypatch.setattr(lock, "_wait_until_stale", wakes)
    with pytest.raises(lock.BusyError, match="on far"), lock.held(tmp_path, stale=0.1):
        pass
    assert json.loads((tmp_path / "lock").read_text())["beat"] == "00000009"


def test_a_repeated_request_that_finds_our_own_lock_holds_it(tmp_path, monkeypatch):
    create = lock.files.create

    def answer_lost(path, text):
        create(path, text)
        raise FileExistsError(path)

    monkeypatch.setattr(lock.files, "create", answer_lost)
    with lock.held(tmp_path / "run"):
        monkeypatch.undo()
        with pytest.raises(lock.BusyError), lock.held(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_the_holder_beats(tmp_path):
    with lock.held(tmp_path, beat=0.01):
        first = (tmp_path / "lock").read_text()
        until = time.monotonic() + 30
        while (tmp_path / "lock").read_text() == first:
            assert time.monotonic() < until
