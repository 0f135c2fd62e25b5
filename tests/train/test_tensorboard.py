"""TensorBoard and the console on disks that are full: lines are lost, the run is not."""

import os
import subprocess
import sys
import threading

from saber_jax.train import tensorboard
from saber_jax.train.metrics import MetricsWriter

FULL = OSError(28, "No space left on device")


class Refusing:
    """A writer of event files on a full disk."""

    def write_event(self, event):
        raise FULL


def test_a_full_disk_costs_events_and_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard.TensorBoardWriter, "_opened", lambda self: Refusing())
    events = tensorboard.TensorBoardWriter(tmp_path, 0)
    for step in range(100):
        events.scalar(step, "loss", 1.0)
    events.close()
    said = capsys.readouterr().err.splitlines()
    assert "are dropped, for [Errno 28] No space left on device; the run goes on" in said[0]
    assert "102 were dropped" in said[1] and len(said) == 2


def test_it_goes_on_in_a_new_file_when_there_is_room_again(tmp_path, monkeypatch):
    opened, first = tensorboard.TensorBoardWriter._opened, [Refusing()]
    monkeypatch.setattr(
        tensorboard.TensorBoardWriter,
        "_opened",
        lambda self: first.pop() if first else opened(self),
    )
    events = tensorboard.TensorBoardWriter(tmp_path, 0)
    for step in range(5):
        events.scalar(step, "loss", 1.0)
    events.close()
    [file] = tmp_path.glob("events*")
    assert file.stat().st_size > 100


def test_a_disk_that_hangs_never_blocks_the_run(tmp_path, monkeypatch, capsys):
    stuck = threading.Event()
    monkeypatch.setattr(
        tensorboard.TensorBoardWriter, "_opened", lambda self: stuck.wait() and Refusing()
    )
    monkeypatch.setattr(tensorboard, "WAITING", 10)
    monkeypatch.setattr(tensorboard, "CLOSE_SECONDS", 0.1)
    events = tensorboard.TensorBoardWriter(tmp_path, 0)
    for step in range(100):
        events.scalar(step, "loss", 1.0)
    events.close()
    stuck.set()
    assert "the disk is too slow" in capsys.readouterr().err


def test_metrics_lines_are_whole_or_absent(tmp_path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path, start=0)
    writer.write(0, {"loss": 1.0})
    append = writer._file.write

    class Filling:
        """A file that accepts half of a line, and then nothing."""

        def __init__(self):
            self.left = 10

        def write(self, data):
            if not self.left:
                raise FULL
            self.left = 0
            return append(data[:10])

        def __getattr__(self, name):
            return getattr(file, name)

    file, writer._file = writer._file, Filling()
    writer.write(1, {"loss": 2.0})
    writer._file = file
    writer.write(2, {"loss": 3.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 1.0}', '{"step": 2, "loss": 3.0}']
    assert "1 were dropped" in capsys.readouterr().err


def test_a_console_on_a_full_disk_does_not_change_the_exit_status():
    talking = "from saber_jax.runs.console import log, warn\nfor i in range(3): log('x'); warn('y')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", talking],
            stdout=full,
            stderr=full,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False,
        )
    assert result.returncode == 0
