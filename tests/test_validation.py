"""Validation in a whole run: which examples it is about, when it happens, and that it resumes."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs import cadpo, sft
from saber_jax import main, sharding
from saber_jax.data.records import FIELDS
from saber_jax.inputs import open_inputs
from saber_jax.runs.files import read_jsonl, write_jsonl
from saber_jax.train import stage as stages
from saber_jax.train import validate
from saber_jax.tree import flatten
from tests import synthetic
from tests.finished_run import load
from tests.test_main import (
    build_records,
    compiled_once,
    config_for,
    metrics_of,
    train_until_killed,
)

__all__ = ["compiled_once"]  # Imported for pytest, which applies it to every test here.


@pytest.fixture(scope="module")
def records(tmp_path_factory, tokenizer):
    return build_records(tmp_path_factory.mktemp("records"), tokenizer, 12)


def validated(module, records, root):
    config = config_for(module, records, root)
    config.validate.examples, config.validate.every = 4, 3
    return config


@pytest.fixture(scope="module")
def whole(records, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    main.train(validated(sft, records, root))
    return root


def test_it_happens_before_the_first_step_every_n_and_after_the_last(whole):
    found = [(line["step"], "validate/nll" in line) for line in metrics_of(whole, "sft")]
    assert found == [
        *[(0, True), (0, False), (1, False), (2, False)],
        *[(3, True), (3, False), (4, True)],
    ]
    first, *_, last = (
        line["validate/nll"] for line in metrics_of(whole, "sft") if "validate/nll" in line
    )
    assert last < first  # Four steps on eight similar clips are enough.


def test_a_killed_run_validates_as_an_uninterrupted_one(records, whole, tmp_path, monkeypatch):
    train_until_killed(validated(sft, records, tmp_path), monkeypatch)
    main.train(validated(sft, records, tmp_path))
    assert metrics_of(tmp_path, "sft") == metrics_of(whole, "sft")


@pytest.mark.slow
def test_a_run_that_stops_improving_ends_early_with_its_best_weights_also_after_a_restart(
    records, tmp_path, monkeypatch
):
    """Makes all measurements equal, so that the first one stays the best."""
    monkeypatch.setattr(validate, "metrics", lambda *_: {"validate/nll": 1.0})
    config = validated(sft, records, tmp_path)
    config.validate.keep_best, config.validate.patience = "nll", 1
    train_until_killed(config, monkeypatch)
    main.train(config)
    lines = metrics_of(tmp_path, "sft")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3]
    assert json.loads((tmp_path / "sft/summary.json").read_text())["steps"] == 3
    first, last = (flatten(load(tmp_path / "sft" / place)[0]) for place in ("best", ""))
    assert any((first[name] != last[name]).any() for name in first)
    main.train(config)
    assert metrics_of(tmp_path, "sft") == lines


def test_no_training_row_holds_a_clip_that_is_held_out(records, tmp_path):
    config = validated(sft, records, tmp_path)
    inputs = open_inputs(config, tmp_path, None)
    assert len(inputs.held_out) == 4
    trained = {i % 12 for row in inputs.plan.rows(40) for i in row}
    assert trained == set(range(12)) - set(inputs.held_out.tolist())
    assert np.concatenate(inputs.plan.rows_of(inputs.held_out)).size == 4


def test_held_out_clips_that_cannot_be_read_are_counted_and_named(records, tmp_path):
    config = validated(sft, records, tmp_path)
    config.data.max_bad_fraction = 0.5
    stage = stages.build(config, sharding.make_mesh(**config.mesh))
    inputs = open_inputs(config, tmp_path, None)
    gone = inputs.held_out[:3].tolist()
    inputs = dataclasses.replace(inputs, examples=inputs.examples.without(gone))
    validation = main.validated(config, stage, inputs)
    ones = np.ones(len(FIELDS), np.float32)
    measure = lambda _, batch: validate.BatchSums(  # noqa: E731 - Without a network.
        nll=ones, tokens=ones, left_out=batch.left_out.sum()
    )
    values = dataclasses.replace(validation, measure=measure).run(None, 0, bool)
    assert values["validate/left_out"] == 3
    assert [entry["index"] for entry in read_jsonl(tmp_path / "quarantine.jsonl")] == sorted(gone)


def test_pairs_start_from_an_even_choice_and_are_measured_against_their_lengths(
    records, whole, tmp_path
):
    config = validated(cadpo, records, tmp_path)
    config.init.checkpoint = str(whole / "sft")
    config.data.response = 64
    pairs = [
        {
            "clip_id": synthetic.record(i, words=2).clip_id,
            "chosen": "[video_desc] yes. [sentiment_analysis] So sad.",
            "rejected": "[video_desc] no. [sentiment_analysis] So happy. So happy it is.",
        }
        for i in range(12)
    ]
    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "pairs.jsonl", pairs)
    main.train(config)
    found = [line for line in metrics_of(tmp_path, "cadpo") if "validate/accuracy" in line]
    assert [line["step"] for line in found] == [0, 3, 4]
    first, last = found[0], found[-1]
    assert first["validate/pairs"] == 4
    assert (first["validate/accuracy"], first["validate/longer_wins"]) == (0.5, 0.0)
    assert first["validate/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["validate/displacement"] == pytest.approx(0, abs=1e-5)
    assert last["validate/margin"] > first["validate/margin"]
