"""What a run says about its data."""

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pytest

from configs import cadpo, sft
from data_prep.records import dataset
from saber_jax import main
from saber_jax.data import planning
from saber_jax.data.pairs import Pair
from saber_jax.inputs import open_inputs
from saber_jax.train.references import reference_inputs
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


def resumed(inputs, row):
    """As if a checkpoint had been made before this row."""
    position = dataclasses.asdict(inputs.plan.position(row))
    return inputs.resumed({"position": position, "quarantined": []})


def test_a_resumed_run_sums_its_data_up_as_an_uninterrupted_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW", 8)
    inputs, rows = open_inputs(config, tmp_path, None), config.data.batch_rows
    later = resumed(inputs, 39 * rows)
    assert later.plan.position(39 * rows).window  # Not the first one of its epoch.
    assert later.summary(40, rows) == inputs.summary(40, rows)


def test_a_resumed_run_says_the_epochs_of_an_uninterrupted_one_and_they_end_whole(config, tmp_path):
    """An epoch of 23 examples from two equal sources has 24 or 22: half of 23 is rounded."""
    config.data.mixture = (f"{tmp_path}/many:train:1", f"{tmp_path}/few:train:1")
    config.validate.examples, config.data.batch_rows, config.steps = 1, 1, 60
    inputs = open_inputs(config, tmp_path, None)
    assert len(inputs.draw.usable) == 23
    lengths = [len(inputs.plan.row(r)) for r in range(60)]
    whole = main.schedule(config, inputs, 0)
    epochs = [whole.after(r, lengths[r])["epoch"] for r in range(60)]
    ends = [
        r for r in range(59) if inputs.plan.position(r).epoch < inputs.plan.position(r + 1).epoch
    ]
    assert [epochs[r] for r in ends] == list(range(1, len(ends) + 1)) and len(ends) > 2
    for first in (ends[0] + 1, ends[1] + 2):
        rest = main.schedule(config, resumed(inputs, first), first)
        assert [rest.after(r, lengths[r])["epoch"] for r in range(first, 60)] == epochs[first:]


@pytest.fixture
def pairs_of(tokenizer, tmp_path):
    """Inputs of stage 2 with so many pairs about records of the first of `folders`, and one pair
    about each other one."""
    sizes = {"many": range(6), "few": range(100, 103), "other": range(50, 53)}
    for name, seeds in sizes.items():
        (tmp_path / name).mkdir()
        dataset.write(tmp_path / name, {"preference": seeds}, synthetic.record)
        shutil.copy(tokenizer.path, tmp_path / name)

    def made(count: int, *folders: str):
        config = cadpo.get_config("tiny")
        config.data.path = str(tmp_path / "many") if len(folders) == 1 else "/nowhere"
        if len(folders) > 1:
            config.data.mixture = tuple(f"{tmp_path}/{name}:preference:1" for name in folders)
        answers = [f"[video_desc] a {thing}" for thing in ("room", "street", "garden", "door")]
        clips = [*range(count), *(sizes[name][0] for name in folders[1:])]
        pairs = [
            Pair(clip_id=f"clip{i}", chosen=answers[i % 3], rejected=answers[3]) for i in clips
        ]
        workdir = tmp_path / "-".join((str(count), *folders))
        workdir.mkdir()
        return open_inputs(config, workdir, pairs)

    return made


def test_pairs_that_are_added_leave_the_reference_log_probs_of_the_others_valid(pairs_of):
    few, more = pairs_of(2, "many"), pairs_of(5, "many")
    assert reference_inputs(few, "weights", "float32") == reference_inputs(
        more, "weights", "float32"
    )
    keys = [[inputs.examples.key(i) for i in range(2)] for inputs in (few, more)]
    assert keys[0] == keys[1] and len({more.examples.key(i) for i in range(5)}) == 5


def test_the_reference_of_a_mixture_depends_on_all_of_its_records(pairs_of):
    mixed, other = pairs_of(3, "many", "few"), pairs_of(3, "many", "other")
    sources = [reference_inputs(inputs, "weights", "float32") for inputs in (mixed, other)]
    assert sources[0].media != sources[1].media and sources[0].tokens == sources[1].tokens


def test_a_clip_that_keeps_other_frames_asks_the_reference_anew(pairs_of):
    examples = pairs_of(3, "many").examples
    kept, others = np.array([2, 2, 2]), np.array([2, 3, 2])
    before, after = examples.with_frame_pairs(kept), examples.with_frame_pairs(others)
    same = [before.key(i) == after.key(i) for i in range(3)]
    assert same == [True, False, True]


def test_epochs_become_steps_of_so_many_examples_and_steps_override_them(config, tmp_path):
    config.steps, config.epochs = None, 2
    with pytest.raises(ValueError, match=r"epochs=2 and config\.data\.batch_examples=0 do not say"):
        open_inputs(config, tmp_path, None)
    config.data.batch_examples = 7
    inputs = open_inputs(config, tmp_path, None)
    assert inputs.steps == 2 * 4  # Of 24 examples.
    summary = inputs.summary(inputs.steps, config.data.batch_rows)
    assert summary["epochs_finished"] == 2 and sum(summary["drawn"].values()) == 48
    config.steps = 3
    assert open_inputs(config, tmp_path, None).steps == 3
    config.data.batch_rows = 1
    with pytest.raises(ValueError, match="Set batch_rows to"):
        open_inputs(config, tmp_path, None)


def test_a_step_that_would_be_larger_than_an_epoch_is_one_and_the_run_says_so(
    config, tmp_path, capsys
):
    config.steps, config.epochs = None, 3
    for examples, said in ((24, False), (25, True)):
        config.data.batch_examples = examples
        assert open_inputs(config, tmp_path, None).steps == 3
        warning = f"batch_examples={examples} is more than the 24 examples of an epoch"
        assert (warning in capsys.readouterr().out) == said
