"""Losses against values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.train import losses


def test_sft_loss_is_a_mean_over_tokens_not_over_rows():
    log_probs = jnp.array([[-1.0, -2.0, 0.0], [-6.0, 0.0, 0.0]])
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss, metrics = losses.sft_loss(log_probs, weights)
    assert loss == pytest.approx(3.0)  # (1 + 2 + 6) / 3; a mean of means would be 3.75.
    assert metrics["target_tokens"] == 3


def test_section_nll_averages_each_section_over_its_tokens():
    log_probs = jnp.array([[-1.0, -3.0, -5.0, -9.0]])
    got = losses.section_nll(log_probs, jnp.array([[1.0, 1, 1, 0]]), jnp.array([[1, 1, 2, 0]]), 3)
    np.testing.assert_allclose(got, [2.0, 5.0, 0.0])


def test_shared_tokens_count_for_both_responses():
    log_probs = jnp.array([[-1.0, -2.0, -4.0, -8.0, 0.0]])
    chosen, rejected = losses.response_log_probs(
        log_probs, jnp.array([[1, 1, 1, 2, 0]]), jnp.array([[0, 1, 2, 1, 0]]), 2
    )
    np.testing.assert_allclose(chosen, [[-3.0, -8.0]])
    np.testing.assert_allclose(rejected, [[-5.0, 0.0]])


def test_cadpo_loss_equals_the_formula():
    beta = 0.1
    args = [jnp.array([x]) for x in ([-10.0, -7.0], [-14.0, -3.0], [-12.0, -6.0], [-11.0, -5.0])]
    loss, metrics = losses.cadpo_loss(*args, jnp.array([[True, True]]), beta=beta)
    margins = beta * np.array([(-10 + 12) - (-14 + 11), (-7 + 6) - (-3 + 5)])
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-6)
    assert metrics["rewards/accuracies"] == pytest.approx(0.5)


def test_padding_pairs_change_nothing():
    args = [jnp.array([x]) for x in ([-10.0, 9.0], [-14.0, 9.0], [-12.0, 0.0], [-11.0, 0.0])]
    padded, _ = losses.cadpo_loss(*args, jnp.array([[True, False]]), beta=0.1)
    alone, _ = losses.cadpo_loss(*(a[:, :1] for a in args), jnp.array([[True]]), beta=0.1)
    assert padded == pytest.approx(float(alone))
