import dataclasses

import numpy as np
import pytest

from saber_jax.data.records import FIELDS
from saber_jax.train.stage import CaDpo, Sed
from saber_jax.train.validate import BatchSums, PairTable, Validation, metrics, pair_metrics


def _columns(margins, chosen_tokens, rejected_tokens, fall=0.0):
    """Pairs of these margins (beta is 1) whose chosen answers lost `fall` nats."""
    margins = np.asarray(margins, float)
    return {
        "chosen": np.full(len(margins), -10.0 - fall),
        "rejected": -10.0 - fall - margins,
        "reference_chosen": np.full(len(margins), -10.0),
        "reference_rejected": np.full(len(margins), -10.0),
        "chosen_tokens": np.asarray(chosen_tokens, float),
        "rejected_tokens": np.asarray(rejected_tokens, float),
    }


def test_a_model_that_prefers_what_is_longer_has_half_the_length_balanced_accuracy():
    # Nine of ten chosen answers are the longer ones, and the model goes by that alone.
    chosen, rejected = [8] * 9 + [5], [5] * 9 + [8]
    values = pair_metrics(_columns([1.0] * 9 + [-1.0], chosen, rejected), beta=1.0)
    assert values["accuracy"] == values["longer_wins"] == 0.9
    assert values["length_balanced_accuracy"] == 0.5


def test_a_model_that_is_right_whatever_the_length_has_full_marks():
    values = pair_metrics(_columns([0.5] * 4, [8, 8, 8, 5], [5, 5, 5, 8]), beta=1.0)
    assert values["accuracy"] == values["length_balanced_accuracy"] == 1.0
    assert values["longer_wins"] == 0.75


def test_answers_of_one_length_count_half_for_the_rule_and_cannot_be_balanced():
    values = pair_metrics(_columns([1.0, 1.0], [8, 5], [5, 5]), beta=1.0)
    assert values["longer_wins"] == 0.75
    assert "length_balanced_accuracy" not in values


def test_loss_margin_and_displacement_are_the_formulas():
    columns = _columns([2.0, -1.0], [10, 5], [10, 10], fall=5.0)
    values = pair_metrics(columns, beta=0.5)
    assert values["margin"] == 0.25
    assert values["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log1p(np.exp(0.5))]))
    assert values["displacement"] == pytest.approx(-(5 / 10 + 5 / 5) / 2)


def test_the_untrained_policy_is_the_reference_and_prefers_neither():
    values = pair_metrics(_columns([0.0] * 3, [8, 5, 5], [5, 8, 8]), beta=0.1)
    assert values["accuracy"] == values["length_balanced_accuracy"] == 0.5
    assert values["margin"] == values["displacement"] == 0.0


def _table(columns, valid):
    rows = {name: column[None].astype(np.float32) for name, column in columns.items()}
    return PairTable(**rows, valid=np.asarray([valid], np.float32))


def _sums(nll, tokens, left_out=0, **pairs):
    return BatchSums(nll=nll, tokens=tokens, left_out=np.int32(left_out), **pairs)


def test_batches_add_up_and_padding_counts_nowhere():
    counts = np.array([2.0, 0, 0, 0, 0, 6.0])
    found = [
        _sums(counts * 3.0, counts, 2, pairs=_table(_columns([1, -9], [8, 1], [5, 1]), [1, 0])),
        _sums(counts * 1.0, counts, 1, pairs=_table(_columns([1, 1], [5, 5], [8, 8]), [1, 1])),
    ]
    values = metrics(found, beta=1.0)
    assert values["validate/nll"] == values[f"validate/nll/{FIELDS[0]}"] == 2.0
    assert f"validate/nll/{FIELDS[1]}" not in values
    assert values["validate/left_out"] == 3
    assert values["validate/pairs"] == 3 and values["validate/accuracy"] == 1.0
    assert values["validate/longer_wins"] == pytest.approx(1 / 3)
    assert values == pytest.approx(metrics(found[::-1], beta=1.0))


def test_the_metrics_that_a_stage_names_are_those_that_it_measures():
    counts, pairs = np.ones(len(FIELDS)), _table(_columns([1, -9], [8, 1], [5, 2]), [1, 1])
    found = _sums(counts, counts, pairs=pairs)
    facts = {"validate/pairs", "validate/longer_wins"}
    named = {f"validate/{name}" for name in CaDpo.validated}
    assert set(metrics([found], beta=1.0)) == named | facts
    alone = dataclasses.replace(found, pairs=None)
    assert set(metrics([alone], beta=0.0)) == {f"validate/{name}" for name in Sed.validated}


def test_stage_1_has_no_pair_metrics():
    counts = np.ones(len(FIELDS))
    values = metrics([_sums(counts, counts)], beta=0.0)
    assert set(values) == {"validate/nll", *(f"validate/nll/{field}" for field in FIELDS)}


def _validation(**settings):
    return Validation(batches=list, measure=lambda *_: None, every=5, steps=12, **settings)


def test_it_measures_before_the_first_step_every_n_and_after_the_last():
    assert [step for step in range(13) if _validation().due(step)] == [0, 5, 10, 12]


def _found(**columns):
    return metrics(
        [_sums(np.zeros(6), np.zeros(6), pairs=_table(_columns(**columns), [1, 1, 1]))], beta=1.0
    )


def test_not_beating_the_longer_wins_rule_is_said_but_not_before_training():
    longer = _found(margins=[1, 1, -1], chosen_tokens=[8, 8, 5], rejected_tokens=[5, 5, 8])
    (warning,) = _validation().warnings(longer, step=5)
    assert "it has not learnt more than lengths" in warning and "66.7%" in warning
    assert not _validation().warnings(longer, step=0)
    better = _found(margins=[1, 1, 1], chosen_tokens=[8, 8, 5], rejected_tokens=[5, 5, 8])
    assert not _validation().warnings(better, step=5)


def test_displacement_is_warned_of_with_the_options_that_help():
    fallen = _found(margins=[1, 1, 1], chosen_tokens=[8, 8, 5], rejected_tokens=[5, 5, 8], fall=8.0)
    (warning,) = _validation(warn_displacement=1.0).warnings(fallen, step=5)
    assert "fell by 1.20 nats a token" in warning and "config.loss.anchor" in warning
    assert not _validation(warn_displacement=1.5).warnings(fallen, step=5)
    assert not _validation().warnings(fallen, step=5)


class Batches(list):
    """A stand-in for GlobalBatches that counts how often all processes exchange names."""

    agreed = 0

    def agree(self):
        self.agreed += 1


@pytest.mark.parametrize("left_out", [0, 2])
def test_processes_exchange_the_names_of_what_they_left_out_if_there_is_any(left_out, capsys):
    batches, ones = Batches([None, None]), np.ones(len(FIELDS))
    measure = lambda *_: _sums(ones, ones, left_out)  # noqa: E731
    validation = Validation(batches=lambda: batches, measure=measure, every=5, steps=12)
    values = validation.run(None, 5, bool)
    assert batches.agreed == (left_out > 0) == ("validate/left_out" in values)
    assert ("4 left out" in capsys.readouterr().out) == (left_out > 0)
