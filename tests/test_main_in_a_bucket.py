"""A run in a bucket that nobody mounts equals the same run on a disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saber_jax.runs import buckets, files, objects
from tests.bucket import bucket
from tests.test_main import build_records, metrics_of

ROOT = Path(__file__).parent.parent
TRAIN = """
import sys
from pathlib import Path
from configs import sft
from saber_jax import main
from tests.test_main import config_for
main.train(config_for(sft, Path(sys.argv[1]), Path(sys.argv[2])))
"""


def run(environ, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_one_on_a_disk_and_is_evaluated_and_exported(
    tmp_path, tokenizer, monkeypatch
):
    records = build_records(tmp_path / "records", tokenizer, 8)
    run({}, "-c", TRAIN, records, tmp_path / "disk")
    with bucket("runs") as made:
        place = tmp_path / "buckets/runs"
        place.parent.mkdir()
        place.touch()  # As launch/buckets.sh leaves it.
        environ = made.environ | {buckets.MOUNTS: f"{place}=gs://runs"}
        for variable, value in environ.items():
            monkeypatch.setenv(variable, value)
        objects.upload_folder(place / "records", records)
        made.unavailable = 97
        root = place / "7b"
        for _ in range(2):  # The second time it finds everything done.
            run(environ, "-c", TRAIN, place / "records", root)
        copy = tmp_path / "copy/sft/metrics.jsonl"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(files.read_bytes(root / "sft/metrics.jsonl"))
        assert metrics_of(tmp_path / "copy", "sft") == metrics_of(tmp_path / "disk", "sft")
        checkpoint = ("--checkpoint", root / "sft")
        answers = ("--data", place / "records", "--split", "preference", "--out", root / "eval")
        sizes = ("--batch_size", "4", "--max_new_tokens", "4", "--brief")
        benchmark = ("saber_jax.evaluation.run", "--benchmark", "saber_test")
        run(environ, "-m", *benchmark, *checkpoint, *answers, *sizes)
        run(environ, "-m", "saber_jax.hf.export", *checkpoint, "--out", root / "hf")
        stages = ("--sft", root / "sft", "--sft_scores", root / "eval")
        report = ("saber_jax.evaluation.report", "--out", root / "report.html")
        run(environ, "-m", *report, *stages)
        for left in ("eval/scores.json", "hf/model.safetensors", "report.html"):
            assert files.exists(root / left), left
        assert made.refused and place.is_file()
