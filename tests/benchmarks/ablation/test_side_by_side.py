"""Seeds at a time: cores of their own, output by name, failures and stops."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablation import side_by_side
from benchmarks.ablation.side_by_side import Job, Runner
from launch.chain import PREEMPTED

ROOT = Path(__file__).parents[3]


def job(folder: Path, name: str, script: str) -> Job:
    return Job(name=name, command=("python", "-c", script), log=folder / name / "log.txt")


def test_every_job_runs_and_its_output_is_in_its_log_and_its_steps_on_the_console(tmp_path, capfd):
    script = "import sys; print('[1/2] corpus: done'); print('more', sys.argv[1:])"
    Runner(2).run([job(tmp_path, f"seed {n}", script) for n in (1, 2, 3)])
    shown = capfd.readouterr().out
    for name in ("seed 1", "seed 2", "seed 3"):
        assert f"{name}: [1/2] corpus: done\n" in shown
        log = (tmp_path / name / "log.txt").read_text()
        assert "more ['--cores'" in log
    assert "more" not in shown


def test_a_job_that_fails_is_named_and_the_others_end(tmp_path, capfd):
    failing = job(tmp_path, "seed 1", "print('error: no disk'); raise SystemExit(3)")
    with pytest.raises(SystemExit, match="1"):
        Runner(1).run([failing, job(tmp_path, "seed 2", "print('[1/1] all well')")])
    said = capfd.readouterr()
    assert "seed 1: error: no disk" in said.out and "seed 2: [1/1] all well" in said.out
    assert f"seed 1 failed with status 3, see {failing.log}" in said.err


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_job_and_is_waited_for(tmp_path, kind):
    """Jobs say that they wait, and say farewell when they are told to stop."""
    script = """
import signal, sys
def stop(*_):
    print("[1/1] farewell", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("[1/1] waiting", flush=True)
signal.pause()
"""
    main = f"""
from pathlib import Path
from benchmarks.ablation.side_by_side import Job, Runner
jobs = [
    Job(name=n, command=("python", "-c", {script!r}), log=Path({str(tmp_path)!r}, n)) for n in "abc"
]
Runner(2).run(jobs)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", main], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    for _ in range(2):
        next(line for line in lines if "waiting" in line)
    process.send_signal(kind)
    assert sorted(line[0] for line in lines if "farewell" in line) == ["a", "b"]
    assert process.wait() == PREEMPTED


def test_cores_are_shared_out_without_overlap(monkeypatch):
    monkeypatch.setattr(side_by_side, "_cores", lambda: {0, 1, 4, 5, 6})
    assert side_by_side.shares(2) == [("0", "4", "6"), ("1", "5")]
    monkeypatch.setattr(side_by_side, "_cores", lambda: {3})
    assert side_by_side.shares(2) == [("3",), ("3",)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are given out on Linux")
def test_a_seed_keeps_to_its_cores(monkeypatch):
    from benchmarks.ablation import seed

    kept = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: kept.append((pid, cores)))
    monkeypatch.setattr(seed.chain, "run", lambda steps, root: None)
    typed = seed.command(Path("runs/a/seed_1"), 1, ["sed"], quick=True, transfer=None)
    monkeypatch.setattr(sys, "argv", [*typed[2:], "--cores", "1", "3"])
    seed.main()
    assert kept == [(0, [1, 3])]
