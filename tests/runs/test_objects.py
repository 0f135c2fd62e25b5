"""Files of a run in a bucket that is not mounted: the same as on a disk, through a bad network."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from saber_jax.runs import buckets, files, lock, manifest
from saber_jax.runs.journal import Journal
from tests.bucket import bucket

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def emulator():
    with bucket("runs") as made:
        yield made


@pytest.fixture
def folder(emulator, tmp_path, monkeypatch):
    """The folder of a bucket that is not mounted: an empty file is in its place."""
    for variable, value in emulator.environ.items():
        monkeypatch.setenv(variable, value)
    place = tmp_path / "buckets/runs"
    place.parent.mkdir()
    place.touch()
    monkeypatch.setenv(buckets.MOUNTS, f"{place}=gs://runs")
    yield place / tmp_path.name
    assert place.is_file()


def use(folder):
    """What a run does with files; what it finds."""
    found = []
    files.make_folder(folder / "a")
    files.write_text(folder / "a/text", "old")
    files.write_text(folder / "a/text", "长")
    files.write_json(folder / "a/1.json", {"n": [1, None]})
    files.write_jsonl(folder / "lines.jsonl", [{"i": 0}, {"i": 1}])
    files.append(folder / "lines.jsonl", b'{"i": 2}\n{"i"')
    found.append(files.read_bytes(folder / "lines.jsonl"))
    files.truncate(folder / "lines.jsonl", 27)
    found += [files.read_text(folder / "a/text"), files.read_json(folder / "a/1.json")]
    found += [list(files.numbered_jsonl(folder / "lines.jsonl"))]
    for error, wrong in (
        (FileNotFoundError, lambda: files.read_text(folder / "a/none")),
        (FileNotFoundError, lambda: files.remove(folder / "none")),
        (FileExistsError, lambda: files.create(folder / "new", "other")),
    ):
        files.remove(folder / "new", missing_ok=True)
        files.create(folder / "new", "one")
        with pytest.raises(error):
            wrong()
    with files.replacing(folder / "a/b.npz") as partial:
        partial.write_bytes(bytes(range(100)))
    with pytest.raises(ZeroDivisionError), files.replacing(folder / "a/b.npz") as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    found.append(files.read_edges(folder / "a/b.npz", 100, 30))
    found.append(files.read_edges(folder / "a/b.npz", 100, 70) == bytes(range(100)))
    for name in ("first", "second"):
        with files.replacing_folder(folder / "out") as partial:
            (partial / "in").mkdir()
            (partial / "in" / name).write_text(name)
    files.move(folder / "out", folder / "a/moved")
    files.move(folder / "new", folder / "a/renamed")
    found += [files.exists(folder / name) for name in ("a", "a/moved", "out", "a/1", "none")]
    found.append([p.relative_to(folder).as_posix() for p in files.listed(folder / "a")])
    found.append([p.name for p in files.listed(folder / "a", "*.json")])
    found.append(files.listed(folder / "none"))
    for pattern in ("**/*", "a/*", "*/*/in/*", "lines.jsonl"):
        sized = files.sizes(folder, pattern).items()
        found.append([(p.relative_to(folder).as_posix(), size) for p, size in sized])
    found.append(manifest.fingerprint(folder, "*.jsonl", "a/**/*"))
    files.remove_folder(folder / "a")
    found.append([p.name for p in files.listed(folder)])
    return found


def test_files_of_a_bucket_are_like_those_of_a_disk(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    assert use(folder) == use(disk)


def test_a_journal_in_a_busy_bucket_goes_on_at_a_batch_boundary(folder, emulator, monkeypatch):
    monkeypatch.setattr(emulator, "unavailable", 17)
    refused = emulator.refused
    journal = Journal(folder, "lines.jsonl", {"model": "a"})
    journal.append([{"i": 0}, {"i": 1}])
    journal.append([{"i": 2}])
    again = Journal(folder, "lines.jsonl", {"model": "a"})
    assert again.resume([2, 4]) == [{"i": 0}, {"i": 1}]
    again.append([{"i": 9}])
    assert again.resume([3]) == [{"i": 0}, {"i": 1}, {"i": 9}]
    with pytest.raises(ValueError, match="model: a there, b here"):
        Journal(folder, "lines.jsonl", {"model": "b"})
    assert emulator.refused > refused


def test_a_second_run_in_a_bucket_is_refused_and_a_dead_one_s_place_is_taken(folder, capsys):
    with (
        lock.held(folder),
        pytest.raises(lock.BusyError, match=rf"in use by process {os.getpid()} on "),
        lock.held(folder),
    ):
        pass
    assert not files.exists(folder / "lock")
    with lock.held(folder):
        left = files.read_text(folder / "lock")
    gone = json.loads(left) | {"machine": "another", "pid": 1}
    files.write_text(folder / "lock", json.dumps(gone))
    with lock.held(folder, stale=0.1):
        assert "taking over the lock of process 1 on" in capsys.readouterr().err


def test_a_bucket_that_cannot_be_asked_is_not_an_empty_one(folder, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("gcsfs.GCSFileSystem._call", refuse)
    for ask in (files.exists, files.listed, files.read_bytes, lambda p: files.sizes(p, "*")):
        with pytest.raises(OSError, match="RuntimeError: no route to host"):
            ask(folder / "a")


MEET = """
import sys
from pathlib import Path
from launch import turns
from saber_jax.runs import files

turns.BEAT_SECONDS = 0.2
folder, index, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(int(sys.argv[4])):
    missing = turns.meet(folder, index, count, patience=300, every=0.1)
    assert not missing, f"round {number}: host {index} misses {missing}"
    result, sign = folder / f"result_{number}", folder / f"host_{number % count}"
    if index == number % count:
        with turns.beacon(sign):
            files.write_text(result, "done")
    else:
        assert turns.wait(lambda: files.exists(result), sign, patience=120, every=0.1)
"""


@pytest.mark.slow
def test_hosts_meet_in_a_bucket_that_nobody_mounts(folder, emulator, monkeypatch):
    monkeypatch.setattr(emulator, "unavailable", 23)
    monkeypatch.setattr(emulator, "latency", 0.01)
    hosts = 4
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(MEET), *map(str, (folder, i, hosts, 5))],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(hosts)
    ]
    said = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0] * hosts, said
    assert emulator.refused > 3
