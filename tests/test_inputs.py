"""What a run says about its data."""

import shutil
from collections import Counter

import pytest

from configs import sft
from data_prep.records import dataset
from saber_jax.inputs import open_inputs
from tests import synthetic


@pytest.fixture
def config(tmp_path, tokenizer):
    """Stage 1 on nine records of one folder for every three of another, which has four."""
    sizes = {"many": range(20), "few": range(100, 104)}
    for name, seeds in sizes.items():
        (tmp_path / name).mkdir()
        dataset.write(tmp_path / name, {"train": seeds}, synthetic.record)
        shutil.copy(tokenizer.path, tmp_path / name)
    config = sft.get_config("tiny")
    config.data.mixture = (f"{tmp_path}/many:train:9", f"{tmp_path}/few:train:3")
    return config


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_summary_counts_the_examples_that_each_source_gave(config, tmp_path, steps):
    inputs, rows = open_inputs(config, tmp_path, None), config.data.batch_rows
    given = [i % 24 for row in inputs.plan.rows(steps * rows) for i in row]
    count = Counter("many" if i < 20 else "few" for i in given)
    want = {f"{tmp_path}/{name}:train": count[name] for name in ("many", "few")}
    summary = inputs.summary(steps, rows)
    assert summary["drawn"] == want and summary["epochs_finished"] == len(given) // 24
    assert abs(count["few"] / len(given) - 0.25) < 0.05 or steps < 40
