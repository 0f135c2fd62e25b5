"""The paper's claim, on seeds that the recipe was not chosen on: `launch/test.sh -m science`.

It trains two seeds of three arms anew, because results of before say nothing about a change of the
code. That takes about an hour on two cores. SABER_ABLATION=DIR goes on in DIR instead, to finish
one that was interrupted or to judge what an ablation left there.
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
    kept = os.environ.get("SABER_ABLATION", str(tmp_path / "ablation"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.ablation", "--root", kept, "--seeds", "2"),
            *("--arms", "sed", "more_sft", "anchored", "--jobs", "2"),
            # What a complete ablation wrote down stays.
            *("--out", str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},  # The suite's own flags are not for training.
        stdout=subprocess.PIPE,
        text=True,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    assert last.startswith("{"), f"the ablation ended with status {done.returncode}, see above"
    line = json.loads(last)
    assert line["value"] > 0, f"CA-DPO lost its effect: {line}"
