"""Attention over spans of keys against the dense form, and that it skips the other keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.models import spans
from saber_jax.models.attention import attend
from saber_jax.models.masks import packed_text, same_segment

# Segments that begin and end inside of blocks, fill some, and are longer or shorter than one.
ROWS = np.array(
    [
        np.repeat([1, 2, 3, 4, 0], [5, 13, 4, 2, 5]),
        np.repeat([1, 0, 2, 3, 0], [4, 3, 1, 8, 13]),
        np.repeat([7, 3], [28, 1]),
        np.zeros(29, int),
    ]
)


def random(rows, heads, dtype=np.float32):
    shape = (*np.shape(rows), heads, 8)
    return jnp.asarray(np.random.default_rng(heads).normal(size=shape), dtype)


@pytest.mark.parametrize(("heads", "block"), [(6, 4), (3, 6), (6, 1), (6, 128)])
def test_packed_text(monkeypatch, heads, block):
    monkeypatch.setattr(spans, "BLOCK", block)
    q, k, v = random(ROWS, heads), random(ROWS, 3), random(ROWS, 3) + 1
    got = jax.jit(spans.packed)(q, k, v, ROWS)
    want = attend(q, k, v, packed_text(ROWS, np.zeros_like(ROWS)))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[ROWS > 0], want[ROWS > 0], atol=1e-6)


@pytest.mark.parametrize(("reach", "most"), [(28, 2), (28, 12), (300, 256)])
def test_same_segment(monkeypatch, reach, most):
    monkeypatch.setattr(spans, "MOST_BLOCK", most)
    q, k, v = random(ROWS, 3), random(ROWS, 3) - 1, random(ROWS, 3) + 1
    got = jax.jit(functools.partial(spans.same_segment, reach=reach))(q, k, v, ROWS)
    want = attend(q, k, v, same_segment(ROWS))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[ROWS > 0], want[ROWS > 0], atol=1e-6)


def test_bfloat16_differs_from_the_dense_form_by_rounding():
    q, k, v = (random(ROWS, heads, jnp.bfloat16) for heads in (6, 3, 3))
    got = jax.jit(spans.packed)(q, k, v, ROWS)
    want = attend(q, k, v, packed_text(ROWS, np.zeros_like(ROWS)))
    assert got.dtype == jnp.bfloat16
    got, want = (np.asarray(x, np.float32)[ROWS > 0] for x in (got, want))
    np.testing.assert_allclose(got, want, atol=2e-2)


def test_keys_of_other_segments_are_not_read():
    segments = np.repeat([[1, 2, 3]], [8, 8, 8], axis=1)
    q, k = random(segments, 2), random(segments, 2)
    # Hidden by a mask alone, they would get a weight of 0, and 0 times NaN is NaN.
    v = k.at[:, 8:16].set(jnp.nan)
    got = jax.jit(functools.partial(spans.same_segment, reach=4))(q, k, v, segments)
    assert np.isnan(got[:, 8:16]).all()
    assert np.isfinite(got[:, np.r_[0:8, 16:24]]).all()


def test_keys_behind_a_causal_block_are_not_read(monkeypatch):
    monkeypatch.setattr(spans, "BLOCK", 4)
    segments = np.ones((1, 12), int)
    q, k = random(segments, 2), random(segments, 2)
    got = jax.jit(spans.packed)(q, k, k.at[:, 8:].set(jnp.nan), segments)
    assert np.isfinite(got[:, :8]).all()
