"""What a step did cost is known also if it was killed."""

import subprocess
import sys
import time

import pytest

from launch import hours

KILLED = """
import os, sys
from pathlib import Path
from launch import hours

with hours.counted(Path(sys.argv[1]), "sft", 4):
    os.kill(os.getpid(), 9)
"""


def noted(root):
    return [(e["step"], e["chips"], e["done"]) for e in hours.entries(root)]


def test_a_killed_attempt_is_listed_beside_the_next_one(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False).returncode == -9
    assert noted(tmp_path) == [("sft", 4, False)]
    with hours.counted(tmp_path, "sft", 4):
        assert noted(tmp_path) == [("sft", 4, False), ("sft", 4, False)]
    assert noted(tmp_path) == [("sft", 4, False), ("sft", 4, True)]


def test_the_entry_of_a_running_step_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(hours, "UPDATE_SECONDS", 0.02)
    with hours.counted(tmp_path, "sft", 4):
        until = time.monotonic() + 60
        while hours.entries(tmp_path)[0]["seconds"] == 0:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert noted(tmp_path) == [("sft", 4, False)]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_record_that_cannot_be_kept_does_not_end_the_step(tmp_path, content):
    place = tmp_path / "hours.json"
    place.mkdir() if content is None else place.write_text(content)
    done = []
    with hours.counted(tmp_path, "sft", 4):
        done.append("sft")
    assert done
