"""What is mistyped is answered with one line and the nearest right spelling."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import command_line

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
        ((), "Give a config: --config=configs/NAME.py:VARIANT"),
    ],
)
def test_a_mistake_gets_one_line(arguments, hint):
    answer = typed(*arguments)
    assert answer.returncode != 0
    assert hint in answer.stderr and "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def help_of(*arguments: str) -> str:
    command = [sys.executable, "-m", "saber_jax.main", *arguments, "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


def test_help_lists_every_setting_with_its_value_and_what_the_config_says_about_it():
    lines = help_of("--config=configs/cadpo.py:7b").splitlines()
    for name in ("loss.beta=0.1", "data.length=3072", "lora.dropout=0.05", "root=runs/7b"):
        assert f"  --config.{name}" in lines
    explained = lines.index("  --config.loss.margin=0.0") - 1
    assert lines[explained] == "  # m: how far beta * Delta has to be above 0."
    assert "  --config.steps=1600" in help_of().splitlines()


def test_main_answers_a_typing_error_before_it_imports_jax():
    program = """
import runpy, sys
sys.argv[1:] = ["--config=configs/sft.py:tiny", "--config.stpes=4"]
try:
    runpy.run_module("saber_jax.main", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(end)
print("jax" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "did you mean 'steps'?" in answer.stdout and answer.stdout.endswith("False\n")


def test_main_takes_settings_though_they_were_looked_at_before(tmp_path):
    command = [sys.executable, "-m", "saber_jax.main", "--config=configs/sft.py:tiny"]
    command += [f"--config.data.path={tmp_path}/none", f"--config.workdir={tmp_path}/sft"]
    command += ["--verbosity=0"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0 and f"{tmp_path}/none" in answer.stderr
    assert "Traceback" not in answer.stderr and "twice" not in answer.stderr


def test_sigterm_while_a_command_still_imports_asks_to_try_again():
    program = (
        "import signal, sys; from configs import command_line;"
        "sys.argv = ['main', '--config=configs/sft.py:tiny']; command_line.answer_early();"
        "signal.raise_signal(signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 75


def test_a_bucket_in_a_setting_is_refused_and_in_other_flags_not():
    with pytest.raises(ValueError, match="set SABER_MOUNTS=FOLDER=gs://BUCKET"):
        command_line._check_buckets(["main", "--config.root=gs://runs/7b"])
    command_line._check_buckets(["main", "--save=gs://runs/7b/executables"])
