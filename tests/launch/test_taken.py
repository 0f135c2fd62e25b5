"""Work directories that hold other runs are refused before the chain runs anything."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cadpo
from launch import chain


def leave_run(config: ConfigDict, *, finished: bool):
    """A run's work directory, as far as the chain looks at it beforehand."""
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    if finished:
        (workdir / "summary.json").touch()


def test_a_work_directory_of_other_settings_is_refused_before_anything_is_run(tmp_path):
    config = cadpo.get_config("tiny")
    config.root = str(tmp_path)
    chain.refuse_taken(config, ())
    (tmp_path / "cadpo").mkdir()
    (tmp_path / "cadpo/config.json").write_text(config.to_json())
    chain.refuse_taken(config, ())
    peak = config.optimizer.peak_lr
    config.optimizer.peak_lr = 1e-6
    chain.refuse_taken(config, ())  # The run there is unfinished, and may go on with another.
    (tmp_path / "cadpo/summary.json").touch()
    with pytest.raises(SystemExit, match=r"optimizer.peak_lr"):
        chain.refuse_taken(config, ())
    config.optimizer.peak_lr = peak
    config.loss.beta = 0.5
    with pytest.raises(SystemExit, match=r"loss.beta: 0.1 there, 0.5 here.*--config.workdir="):
        chain.refuse_taken(config, ())
    config.lora.rank = 8
    chain.refuse_taken(config, ("--config.lora.rank=8",))


def test_another_recipe_s_stage_1_is_refused_before_anything_is_run(tmp_path):
    first, second = cadpo.get_config("7b-lora-v5e-16"), cadpo.get_config("7b-v5e-256")
    first.root = second.root = str(tmp_path / "7b")
    start = chain.stage_1(first)
    assert start is not None
    leave_run(start, finished=True)
    chain.refuse_taken(first, ())
    with pytest.raises(SystemExit, match=r"7b/sft holds a run with.*--config.root=") as refused:
        chain.refuse_taken(second, ())
    assert "used again" not in str(refused.value)


@pytest.mark.parametrize("finished", [True, False])
def test_stage_1_is_said_to_be_used_again_only_if_it_is(tmp_path, finished):
    config = cadpo.get_config("tiny")
    config.root = str(tmp_path)
    leave_run(config, finished=True)
    start = chain.stage_1(config)
    assert start is not None
    leave_run(start, finished=finished)
    config.loss.beta = 0.5
    with pytest.raises(SystemExit, match=r"--config.workdir=") as refused:
        chain.refuse_taken(config, ())
    assert ("stage 1, the pairs and their evaluation are used again" in str(refused.value)) == (
        finished
    )
