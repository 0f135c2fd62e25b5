"""The TPU kernels under our masks, interpreted on the CPU, against XLA's form of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saber_jax.models import kernels
from saber_jax.models.attention import attend, attend_nearby
from saber_jax.models.kernels import NearbyMask, PackedMask
from saber_jax.models.masks import Mask, packed_text

TOLERANCE = 2e-5


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def output_and_gradients(form, q, k, v, real):
    """Gradients of a loss over the slots that are not padding."""

    def loss(q, k, v):
        out = jnp.where(real[..., None, None], form(q, k, v), 0.0)
        return (out * jnp.cos(jnp.arange(out.shape[-1]))).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), True))(q, k, v)
    return [out, *gradients]


def assert_same(kernel_form, xla_form, q, k, v, real):
    got = output_and_gradients(kernel_form, q, k, v, real)
    want = output_and_gradients(xla_form, q, k, v, real)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("length", "response", "kernel"),
    [
        *[(256, 0, "splash_interpret"), (256, 64, "splash_interpret")],
        (384, 128, "splash_fused_interpret"),
    ],
)
def test_the_text_kernel_equals_xla_on_packed_pairs(length, response, kernel, monkeypatch):
    """Two pairs a row, or plain examples; query heads share kv heads; the head dim is padded. Only
    the last response is a whole number of blocks."""
    monkeypatch.setattr(kernels, "LONG_BLOCK", 128)
    shared = length - 2 * response
    region = [
        np.repeat([1, 2, 0], [n // 2, n // 4, n - n // 2 - n // 4]) for n in (shared, response)
    ]
    segments = np.concatenate([region[0], region[1], region[1]])[None].astype(np.int32)
    branch = np.repeat([0, 1, 2], [shared, response, response])[None].astype(np.int32)
    q, k, v = (
        random((1, length, 4, 80), 0),
        random((1, length, 2, 80), 1),
        random((1, length, 2, 80), 2),
    )
    visible = packed_text(segments, branch, response=response)
    assert_same(
        functools.partial(attend, visible=visible, kernel=kernel),
        functools.partial(attend, visible=visible),
        *(q, k, v, segments > 0),
    )


def test_the_window_kernel_equals_xla_for_a_length_that_is_no_multiple_of_a_block():
    lengths = [40, 7, 64, 64, 30, 50]
    segments = np.repeat(np.arange(1, 7), lengths)
    segments = np.pad(segments, (0, 300 - len(segments)))[None].astype(np.int32)
    q, k, v = (random((1, 300, 2, 80), seed) for seed in range(3))
    assert_same(
        lambda q, k, v: attend_nearby(q, k, v, segments, 64, "splash_interpret"),
        lambda q, k, v: attend_nearby(q, k, v, segments, 64),
        *(q, k, v, segments > 0),
    )


def drawn(mask):
    return ["".join("x" if seen else " " for seen in row).rstrip() for row in mask[:, :]]


def test_the_packed_mask_is_as_drawn():
    want = ["x", "xx", "xxx", "xxxx", "xx  x", "xx  xx"]
    assert drawn(PackedMask(6, 2, block=2)) == want


@pytest.mark.parametrize("block", [3, 4])
def test_inside_visited_blocks_the_kernel_tests_what_the_mask_says(block):
    """Blocks of 3 divide the responses, so causality is enough for them; blocks of 4 do not."""
    mask = PackedMask(24, 6, block)
    slots, visited = np.arange(24), 0
    for query in slots.reshape(-1, block):
        for key in slots.reshape(-1, block):
            seen = mask[query[0] : query[-1] + 1, key[0] : key[-1] + 1]
            if seen.any():
                visited += 1
                np.testing.assert_array_equal(mask.mask_function(query[:, None], key), seen)
    assert visited < (24 // block) * (24 // block + 1) / 2  # Chosen responses are skipped.
    assert (mask.mask_function.__self__ == Mask(causal=True)) == (block == 3)


def test_the_nearby_mask_is_as_drawn():
    assert drawn(NearbyMask(5, 2)) == ["xx", "xxx", " xxx", "  xxx", "   xx"]


def test_rows_of_pairs_that_do_not_fill_blocks_are_refused():
    x = jnp.zeros((1, 200, 1, 8))
    ids = jnp.ones((1, 200), jnp.int32)
    visible = packed_text(ids, ids, response=10)
    with pytest.raises(ValueError, match=r"multiple of 128 slots .* got 200"):
        attend(x, x, x, visible, "splash")
