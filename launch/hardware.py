"""Accelerators of this machine, from launch/hardware.sh: jax would claim them if it were asked."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "hardware.sh"


def tpu_chips() -> int:
    return int(_ask("tpu_chips").stdout or 0)


def has_accelerator() -> bool:
    return _ask("has_tpu || has_nvidia").returncode == 0


def _ask(question: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", f"source {SCRIPT}; {question}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)
