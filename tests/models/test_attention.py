"""attend() against a loop, and its blocked form against the dense one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.models import attention, vision
from saber_jax.models.attention import attend, attend_nearby
from saber_jax.models.config import saber_config
from saber_jax.models.layers import scan_layers
from saber_jax.models.masks import packed_text, same_segment


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_query_heads_share_kv_heads_in_order():
    q, k, v = random((2, 5, 6, 4), 0), random((2, 5, 3, 4), 1), random((2, 5, 3, 4), 2)
    segments = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    got = attend(q, k, v, packed_text(segments, np.zeros_like(segments)))
    for row, i, head in [(0, 0, 0), (0, 2, 1), (0, 4, 5), (1, 3, 2), (1, 1, 4)]:
        seen = [j for j in range(i + 1) if segments[row, j] == segments[row, i]]
        scores = np.array([q[row, i, head] @ k[row, j, head // 2] for j in seen]) / 2
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(
            got[row, i, head], weights @ v[row, seen, head // 2], rtol=2e-5, atol=1e-6
        )


def test_what_lies_before_the_longest_segment_need_not_be_looked_at(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    q, k, v = (random((1, 24, 2, 4), seed) for seed in range(3))
    segments = np.repeat([[1, 2, 3, 4, 0]], [5, 7, 6, 2, 4], axis=1)
    form = functools.partial(packed_text, segments, np.zeros_like(segments))
    got = attend(q, k, v, form(longest=7))
    np.testing.assert_allclose(got[:, :20], attend(q, k, v, form())[:, :20], atol=1e-6)
    # The seventh slot of the second segment does look at its first.
    assert abs(got - attend(q, k, v, form(longest=2)))[:, :20].max() > 1e-3


@pytest.mark.parametrize("length", [24, 29])
def test_nearby_attention_equals_dense_attention(length):
    lengths = [5, 1, 6, 6, 3]
    segments = np.repeat([1, 2, 3, 4, 5], lengths)
    segments = np.pad(segments, (0, length - len(segments)))[None]
    q, k, v = (random((1, length, 2, 4), seed) for seed in range(3))
    real = segments[0] > 0

    def loss(q, k, v, form):
        out = form(q, k, v)[:, real]
        return (out**2).sum(), out

    def both(form):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, form=form), (0, 1, 2), True))
        (_, out), gradients = run(q, k, v)
        return [out, *gradients]

    got = both(lambda q, k, v: attend_nearby(q, k, v, segments, 6))
    want = both(lambda q, k, v: attend(q, k, v, same_segment(segments)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_patches_see_their_window_or_their_frame(full):
    cfg = saber_config("tiny").vision
    windows = [cfg.window_patches, 16]  # Of a frame.
    frame = np.repeat([[1, 2, 3, 4, 0]], [sum(windows)] * 4 + [9], axis=1)
    window = np.pad(np.repeat(np.arange(1, 9), windows * 4), (0, 9))[None]
    q, k, v = (random((1, frame.size, 2, 4), seed) for seed in range(3))
    real = frame[0] > 0
    got = vision._attend(
        q,
        k,
        v,
        full=jnp.array(full),
        window=window,
        frame=frame,
        cfg=cfg,
        reach=sum(windows),
        kernel="xla",
    )
    want = attend(q, k, v, same_segment(frame if full else window))
    np.testing.assert_allclose(got[:, real], want[:, real], atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    q = k = v = random((1, 3, 1, 4), 0)
    segments = np.zeros((1, 3), np.int32)
    value, gradient = jax.value_and_grad(lambda q: attend(q, k, v, same_segment(segments)).sum())(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match=r"'layer', .* got 'all'"):
        scan_layers(lambda x, _: (x, None), jnp.zeros(1), jnp.zeros(2), remat="all")


@pytest.mark.parametrize(("response", "named"), [(0, 0), (5, 5), (8, 0)])
def test_causal_attention_in_blocks_equals_dense_attention(monkeypatch, response, named):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    length = 14 + 2 * response
    shared = np.array([1] * 6 + [2] * 5 + [0] * 3)
    region = np.array([1] * 2 + [2] * 3 + [0] * 8)[:response]
    segments = np.concatenate([shared, region, region[::-1] if response == 5 else region])[None]
    branch = np.repeat([0, 1, 2], [14, response, response])[None]
    q, k, v = (
        random((1, length, 4, 4), 0),
        random((1, length, 2, 4), 1),
        random((1, length, 2, 4), 2),
    )
    visible = packed_text(segments, branch, response=named)
    real = (segments > 0)[:, :, None, None]

    def both(form):
        def loss(q, k, v):
            out = jnp.where(real, form(q, k, v, visible), 0)
            return (out**2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), True)(q, k, v)
        return [out, *gradients]

    for got, want in zip(both(attention._blocks), both(attention._dense), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
