import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.train import head

ROWS, TARGETS, CHUNK, WIDTH, VOCABULARY = 2, 24, 8, 32, 96
FORMS = ("again", "kept", "weighted")


def drawn(dtype):
    """(hidden, projection, tokens, weights); one target in three is all but certain."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, TARGETS, WIDTH))
    projection = rng.normal(size=(WIDTH, VOCABULARY)) / WIDTH**0.5
    tokens = rng.integers(0, VOCABULARY, (ROWS, TARGETS))
    hidden[:, ::3] = 17 * projection.T[tokens[:, ::3]]
    weights = rng.normal(size=(ROWS, TARGETS))
    return jnp.asarray(hidden, dtype), jnp.asarray(projection, dtype), tokens, weights


def gradients(hidden, projection, tokens, weights, form):
    def loss(hidden, projection):
        shape = {"vocab": VOCABULARY, "chunk": CHUNK}
        if form == "weighted":
            total, values = head.weighted_nll(hidden, projection, tokens, weights / 2, **shape)
            return -2 * total[0], values
        values = head.log_probs(hidden, projection, tokens, keep=form == "kept", **shape)
        return (values * weights).sum(), values

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, projection)


def exact(hidden, projection, tokens, weights):
    def loss(hidden, projection):
        values = jax.nn.log_softmax(hidden @ projection)
        values = jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
        return (values * weights).sum(), values

    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in (hidden, projection))
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(*wide)


@pytest.mark.parametrize("form", FORMS)
def test_no_form_changes_a_value_or_a_gradient(form):
    inputs = drawn(jnp.float32)
    got, values = gradients(*inputs, form)
    want, expected = exact(*inputs)
    np.testing.assert_allclose(values, expected, atol=2e-5)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_columns_beyond_the_vocabulary_take_no_part(form):
    hidden, projection, tokens, weights = drawn(jnp.float32)
    want, expected = gradients(hidden, projection, tokens, weights, form)
    padded = jnp.pad(projection, [(0, 0), (0, 32)])
    got, values = gradients(hidden, padded, tokens, weights, form)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], jnp.pad(want[1], [(0, 0), (0, 32)]), atol=1e-5)


@pytest.mark.parametrize("form", ["kept", "weighted"])
def test_slopes_of_targets_that_are_all_but_certain_survive_bfloat16(form):
    """Logits whose 1 - p would round to 0 if it were computed from p."""
    inputs = drawn(jnp.bfloat16)
    (want, _), expected = exact(*inputs)
    sure = (expected > -(2.0**-9)) & (expected < -1e-5)
    assert sure.sum() >= 4
    (got, _), _ = gradients(*inputs, form)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want, axis=-1)
    assert (error / jnp.linalg.norm(want, axis=-1))[sure].max() < 0.01


@pytest.mark.parametrize(("form", "products"), zip(FORMS, (4, 3, 3), strict=True))
def test_what_is_kept_or_weighed_saves_the_second_projection(form, products):
    """Products as wide as the vocabulary: 2 T D V each."""
    jaxpr = jax.make_jaxpr(functools.partial(gradients, form=form))(*drawn(jnp.float32))
    assert count(jaxpr.jaxpr) == products * ROWS * TARGETS * WIDTH * VOCABULARY


def count(jaxpr) -> int:
    """Multiplications in the matrix products of a jaxpr, loops as often as they turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contracted])
            total += int(inner * np.prod(equation.outvars[0].aval.shape))
        for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                total += count(getattr(inner, "jaxpr", inner)) * equation.params.get("length", 1)
    return total


def is_jaxpr(value) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
