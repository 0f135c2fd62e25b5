"""The GPU kernel, interpreted on the CPU, against XLA's form of attention; and its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from saber_jax.models import triton
from saber_jax.models.attention import attend, attend_nearby
from saber_jax.models.masks import packed_text
from tests.models.test_kernels import output_and_gradients, random

LENGTH = 256

# Differences from the XLA form in float32: absolute, and relative to numbers of order 1 to 10.
BOUND = {"float32": (2e-5, 0), "bfloat16": (0.04, 0.01)}


def rows(response):
    """Segments and branches of a row with two examples and padding in every region."""
    sizes = [LENGTH - 2 * response, response, response]
    regions = [np.repeat([1, 2, 0], [n // 2, n // 4, n - n // 2 - n // 4]) for n in sizes]
    branch = np.repeat([0, 1, 2], sizes)
    return jnp.array(np.concatenate(regions))[None], jnp.array(branch)[None]


def assert_close(kernel_form, xla_form, operands, real, dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in operands)
    got = output_and_gradients(kernel_form, q, k, v, real)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want = output_and_gradients(xla_form, q, k, v, real)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        atol, rtol = BOUND[dtype]
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=atol, rtol=rtol)


@pytest.mark.parametrize(
    ("response", "head_dim", "dtype"),
    [(64, 128, "float32"), (50, 80, "bfloat16")],
)
def test_the_text_kernel_equals_xla_on_packed_pairs(response, head_dim, dtype):
    """Query heads share a kv head, regions need not fill blocks, heads need no power of two."""
    segments, branch = rows(response)
    operands = [random((1, LENGTH, n, head_dim), seed) for seed, n in enumerate((2, 1, 1))]
    visible = packed_text(segments, branch, response=response)
    assert_close(
        functools.partial(attend, visible=visible, kernel="triton_interpret"),
        functools.partial(attend, visible=visible),
        *(operands, segments > 0, dtype),
    )


def test_the_vision_kernel_equals_xla_for_a_length_that_is_no_multiple_of_a_block():
    lengths = [40, 7, 64, 64, 30, 25]
    segments = np.repeat(np.arange(1, 7), lengths)
    segments = jnp.array(np.pad(segments, (0, 240 - len(segments))))[None]
    operands = [random((1, 240, 1, 80), seed) for seed in range(3)]
    assert_close(
        lambda q, k, v: attend_nearby(q, k, v, segments, 64, "triton_interpret"),
        lambda q, k, v: attend_nearby(q, k, v, segments, 64),
        *(operands, segments > 0, "float32"),
    )


def visits(table, row):
    return set(table[0, row, 1 : 1 + table[0, row, 0]].tolist())


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("response", [0, 64])
def test_blocks_are_visited_exactly_where_the_mask_shows_something(response, of_keys):
    segments, branch = rows(response)
    mask = triton.Mask(True, LENGTH - 2 * response, LENGTH - response)
    mask = mask if response else triton.Mask(True)
    table = triton.block_table(segments, mask, rows=32, columns=16, of_keys=of_keys)
    dense = np.array(packed_text(segments, branch, response=response).dense())[0]
    dense = dense.T if of_keys else dense
    shown = dense.reshape(LENGTH // 32, 32, LENGTH // 16, 16).any((1, 3))
    assert [visits(table, row) for row in range(len(shown))] == [
        set(np.flatnonzero(row).tolist()) for row in shown
    ]
    assert not shown.all(1).any()


def test_windows_visit_no_block_but_their_own():
    segments = jnp.arange(LENGTH)[None] // 64 + 1
    table = triton.block_table(segments, triton.Mask(False), rows=128, columns=64)
    assert [visits(table, row) for row in range(2)] == [{0, 1}, {2, 3}]


def test_the_position_mask_is_as_drawn():
    seen = triton.Mask(True, 2, 4).visible(np.arange(6)[:, None], np.arange(6)[None, :])
    drawn = ["".join("x" if x else " " for x in row).rstrip() for row in seen]
    assert drawn == ["x", "xx", "xxx", "xxxx", "xx  x", "xx  xx"]


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_backward_lower_to_triton_for_cuda(head_dim, dtype):
    def shape(heads):
        return jax.ShapeDtypeStruct((1, LENGTH, heads, head_dim), dtype)

    def loss(q, k, v, segments):
        return triton.packed(q, k, v, segments, response=64).astype(jnp.float32).sum()

    segments = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("cards",), abstract_device=card)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape(4), shape(2), shape(2), segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3


def test_padding_comes_out_as_zeros():
    segments, branch = rows(0)
    x = jnp.asarray(random((1, LENGTH, 1, 64), 0))
    visible = packed_text(segments, branch)
    out = attend(x, x, x, visible, "triton_interpret")
    assert not np.asarray(out)[segments == 0].any()
    assert np.abs(np.asarray(out)[segments > 0]).min(-1).all()
