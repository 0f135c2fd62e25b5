"""Which weights are the best, and when a run ends early."""

import pytest

from configs import sft
from saber_jax.train import best
from saber_jax.train.best import Best


def seen(metric, values, patience=0, **state):
    """(steps whose weights were kept, step at which the run ends) of one measurement a step."""
    kept: list[int] = []
    best = Best(metric=metric, patience=patience, keep=lambda _, step: kept.append(step))
    if state:
        best.recall(state, state["step"])
    for step, value in enumerate(values):
        if best.seen({f"validate/{metric}": value}, None, step):
            return kept, step
    return kept, None


def test_a_loss_is_better_when_lower_and_everything_else_when_higher():
    values = [3.0, 2.0, 2.0, 4.0]
    for metric in ("nll", "nll/video_desc", "loss"):
        assert seen(metric, values) == ([0, 1], None)
    for metric in ("accuracy", "margin"):
        assert seen(metric, values) == ([0, 3], None)


def test_the_run_ends_after_so_many_measurements_that_are_no_better():
    assert seen("nll", [3.0, 2.0, 2.0, 1.0, 1.5, 1.0], patience=2) == ([0, 1, 3], 5)


def test_a_resumed_run_counts_on():
    assert seen("nll", [2.0], patience=2, value=1.0, step=7, since=1) == ([], 0)


@pytest.mark.parametrize("held", [150, None])
def test_after_a_rollback_past_the_best_weights_the_next_are_kept(held, capsys):
    kept: list[int] = []
    best = Best(metric="nll", patience=2, keep=lambda _, step: kept.append(step))
    best.recall({"value": 1.0, "step": 50, "since": 1}, held)
    for step, value in ((100, 1.2), (150, 1.1), (200, 1.3)):
        assert not best.seen({"validate/nll": value}, None, step)
    assert kept == [100, 150]
    place = "none" if held is None else "those of step 150"
    assert f"best at step 50, whose weights are gone: best holds {place}" in capsys.readouterr().out


def test_nothing_is_forgotten_where_nothing_was_measured(capsys):
    best = Best(metric="nll", patience=0, keep=lambda *_: None)
    best.recall({"value": None, "step": 0, "since": 0}, None)
    assert not capsys.readouterr().out


def test_the_weights_that_are_held_are_the_newest(tmp_path):
    assert best.held(tmp_path) is None
    for step in (50, 150):
        (tmp_path / "best" / "checkpoints" / str(step)).mkdir(parents=True)
    assert best.held(tmp_path) == 150


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    best = Best(metric="acuracy", patience=0, keep=lambda *_: None)
    with pytest.raises(ValueError, match=r"'acuracy' is not measured\. .*: accuracy, margin"):
        best.seen({"validate/accuracy": 1.0, "validate/margin": 1.0}, None, 0)


def test_settings_without_effect_are_refused():
    config = sft.get_config("tiny")
    config.validate.keep_best = "nll"
    with pytest.raises(ValueError, match="needs a held-out part"):
        best.check(config, ["nll"])
    config.validate.keep_best, config.validate.patience = "", 3
    with pytest.raises(ValueError, match="needs to know what should improve"):
        best.check(config, ["nll"])
