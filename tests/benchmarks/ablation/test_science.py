"""The paper's claim, on seeds that the recipe was not chosen on: `launch/test.sh -m science`.

It takes what a complete ablation left in runs/ablation (SABER_ABLATION moves it), and otherwise
runs two seeds of three arms, which takes about an hour on two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.science
def test_ca_dpo_gains_over_sed_where_modalities_conflict(tmp_path):
    kept = os.environ.get("SABER_ABLATION", str(ROOT / "runs/ablation"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.ablation", "--root", kept, "--seeds", "2"),
            *("--arms", "sed", "more_sft", "anchored"),
            # What a complete ablation wrote down stays.
            *("--out", str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # The suite's own flags are not for training.
        stdout=subprocess.PIPE,
        text=True,
    )
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["value"] > 0, f"CA-DPO lost its effect: {line}"
