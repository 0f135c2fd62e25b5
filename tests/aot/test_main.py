"""What the command refuses before it compiles."""

import subprocess
import sys


def test_figures_do_not_go_to_a_folder(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "saber_jax.aot"),
            *("--config=configs/cadpo.py:7b-v5e-256", f"--json={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"saber_jax.aot: --json={tmp_path} is a folder" in done.stderr
