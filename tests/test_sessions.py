"""A machine that is taken back signals every process of a run at once, whatever it is doing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from saber_jax.runs.distributed import PREEMPTED
from tests.processes import FLAGS, ROOT, running
from tests.test_processes import command, records

__all__ = ["records"]  # A fixture.
pytestmark = pytest.mark.slow
PATIENCE = 400


def start(records, root) -> subprocess.Popen:
    """A run with loader processes, as the leader of a session of its own."""
    settings = {"data__workers": 2, "checkpoint_every": 2}
    environ = {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": FLAGS.format(2),
    }
    root.mkdir(exist_ok=True)
    with (root / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *command("sft", records, root, (1, 2, 1), **settings)],
            cwd=ROOT,
            env=os.environ | environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def described(root: Path) -> bool:
    """Whether the run is about to compile its first step."""
    return (root / "log").exists() and "sft:" in (root / "log").read_text()


def stepped(root: Path) -> bool:
    log = root / "sft/metrics.jsonl"
    return log.exists() and log.read_text().count("\n") >= 3


def saving(root: Path) -> bool:
    """Whether Orbax has begun to write a step and has not finished."""
    return any((root / "sft/checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("when", [described, stepped, saving])
def test_a_sigterm_to_every_process_ends_the_run_saved_and_the_next_start_ends_it(
    records, tmp_path, when: Callable[[Path], bool]
):
    root = tmp_path / "run"
    run = start(records, root)
    try:
        deadline = time.monotonic() + PATIENCE
        while not when(root):
            assert run.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGTERM)
        status = run.wait(PATIENCE)
        said = (root / "log").read_text()
        assert status == PREEMPTED, said
        assert "stopped" in said and "Traceback" not in said
        with pytest.raises(ProcessLookupError):  # Its loader processes went with it.
            while time.monotonic() < deadline:
                os.killpg(run.pid, 0)
                time.sleep(0.1)
        again = start(records, root)
        assert again.wait(PATIENCE) == 0, (root / "log").read_text()
        assert (root / "sft/summary.json").exists()
        said = (root / "log").read_text()
        assert "damaged" not in said
    finally:
        for process in (run,):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_sigterm_to_every_process_of_every_host_saves_one_step_and_all_end_with_75(
    records, tmp_path
):
    root = tmp_path / "run"
    settings = {"data__workers": 2, "checkpoint_every": 100}
    again = command("sft", records, root, (1, 2, 1), **settings)
    with running(again, root / "logs", count=2, devices=2, sessions=True) as hosts:
        hosts.wait_until(lambda: stepped(root), PATIENCE)
        for host in hosts.members:
            os.killpg(host.pid, signal.SIGTERM)
        assert hosts.wait(PATIENCE) == [PREEMPTED] * 2, hosts.text()
        assert "Traceback" not in hosts.text()
    (saved,) = (root / "sft/checkpoints").iterdir()
    with running(again, root / "logs", count=2, devices=2, sessions=True) as hosts:
        assert hosts.wait(PATIENCE) == [0, 0], hosts.text()
    steps = [json.loads(line)["step"] for line in (root / "sft/metrics.jsonl").open()]
    assert steps == list(range(8)) and int(saved.name) >= 3
