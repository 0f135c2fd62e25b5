"""Sums and means against values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.train import losses


def test_section_nll_averages_each_section_over_its_tokens():
    log_probs = jnp.array([[-1.0, -3.0, -5.0, -9.0]])
    nll, counts = losses.section_nll(
        log_probs, jnp.array([[1.0, 1, 1, 0]]), jnp.array([[1, 1, 2, 0]]), 3
    )
    np.testing.assert_allclose(nll, [4.0, 5.0, 0.0])
    np.testing.assert_allclose(counts, [2.0, 1.0, 0.0])


def test_a_mean_over_nothing_is_not_zero():
    got = losses.means({"some": (jnp.array(6.0), jnp.array(4.0)), "none": (jnp.zeros(()),) * 2})
    assert got["some"] == 1.5 and np.isnan(got["none"])


def test_shared_tokens_count_for_both_responses():
    values = jnp.array([[-1.0, -2.0, -4.0, -8.0, 0.0]])
    chosen, rejected = losses.response_sums(
        values, jnp.array([[1, 1, 1, 2, 0]]), jnp.array([[0, 1, 2, 1, 0]]), 2
    )
    np.testing.assert_allclose(chosen, [[-3.0, -8.0]])
    np.testing.assert_allclose(rejected, [[-5.0, 0.0]])


def test_length_weights_discount_what_lies_beyond_the_common_length():
    got = losses.length_weights(jnp.array([[0, 1, 2, 3]]), jnp.full((1, 4), 2.0), alpha=0.25)
    np.testing.assert_allclose(got, [[1, 1, 0.25, 0.25]])


def test_ratio_kl_equals_the_exact_divergence_when_averaged_over_the_reference():
    reference, policy = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    exact = (reference * np.log(reference / policy)).sum()
    # Twenty tokens that occur exactly as often as the reference says.
    tokens = np.repeat([0, 1, 2], [10, 6, 4])
    total, count = losses.ratio_kl(
        jnp.log(policy)[tokens][None], jnp.log(reference)[tokens][None], jnp.ones((1, 20), bool)
    )
    assert count == 20
    assert total / count == pytest.approx(exact, rel=1e-5)
