"""A digest is the same wherever and in whatever order it is formed, and shows every change."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from saber_jax import sharding
from saber_jax.train import digests

RNG = np.random.default_rng(0)


def random(shape, dtype: Any = np.float32):
    return RNG.standard_normal(shape, np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 4), (2, 70_000)])
def test_numpy_and_the_device_agree(shape, dtype):
    array = random(shape, dtype)
    on_device = jnp.asarray(array)
    assert int(digests._on_device(on_device)) == digests.of_numpy(array)
    assert digests.of_arrays({"x": on_device}) == {"x": digests.of_numpy(array)}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_])
def test_the_compiled_loop_and_numpy_agree(dtype):
    array = random((3, digests.CHUNK - 1), dtype)
    on_device = jnp.asarray(array)
    with jax.transfer_guard("disallow"):
        summed = digests.of_arrays({"x": on_device, "y": array, "z": array.T})
    turned = digests.of_numpy(np.ascontiguousarray(array.T))
    assert summed == {"x": digests.of_numpy(array), "y": digests.of_numpy(array), "z": turned}


def test_digests_are_those_of_earlier_checkpoints():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digests.of_numpy(array) == 4147401923
    assert digests.of_numpy(array.astype(ml_dtypes.bfloat16)) == 9100751


def test_the_mesh_does_not_matter():
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    array = random((8, 16))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp_x"))
    assert int(digests._on_device(jax.device_put(array, place))) == digests.of_numpy(array)


def test_layers_and_columns_add_up_to_the_whole():
    array = random((6, 40, 64), ml_dtypes.bfloat16)
    whole, strides = digests.of_numpy(array), digests.c_strides(array.shape)
    layers = sum(digests.of_numpy(x, first=i * x.size) for i, x in enumerate(array))
    columns = sum(
        digests.of_numpy(array[..., i : i + 16], first=i, strides=strides) for i in range(0, 64, 16)
    )
    assert layers % 2**32 == columns % 2**32 == whole


def test_memory_order_does_not_matter():
    array = random((30, 50)).T
    assert digests.of_numpy(array) == digests.of_numpy(np.ascontiguousarray(array))


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_an_element_shows(bit):
    array = random((3, 5))
    changed = array.copy()
    changed.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
    assert digests.of_numpy(changed) != digests.of_numpy(array)


@pytest.mark.parametrize(
    "change", [lambda x: x[::-1], lambda x: -x, lambda x: np.roll(x, 1), np.zeros_like]
)
def test_changes_of_many_elements_show(change):
    array = random(1000)
    assert digests.of_numpy(change(array)) != digests.of_numpy(array)


def test_zeros_of_another_length_differ():
    assert digests.of_numpy(np.zeros(4)) != digests.of_numpy(np.zeros(5))
