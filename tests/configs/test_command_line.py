"""What is mistyped is answered with one line and the nearest right spelling."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
from absl import app
from configs.command_line import CONFIG, parse_flags
app.run(lambda _: print(CONFIG.value.optimizer.peak_lr), flags_parser=parse_flags)
"""


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_setting_changes_the_config():
    answer = typed("--config=configs/sft.py:tiny", "--config.optimizer.peak_lr=0.5")
    assert (answer.stdout, answer.returncode) == ("0.5\n", 0)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--config=configs/stf.py:tiny",), "did you mean 'configs/sft.py'?"),
        (("--config=configs/sft.py:tinny",), "choose from ('tiny', "),
        (("--config=configs/sft.py:tiny", "--config.stpes=4"), "did you mean 'steps'?"),
        (
            ("--config=configs/sft.py:tiny", "--config.optimiser.peak_lr=1"),
            "no setting 'optimiser'; did you mean 'optimizer'?",
        ),
        (
            ("--config=configs/sft.py:tiny", "--config.optimizer.peek_lr=1"),
            "no setting 'peek_lr'; did you mean 'peak_lr'?",
        ),
        (("--config=configs/sft.py:tiny", "--config.steps=many"), "--config.steps=many"),
        ((), "--config"),
    ],
)
def test_a_mistake_gets_one_line(arguments, hint):
    answer = typed(*arguments)
    assert answer.returncode != 0
    assert hint in answer.stderr and "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
