"""Every term of the CA-DPO loss against a value computed by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax import batch
from saber_jax.batch import Targets
from saber_jax.data.conflicts import IGNORED
from saber_jax.data.packing import Budget
from saber_jax.data.withhold import VIEWS
from saber_jax.train import objectives
from saber_jax.train.preference import ChosenRejected, Form, PairData, Preference, cadpo_loss

BUDGET = Budget(length=8, patches=4, chunks=1, targets=11, segments=1)
AUDIO, VIDEO = IGNORED.index("audio"), IGNORED.index("video")


def scores(chosen, rejected):
    return ChosenRejected(chosen=jnp.array([chosen]), rejected=jnp.array([rejected]))


# Two pairs. rho(y_w) = 2, -1; rho(y_l) = -3, 2; Delta = 5, -3.
POLICY = {
    "whole": scores([-10.0, -7.0], [-14.0, -3.0]),
    "audio": scores([-13.0, -7.5], [-15.0, -4.0]),
    "video": scores([-11.0, -9.0], [-12.0, -3.5]),
}
REFERENCE = {
    "whole": scores([-12.0, -6.0], [-11.0, -5.0]),
    "audio": scores([-14.0, -6.0], [-9.0, -9.0]),
    "video": scores([-12.5, -7.0], [-9.0, -9.0]),
    "both": scores([-20.0, -9.0], [-18.0, -12.0]),
}
PAIRS = PairData(
    kappa=jnp.array([[0.25, 1.0]]),
    ignored=jnp.array([[AUDIO, VIDEO]]),
    lengths=scores([4.0, 2.0], [5.0, 3.0]),
    chosen_nll=jnp.array([[10.0, 7.0]]),
)


def loss(pairs=PAIRS, **options):
    return np.asarray(cadpo_loss(POLICY, REFERENCE, pairs, Preference(**options))[0][0])


def minus_log_sigmoid(z):
    return math.log1p(math.exp(-z))


def test_the_default_is_the_papers_form():
    np.testing.assert_allclose(loss(), [minus_log_sigmoid(0.5), minus_log_sigmoid(-0.3)], rtol=1e-6)


def test_label_smoothing_mixes_both_orders():
    want = [0.9 * minus_log_sigmoid(z) + 0.1 * minus_log_sigmoid(-z) for z in (0.5, -0.3)]
    np.testing.assert_allclose(loss(label_smoothing=0.1), want, rtol=1e-6)


def test_robust_subtracts_the_swapped_share():
    want = [(0.9 * minus_log_sigmoid(z) - 0.1 * minus_log_sigmoid(-z)) / 0.8 for z in (0.5, -0.3)]
    np.testing.assert_allclose(loss(form="robust", label_smoothing=0.1), want, rtol=1e-6)


def test_ipo_regresses_the_difference_of_per_token_averages():
    # 2/4 + 3/5 = 1.1 and -1/2 - 2/3; 1 / (2 * 0.1) = 5.
    want = [(1.1 - 5) ** 2, (-0.5 - 2 / 3 - 5) ** 2]
    np.testing.assert_allclose(loss(form="ipo"), want, rtol=1e-6)


def test_hinge_stops_at_one():
    np.testing.assert_allclose(loss(form="hinge"), [0.5, 1.3], rtol=1e-6)
    np.testing.assert_allclose(loss(form="hinge", beta=1.0), [0.0, 4.0], rtol=1e-6)


def test_the_margin_moves_the_goal():
    want = [minus_log_sigmoid(0.5 - 0.2), minus_log_sigmoid(-0.3 - 0.2)]
    np.testing.assert_allclose(loss(margin=0.2), want, rtol=1e-6)


def test_conflict_weights_pairs_by_kappa():
    want = [0.5 * minus_log_sigmoid(0.5), minus_log_sigmoid(-0.3)]
    np.testing.assert_allclose(loss(conflict_power=0.5), want, rtol=1e-6)


def test_the_sft_anchor_is_per_token_of_the_chosen_response_and_not_weighted_by_kappa():
    want = loss(conflict_power=1.0) + 0.2 * np.array([10 / 4, 7 / 2])
    np.testing.assert_allclose(loss(conflict_power=1.0, sft=0.2), want, rtol=1e-6)


def test_the_anchor_holds_the_chosen_response_up():
    want = loss() + 0.5 * np.array([minus_log_sigmoid(0.2), minus_log_sigmoid(-0.1)])
    np.testing.assert_allclose(loss(anchor=0.5), want, rtol=1e-6)


def test_conditional_terms_ask_for_each_modality():
    # rho(y_w) without audio: 1, -1.5; without video: 1.5, -2.
    audio = np.array([minus_log_sigmoid(0.1 * 1), minus_log_sigmoid(0.1 * 0.5)])
    video = np.array([minus_log_sigmoid(0.1 * 0.5), minus_log_sigmoid(0.1 * 1)])
    got = loss(conditional_audio=0.5, conditional_video=0.25)
    np.testing.assert_allclose(got, loss() + 0.5 * audio + 0.25 * video, rtol=1e-6)


def test_conditional_terms_can_ask_for_the_ignored_modality_alone():
    # The first pair's rejected response ignored audio, the second's video.
    want = loss() + np.array([0.5 * minus_log_sigmoid(0.1), 0.25 * minus_log_sigmoid(0.1)])
    got = loss(conditional_audio=0.5, conditional_video=0.25, conditional_ignored_only=True)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_decoupling_adds_invariance_and_takes_sensitivity():
    # l(c) = 4, -4; without audio 2, -3.5; without video 1, -5.5. beta Delta = 0.5, -0.3.
    first = 0.5 + 0.02 * (4 - 1) - 0.05 * (4 - 2)  # Followed video, ignored audio.
    second = -0.3 + 0.02 * (-4 + 3.5) - 0.05 * (-4 + 5.5)
    want = [minus_log_sigmoid(first), minus_log_sigmoid(second)]
    np.testing.assert_allclose(loss(invariance=0.02, sensitivity=0.05), want, rtol=1e-6)


def test_decoupling_is_the_closed_form_with_its_own_temperature():
    beta, inv, sens = 0.1, 0.02, 0.05
    tau = beta + inv - sens
    here = POLICY["whole"].difference[0, 0]
    z = (
        tau * here
        - beta * REFERENCE["whole"].difference[0, 0]
        - inv * POLICY["video"].difference[0, 0]
        + sens * POLICY["audio"].difference[0, 0]
    )
    got = loss(invariance=inv, sensitivity=sens)[0]
    assert got == pytest.approx(minus_log_sigmoid(float(z)), rel=1e-6)


def test_no_gradient_flows_through_a_withheld_view_of_the_decoupled_terms():
    def total(without):
        policy = POLICY | {"audio": without}
        options = Preference(invariance=0.02, sensitivity=0.05)
        return cadpo_loss(policy, REFERENCE, PAIRS, options)[0].sum()

    grads = jax.grad(total)(POLICY["audio"])
    assert not np.any(jax.tree.leaves(grads))


def test_the_text_prior_takes_off_what_the_reference_prefers_blindly():
    # l_ref with both withheld: -2 and 3.
    want = [minus_log_sigmoid(0.5 + 0.2 * 2), minus_log_sigmoid(-0.3 - 0.2 * 3)]
    np.testing.assert_allclose(loss(text_prior=0.2), want, rtol=1e-6)


def test_every_term_that_is_on_is_reported():
    options = Preference(sft=0.1, anchor=0.1, conditional_audio=0.1)
    terms = cadpo_loss(POLICY, REFERENCE, PAIRS, options)[1]
    assert set(terms) == {"preference", "sft", "anchor", "conditional_audio"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sigmiod"}, "form is 'sigmiod'; choose from"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "from 0 to below 0.5"),
        ({"length_alpha": 1.5}, r"must be in \[0, 1\]"),
        ({"form": "robust"}, "robust without label_smoothing is sigmoid"),
        ({"form": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 would have no effect"),
        ({"form": "ipo", "margin": 0.1}, "margin=0.1 would have no effect"),
        ({"form": "ipo", "sensitivity": 0.1}, "sensitivity=0.1 would have no effect"),
        ({"form": "ipo", "text_prior": 0.1}, "text_prior=0.1 would have no effect"),
        ({"conditional_ignored_only": True}, "neither conditional_audio nor conditional_video"),
    ],
)
def test_an_option_without_effect_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Preference(**options)


CHANGES = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "margin": 0.2,
    "conflict_power": 1.0,
    "sft": 0.1,
    "anchor": 0.1,
    "conditional_audio": 0.1,
    "conditional_video": 0.1,
    "invariance": 0.1,
    "sensitivity": 0.1,
    "text_prior": 0.1,
    "conditional_ignored_only": True,
}


# What an option needs beside it.
NEEDS = {"conditional_ignored_only": {"conditional_audio": 0.1, "conditional_video": 0.1}}


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("name", CHANGES)
def test_in_every_form_an_option_changes_the_loss_or_is_an_error(form, name):
    without = {"form": form} | NEEDS.get(name, {})
    if form == "robust":
        without["label_smoothing"] = 0.2
    try:
        Preference(**without | {name: CHANGES[name]})
    except ValueError as error:
        assert f"config.loss.{name}={CHANGES[name]} would have no effect" in str(error)
    else:
        assert np.abs(loss(**without | {name: CHANGES[name]}) - loss(**without)).max() > 1e-4


def test_no_option_is_forgotten_here():
    # length_alpha changes what goes in: see the test from the log-probs of tokens.
    # warn_displacement is about the console alone: see tests/train/test_validate.py.
    names = {field.name for field in dataclasses.fields(Preference)}
    assert names == set(CHANGES) | {"form", "length_alpha", "warn_displacement"}
    for form in get_args(Form):
        assert any(c["form"] == form and "length_alpha" in c for c in GOLDENS["of_tokens"])


def test_options_name_the_forward_passes_that_they_need():
    assert Preference().policy_views == () and Preference().reference_views == ("whole",)
    one = Preference(conditional_video=1.0)
    assert one.policy_views == ("video",) and one.reference_views == ("whole", "video")
    decoupled = Preference(invariance=0.1, text_prior=0.1)
    assert decoupled.policy_views == ("audio", "video")
    assert decoupled.reference_views == ("whole", "both")


GOLDENS = json.loads(Path(__file__).with_name("trl_goldens.json").read_text())


def options_of(case):
    return Preference(**{k: v for k, v in case.items() if k not in ("loss", "losses")})


def name_of(case):
    return " ".join(f"{key}={value}" for key, value in case.items() if "loss" not in key)


@pytest.mark.parametrize("case", GOLDENS["of_sums"], ids=name_of)
def test_losses_equal_trls_own(case):
    # The numbers of make_trl_goldens.py.
    policy = {"whole": scores([-10.0, -7.0, -31.5], [-14.0, -3.0, -30.25])}
    reference = {"whole": scores([-12.0, -6.0, -29.0], [-11.0, -5.0, -33.0])}
    lengths = scores([4.0, 2.0, 9.0], [5.0, 3.0, 7.0])
    pairs = PairData(
        kappa=jnp.ones((1, 3)),
        ignored=jnp.zeros((1, 3), jnp.int32),
        lengths=lengths,
        chosen_nll=jnp.zeros((1, 3)),
    )
    got = cadpo_loss(policy, reference, pairs, options_of(case))[0][0]
    np.testing.assert_allclose(got, case["losses"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", GOLDENS["of_tokens"], ids=name_of)
def test_the_objective_equals_trls_own_from_the_log_probs_of_tokens(case, monkeypatch):
    # The numbers of make_trl_goldens.py: two tokens of both answers, three and six of one.
    policy = [-0.5, -1.25, -2.0, -0.75, -3.5, -4.0, -0.25, -1.5, -2.5, -0.125, -3.0]
    reference = [-0.75, -1.0, -2.5, -1.5, -3.0, -3.0, -0.5, -2.0, -1.0, -0.5, -4.0]
    monkeypatch.setattr(objectives, "target_log_probs", lambda *_: jnp.array([policy]))
    targets = Targets(
        tokens=jnp.zeros((1, 11), jnp.int32),
        source=jnp.zeros((1, 11), jnp.int32),
        section=jnp.ones((1, 11), jnp.int32),
        segment=jnp.ones((1, 11), jnp.int32),
        branch=jnp.array([[0] * 2 + [1] * 3 + [2] * 6]),
        index=jnp.array([[0, 1, *range(2, 5), *range(2, 8)]]),
        weights=jnp.ones((1, 11)),
        reference=jnp.tile(jnp.array(reference), (1, len(VIEWS), 1)),
    )
    segments = batch.PairInputs(
        kappa=jnp.ones((1, 1)),
        conflict=jnp.ones((1, 1), jnp.int32),
        ignored=jnp.zeros((1, 1), jnp.int32),
        valid=jnp.ones((1, 1), bool),
    )
    row = dataclasses.replace(batch.empty(1, BUDGET), targets=targets, pairs=segments)
    loss, pairs, _ = objectives.cadpo_objective({}, row, None, None, options_of(case))
    assert pairs == 1
    assert float(loss) == pytest.approx(case["loss"], rel=1e-6)
