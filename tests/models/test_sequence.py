"""Two devices that share a row compute what one device does; tests/train/test_step.py has steps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from saber_jax import sharding
from saber_jax.models import lora, sequence
from saber_jax.models.attention import attend
from saber_jax.models.config import saber_config
from saber_jax.models.masks import packed_text

SHARE = PartitionSpec(None, sharding.SEQUENCE)
ROW = {
    **dict.fromkeys(("length", "targets", "chunks"), 64),
    **{"response": 0, "patches": 640, "frame_patches": 128},
}


def shared(function, *arrays):
    """`function` of the halves of the arrays on two devices, its results put together."""
    mesh = sharding.make_mesh(data=1, fsdp=1, sequence=2, tensor=1)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SHARE, out_specs=SHARE, check_vma=False)
    return jax.jit(mapped)(*arrays)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_over_shared_rows_is_that_over_whole_rows(kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (jax.random.normal(key, (2, 8, n, 16)) for key, n in zip(keys, heads, strict=True))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    branch = jnp.array([[0, 0, 0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 1, 1, 2, 2]])
    visible = packed_text(segments, branch, response=2)
    row = functools.partial(
        sequence.attend_row, visible=visible, kernel="xla", axis=sharding.SEQUENCE
    )
    got, want = shared(row, q, k, v), attend(q, k, v, visible)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-6)


def test_a_share_has_the_edges_of_its_neighbours():
    x = jnp.arange(1, 7)[None]
    edged = functools.partial(sequence.with_neighbours, reach=2, axis=sharding.SEQUENCE)
    want = np.array([[0, 0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 0, 0]])
    np.testing.assert_array_equal(shared(edged, x)[0], want.ravel())


def test_every_target_gets_the_state_of_its_source():
    hidden, source = jnp.arange(12.0).reshape(1, 6, 2), jnp.array([[5, 0, 2, 2, 4, 3]])
    states = functools.partial(sequence.at_sources, axis=sharding.SEQUENCE)
    np.testing.assert_array_equal(shared(states, hidden, source)[0], hidden[0, source[0]])


def test_shares_of_a_row_have_dropout_masks_of_their_own():
    x = jnp.ones((2, 8, 32))

    def drop(share):
        rows = jax.random.split(jax.random.key(0), 2)
        return lora.dropped(share, lora.keys_here(rows, sharding.SEQUENCE), 0.5)

    first, second = np.split(np.asarray(shared(drop, x)), 2, axis=1)
    assert (first != second).any() and {0.0, 2.0} == set(np.unique([first, second]))


def test_what_devices_cannot_share_evenly_is_refused():
    text = saber_config("7b").text
    for devices in (1, 2, 4):
        sequence.check({"sequence": devices, "tensor": 1}, text, ROW)
    wrong = {"length": 62, "patches": 500, "chunks": 3}
    message = (
        r"sequence=4 .*length=62, .* multiple of 4; .*chunks=3.*patches=500, .* multiple of 16"
        r".*patches=500, less than a frame of config.data.frame_patches=128"
    )
    with pytest.raises(ValueError, match=message):
        sequence.check({"sequence": 4, "tensor": 1}, text, ROW | wrong)
    with pytest.raises(ValueError, match=re.escape("28 heads over 4 kv heads")) as error:
        sequence.check({"sequence": 8, "tensor": 2}, text, ROW)
    assert "2, 4, 28 devices" in str(error.value) and "mesh.tensor=2" in str(error.value)
